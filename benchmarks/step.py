"""One denoising step of the 14 B memory-dmd model through ComfyUI's sampler: seconds, VRAM, weights moved.

    python dev.py bench step
    python dev.py bench step [--weights fp8 int8 bf16] [--compute auto bf16 core] [--references 0 8] [--frames 21]
                             [--vram 15.0 0] [--ram 16 0] [--size 832x480] [--compile no inductor] [--runs 2] [--profile]

Each row is a process of its own. Without arguments: 832×480, 21 keyframes, 8 references with FP8 weights in 5.5, 7.5,
11.0, 15.0, 22.5 GiB and all of the card; then with the whole card INT8 weights, ComfyUI's own FP8 Linear, and a clip of
6 keyframes with 5 references. With arguments: every combination of what they name.

The weights are random, of the published shapes; the files are made on the GPU the first time, in --folder.
--vram: how many GiB of VRAM the row's process can have beside its CUDA context (0: all); another process takes the rest.
A row that had more is an error.
--ram: how many GiB of RAM it can have, the file's cache included (0: all), starting with an empty cache; another process
takes the rest. --folder must be on a disk then.
--compute: as the loader node has it; core: ComfyUI's own Linear for every layer that it takes.
--compile: with core's TorchCompileModel and this backend.
--profile: and the kernels that took the most time in a step of another run.
--load: instead, how long a file takes to reach the GPU, against ComfyUI's own loader on a plain Wan file.

With ComfyUI's dynamic VRAM, as ComfyUI does by default; WORLDSTEREO_DYNAMIC_VRAM=0 in the environment turns that off.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import standalone

standalone.import_all()

# isort: split
import comfy.memory_management
import comfy.model_management
import comfy.sample
import comfy.sd
import psutil
import torch
from card import GIB, Ballast, limited_ram, own_ram
from comfy.ldm.wan.vae import WanVAE
from comfy_api.torch_helpers import set_torch_compile_wrapper
from safetensors.torch import save_file
from worldstereo_fp8 import loaders
from worldstereo_fp8.fp8 import int8, linear
from worldstereo_fp8.fp8.activations import backend
from worldstereo_fp8.fp8.arithmetic import UPCAST
from worldstereo_fp8.fp8.linear import COMPUTE
from worldstereo_fp8.fp8.matmul import size_refusal
from worldstereo_fp8.fp8.recipe import COMFY_QUANT, MARKER, is_quantised, quantise_weight, scale_name
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.remap import to_native
from worldstereo_fp8.worldstereo.config import WorldStereoConfig
from worldstereo_fp8.worldstereo.shapes import tensor_shapes

STEPS = 4
VAE_WIDTH = 96  # of Wan 2.1's
CORE = "core"
DEFAULT = {
    "weights": "fp8",
    "compute": "auto",
    "references": 8,
    "frames": 21,
    "size": "832x480",
    "compile": "no",
    "vram": 0.0,
    "ram": 0.0,
}
ROWS = (
    *({"vram": gib} for gib in (5.5, 7.5, 11.0, 15.0, 22.5, 0.0)),
    {"weights": "int8"},
    {"compute": CORE},
    {"frames": 6, "references": 5},
)
MARK = "row: "  # what the line with a row's figures begins with


def make_checkpoint(path: Path, weights: str = "fp8", plain_wan: bool = False, quiet: bool = False):
    """Random weights of the published shapes, drawn on the GPU, the same whatever their form: activations stay near unit
    size.

    weights: "fp8" for the published scaled-FP8 format, "int8" for that with rotation, or "bf16". plain_wan: the backbone
    alone, with native names.
    """
    if path.exists():
        return
    start = time.perf_counter()
    tensors = {MARKER: torch.zeros(1, dtype=torch.bfloat16)} if weights == "fp8" else {}
    torch.manual_seed(0)
    for name, shape in tensor_shapes(WorldStereoConfig()).items():
        if plain_wan and name.startswith(("controlnet.", "camera_embedding.")):
            continue
        value = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * math.prod(shape[1:]) ** -0.5
        if len(shape) == 1:
            value = value * 0.02 + (1 if "norm" in name and name.endswith("weight") else 0)
        target = to_native(name) if plain_wan else name
        if weights == "fp8" and is_quantised(name, shape, "bf16"):
            value, scale = quantise_weight(value)
            tensors[scale_name(target)] = scale.cpu()
        elif weights == "int8" and int8.is_int8(name, shape):
            value, scale = int8.quantise_weight(value)
            layer = target.removesuffix("weight")
            tensors[layer + int8.SCALE_SUFFIX] = scale.cpu()
            tensors[layer + COMFY_QUANT] = torch.tensor(list(int8.description()), dtype=torch.uint8)
        tensors[target] = value.cpu()
    save_file(tensors, path, {"config": json.dumps({"model_type": "worldstereo-memory-dmd"})})
    if not quiet:
        print(f"made {path}, {path.stat().st_size / 1e9:.2f} GB, in {time.perf_counter() - start:.0f} s", flush=True)


def make_vae(path: Path):
    """Random weights of the Wan 2.1 VAE's shapes, FP16; activations stay near unit size."""
    torch.manual_seed(0)
    vae = WanVAE(dim=VAE_WIDTH, z_dim=16, temperal_downsample=[False, True, True])
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    save_file({name: value.half() for name, value in vae.state_dict().items()}, path)


@contextlib.contextmanager
def cores_linear(wanted: bool):
    """While it lasts, models are loaded with ComfyUI's own Linear in every layer, if that is wanted."""

    def operations(*args):
        ours = linear.operations(*args)

        class Operations(ours):
            class Linear(ours.Linear):
                def arithmetic(self, device):
                    return UPCAST

                def fetched(self, device, dtype):
                    return contextlib.nullcontext(self.forward)

                def forward(self, x):
                    if size_refusal(self.in_features, self.out_features):  # which core's refuses with an error
                        return super().forward(x)
                    return super(ours.Linear, self).forward(x)

        return Operations

    loaders.operations = operations if wanted else linear.operations
    try:
        yield
    finally:
        loaders.operations = linear.operations


def conditioning(references: int, frames: int, width: int, height: int):
    torch.manual_seed(1)
    h, w = height // 8, width // 8

    class Vision:
        penultimate_hidden_states = torch.randn(1, 257, 1280)

    values = {
        "concat_latent_image": torch.randn(1, 16, frames, h, w),
        "concat_mask": torch.ones(1, 1, frames, h, w),
        "clip_vision_output": Vision,
        "render_latent": torch.randn(1, 16, frames, h, w),
        "render_mask": torch.zeros(1, 1, frames, height, width),
        "camera_embedding": torch.randn(1, 6, frames, height, width),
        "camera_qt": torch.randn(1, frames, 7),
    }
    if references:
        values |= {
            "reference_latent": torch.randn(1, 16, references, h, w),
            "ref_index": torch.arange(references)[None],
            "camera_qt_ref": torch.randn(1, references, 7),
        }
    return [[torch.randn(1, 512, 4096), values]]


def unload():
    comfy.model_management.unload_all_models()
    gc.collect()
    torch.cuda.empty_cache()


def to_gpu(load) -> float:
    """Seconds from the file to all weights on the GPU."""
    unload()
    start = time.perf_counter()
    comfy.model_management.load_models_gpu([load()], force_full_load=True)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_load(folder: Path):
    """Each loader twice in turns; the second turn has warm files and a warm allocator."""
    ours, plain = folder / "worldstereo_fp8.safetensors", folder / "plain_wan_fp8.safetensors"
    make_checkpoint(ours)
    make_checkpoint(plain, plain_wan=True)
    print("| loader | file GB | s | s per GB |\n|---|---:|---:|---:|")
    for turn in range(2):
        for name, path, load in (
            ("ComfyUI's, plain Wan", plain, lambda: comfy.sd.load_diffusion_model(str(plain))),
            ("ours", ours, lambda: load_worldstereo(ours)),
        ):
            seconds, size = to_gpu(load), path.stat().st_size / 1e9
            if turn == 1:
                print(f"| {name} | {size:.2f} | {seconds:.2f} | {seconds / size:.3f} |", flush=True)


moved = 0  # bytes of weights that core copied to the GPU


def count_moves():
    """Counts the weights that core copies to the GPU: one by one, or with dynamic VRAM a layer's together."""
    one, together = comfy.model_management.cast_to, comfy.model_management.cast_to_gathered

    def cast_to(weight, dtype=None, device=None, *args, **kwargs):
        global moved
        if device is not None and weight.device != device and isinstance(weight, torch.nn.Parameter):
            moved += weight.nbytes
        return one(weight, dtype, device, *args, **kwargs)

    def cast_to_gathered(tensors, r, *args, r2=None, **kwargs):
        global moved
        moved += sum(room.nbytes for room in (r, r2) if room is not None and room.device.type == "cuda")
        return together(tensors, r, *args, r2=r2, **kwargs)

    comfy.model_management.cast_to, comfy.model_management.cast_to_gathered = cast_to, cast_to_gathered


def skip_transformer_options(guards):
    return ["transformer_options" not in guard.name for guard in guards]


def peak_bytes(patcher) -> int:
    """The most that PyTorch had allocated, and the weights that dynamic VRAM holds beside it at the end."""
    vbar = patcher._vbar_get() if patcher.is_dynamic() else None
    return torch.cuda.max_memory_allocated() + (vbar.loaded_size() if vbar else 0)


def profile(sample, kernels: int = 16):
    """A table of the kernels that took the most time, of `sample`'s last step."""
    schedule = torch.profiler.schedule(wait=0, warmup=STEPS - 1, active=1)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], schedule=schedule, acc_events=True
    ) as profiler:
        sample(lambda *_: (torch.cuda.synchronize(), profiler.step()))
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    print(f"\n| kernel | ms of {total / 1e3:.0f} | calls |\n|---|---:|---:|")
    for event in events[:kernels]:
        print(f"| {event.key[:90]} | {event.self_device_time_total / 1e3:.1f} | {event.count} |")


def load(path: Path, compute: str):
    with cores_linear(compute == CORE):
        return load_worldstereo(path, compute="auto" if compute == CORE else compute)


def inputs(references: int, frames: int, size: str) -> tuple[list, torch.Tensor]:
    """Conditioning and noise, always the same."""
    width, height = map(int, size.split("x"))
    noise = torch.randn(1, 16, frames, height // 8, width // 8, generator=torch.Generator().manual_seed(2))
    return conditioning(references, frames, width, height), noise


def sample(patcher, cond: list, noise: torch.Tensor, cfg: float = 1.0, callback=None) -> torch.Tensor:
    """Four steps: the latent."""
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher,
            noise,
            STEPS,
            cfg,
            "euler",
            "simple",
            cond,
            cond,
            torch.zeros_like(noise),
            seed=0,
            callback=callback,
            disable_pbar=True,
        )


def measure(patcher, row: dict, runs: int) -> dict:
    """Four steps, `runs` times; the figures are the last run's, the first also compiles kernels and loads weights."""
    torch.cuda.reset_peak_memory_stats()
    totals, given = [], inputs(row["references"], row["frames"], row["size"])
    for _ in range(runs):
        stamps, copied = [time.perf_counter()], [moved]

        def callback(*_):
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            copied.append(moved)

        out = sample(patcher, *given, callback=callback)
        totals.append(time.perf_counter() - stamps[0])
    if not out.isfinite().all():
        sys.exit("The result is not finite.")
    steps = [b - a for a, b in zip(stamps, stamps[1:])]
    step, peak = statistics.median(steps[1:]), peak_bytes(patcher)
    if row["vram"] and peak > row["vram"] * GIB:
        sys.exit(f"The row had {row['vram']} GiB, but its peak is {peak / GIB:.2f} GiB: it measured another card.")
    return {
        "first run s": f"{totals[0]:.1f}",
        "step s": f"{step:.3f}",
        "first step s": f"{steps[0]:.2f}",
        "four steps s": f"{totals[-1]:.2f}",
        "four / 4 single": f"{totals[-1] / (4 * step):.3f}",
        "peak GB": f"{peak / 1e9:.2f}",
        "own RAM GB": f"{own_ram() * GIB / 1e9:.2f}",
        "weights on the GPU GB": f"{patcher.loaded_size() / 1e9:.2f}",
        "copied in step 1 GB": f"{(copied[1] - copied[0]) / 1e9:.2f}",
        "copied in steps 2-4 GB": f"{(copied[-1] - copied[1]) / 1e9:.2f}",
    }


def run_row(row: dict, args):
    """A row, in this process: its figures as one line."""
    count_moves()
    torch.cuda.mem_get_info()  # makes the CUDA context, which is not counted
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    with Ballast() as card:
        card.leave_free(row["vram"])
        torch.cuda.set_per_process_memory_fraction(min((row["vram"] or total) / total, 1.0))
        if row["ram"]:  # ComfyUI pins at most a share of what the whole machine has
            comfy.model_management.MAX_PINNED_MEMORY *= row["ram"] * GIB / psutil.virtual_memory().total
        patcher = load(file_of(args.folder, row["weights"]), row["compute"])
        if row["compile"] != "no":
            patcher = patcher.clone(disable_dynamic=True)  # as core's TorchCompileModel does
            set_torch_compile_wrapper(patcher, row["compile"], {"guard_filter_fn": skip_transformer_options})
        figures = measure(patcher, row, args.runs)
        print(MARK + json.dumps(figures), flush=True)
        if args.profile:
            given = inputs(row["references"], row["frames"], row["size"])
            profile(lambda callback: sample(patcher, *given, callback=callback))


def file_of(folder: Path, weights: str) -> Path:
    return folder / f"worldstereo_{weights}.safetensors"


def in_a_process_of_its_own(script: str, *arguments: str, ram: float = 0) -> tuple[dict | None, str]:
    """The figures that a benchmark's row prints, None if it failed, and the rest of its output. ram: as --ram."""
    with limited_ram(ram):
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    lines = process.stdout.splitlines()
    found = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    rest = "\n".join(line for line in lines if not line.startswith(MARK))
    return (found[0] if found and process.returncode == 0 else None), rest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=["fp8", "int8", "bf16"], nargs="+")
    parser.add_argument("--compute", choices=[*COMPUTE, CORE], nargs="+")
    parser.add_argument("--references", type=int, nargs="+")
    parser.add_argument("--frames", type=int, nargs="+")
    parser.add_argument("--size", nargs="+")
    parser.add_argument("--compile", nargs="+", metavar="BACKEND")
    parser.add_argument("--vram", type=float, nargs="+")
    parser.add_argument("--ram", type=float, nargs="+")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("The benchmark step needs a CUDA GPU.")
    if args.row:
        run_row(json.loads(args.row), args)
        return 0
    dynamic_vram = "on" if comfy.memory_management.aimdo_enabled else "off"
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, kernels "
        f"{backend(torch.device('cuda'))[0]}, dynamic VRAM {dynamic_vram}; euler, "
        f"{STEPS} steps, cfg 1\n"
    )
    if args.load:
        measure_load(args.folder)
        return 0
    given = {name: getattr(args, name) for name in DEFAULT if getattr(args, name)}
    rows = ROWS
    if given:
        rows = [dict(zip(given, values)) for values in itertools.product(*given.values())]
    headed, failed = False, False
    for row in rows:
        row = DEFAULT | row
        make_checkpoint(file_of(args.folder, row["weights"]), row["weights"])
        torch.cuda.empty_cache()  # this process's share of the card
        arguments = ["--row", json.dumps(row), "--runs", str(args.runs), "--folder", str(args.folder)]
        profiled = ["--profile"] if args.profile else []
        figures, rest = in_a_process_of_its_own("step.py", *arguments, *profiled, ram=row["ram"])
        if figures is None:
            failed = True
            print(f"\nNo figures for {row}:\n{rest[-3000:]}\n", flush=True)
            continue
        cells = row | {"vram": row["vram"] or "all", "ram": row["ram"] or "all"} | figures
        if not headed:
            headed = True
            print("| " + " | ".join(cells) + " |\n" + "|---" * len(cells) + "|")
        print("| " + " | ".join(map(str, cells.values())) + " |", flush=True)
        if args.profile:
            print(rest)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
