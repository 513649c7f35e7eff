"""One denoising step of the 14 B memory-dmd model through ComfyUI's sampler: seconds, VRAM, weights moved.

    python dev.py bench step [--references 0 8] [--vram 15.0 22.5 0] [--weights fp8 bf16] [--compute auto bf16]
                             [--compile no inductor] [--runs 2] [--profile]

The weights are random, of the published shapes; the files are made on the GPU the first time, in --folder.
--vram: how many GiB of VRAM this process can have beside its CUDA context (0: all); another process takes the rest.
--compile: with core's TorchCompileModel and this backend.
--profile: and the kernels that took the most time in a step of another run.
--load: instead, how long a file takes to reach the GPU, against ComfyUI's own loader on a plain Wan file.

With ComfyUI's dynamic VRAM, as ComfyUI does by default; WORLDSTEREO_DYNAMIC_VRAM=0 in the environment turns that off.
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import conftest

# isort: split
import comfy.model_management
import comfy.sample
import comfy.sd
import torch
from card import GIB, Card
from comfy_api.torch_helpers import set_torch_compile_wrapper
from safetensors.torch import save_file
from worldstereo_fp8.fp8.activations import backend
from worldstereo_fp8.fp8.linear import COMPUTE
from worldstereo_fp8.fp8.recipe import MARKER, is_quantised, quantise_weight, scale_name
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.remap import to_native
from worldstereo_fp8.worldstereo.config import WorldStereoConfig
from worldstereo_fp8.worldstereo.shapes import tensor_shapes

HEIGHT, WIDTH, FRAMES, STEPS = 480, 768, 21, 4


def make_checkpoint(path: Path, fp8: bool = True, plain_wan: bool = False):
    """Random weights of the published shapes, drawn on the GPU: activations stay near unit size.

    fp8: in the published scaled-FP8 format, else BF16. plain_wan: the backbone alone, with native names.
    """
    if path.exists():
        return
    start = time.perf_counter()
    tensors = {MARKER: torch.zeros(1, dtype=torch.bfloat16)} if fp8 else {}
    torch.manual_seed(0)
    for name, shape in tensor_shapes(WorldStereoConfig()).items():
        if plain_wan and name.startswith(("controlnet.", "camera_embedding.")):
            continue
        value = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * math.prod(shape[1:]) ** -0.5
        if len(shape) == 1:
            value = value * 0.02 + (1 if "norm" in name and name.endswith("weight") else 0)
        target = to_native(name) if plain_wan else name
        if fp8 and is_quantised(name, shape, "bf16"):
            value, scale = quantise_weight(value)
            tensors[scale_name(target)] = scale.cpu()
        tensors[target] = value.cpu()
    save_file(tensors, path, {"config": json.dumps({"model_type": "worldstereo-memory-dmd"})})
    print(f"made {path}, {path.stat().st_size / 1e9:.2f} GB, in {time.perf_counter() - start:.0f} s", flush=True)


def conditioning(references: int):
    torch.manual_seed(1)
    h, w = HEIGHT // 8, WIDTH // 8

    class Vision:
        penultimate_hidden_states = torch.randn(1, 257, 1280)

    values = {
        "concat_latent_image": torch.randn(1, 16, FRAMES, h, w),
        "concat_mask": torch.ones(1, 1, FRAMES, h, w),
        "clip_vision_output": Vision,
        "render_latent": torch.randn(1, 16, FRAMES, h, w),
        "render_mask": torch.zeros(1, 1, FRAMES, HEIGHT, WIDTH),
        "camera_embedding": torch.randn(1, 6, FRAMES, HEIGHT, WIDTH),
        "camera_qt": torch.randn(1, FRAMES, 7),
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
    print("| loader | file GB | s | s a GB |\n|---|---:|---:|---:|")
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


def measure(path: Path, references: int, compute: str, backend: str, runs: int, profiled: bool) -> dict:
    """Four steps, `runs` times; the figures are the last run's, the first also compiles kernels and loads weights."""
    patcher = load_worldstereo(path, compute=compute)
    if backend != "no":
        patcher = patcher.clone(disable_dynamic=True)  # as core's TorchCompileModel does
        set_torch_compile_wrapper(patcher, backend, {"guard_filter_fn": skip_transformer_options})
    cond = conditioning(references)
    latent = torch.zeros(1, 16, FRAMES, HEIGHT // 8, WIDTH // 8)
    noise = torch.randn_like(latent)

    def sample(callback):
        with torch.inference_mode():
            return comfy.sample.sample(
                patcher,
                noise,
                STEPS,
                1.0,
                "euler",
                "simple",
                cond,
                cond,
                latent,
                seed=0,
                callback=callback,
                disable_pbar=True,
            )

    torch.cuda.reset_peak_memory_stats()
    totals = []
    for _ in range(runs):
        stamps, copied = [time.perf_counter()], [moved]

        def callback(*_):
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            copied.append(moved)

        out = sample(callback)
        totals.append(time.perf_counter() - stamps[0])
    assert out.isfinite().all()
    steps = [b - a for a, b in zip(stamps, stamps[1:])]
    step = statistics.median(steps[1:])
    row = {
        "first run s": f"{totals[0]:.1f}",
        "step s": f"{step:.3f}",
        "first step s": f"{steps[0]:.2f}",
        "four steps s": f"{totals[-1]:.2f}",
        "four / 4 single": f"{totals[-1] / (4 * step):.3f}",
        "peak GB": f"{peak_bytes(patcher) / 1e9:.2f}",
        "weights on the GPU GB": f"{patcher.loaded_size() / 1e9:.2f}",
        "copied in step 1 GB": f"{(copied[1] - copied[0]) / 1e9:.2f}",
        "copied in steps 2-4 GB": f"{(copied[-1] - copied[1]) / 1e9:.2f}",
    }
    if profiled:
        profile(sample)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, nargs="+", default=[8, 0])
    parser.add_argument("--vram", type=float, nargs="+", default=[15.0, 22.5, 0])
    parser.add_argument("--weights", choices=["fp8", "bf16"], nargs="+", default=["fp8"])
    parser.add_argument("--compute", choices=COMPUTE, nargs="+", default=["auto"])
    parser.add_argument("--compile", nargs="+", default=["no"], metavar="BACKEND")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--load", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("The benchmark step needs a CUDA GPU.")
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, kernels "
        f"{backend(torch.device('cuda'))[0]}, dynamic VRAM {'on' if conftest.DYNAMIC_VRAM else 'off'}; "
        f"{WIDTH}×{HEIGHT}, {FRAMES} frames, euler, {STEPS} steps, cfg 1\n"
    )
    if args.load:
        return measure_load(args.folder)
    count_moves()
    torch.cuda.mem_get_info()  # makes the CUDA context, which is not counted
    header = None
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    with Card() as card:
        for weights, compute, references, compiled, vram in itertools.product(
            args.weights, args.compute, args.references, args.compile, args.vram
        ):
            path = args.folder / f"worldstereo_{weights}.safetensors"
            make_checkpoint(path, fp8=weights == "fp8")
            unload()
            card.leave_free(vram)
            torch.cuda.set_per_process_memory_fraction(min((vram or total) / total, 1.0))
            setting = {
                "weights": weights,
                "compute": compute,
                "references": references,
                "compiled": compiled,
                "VRAM GiB": vram or "all",
            }
            try:
                row = setting | measure(path, references, compute, compiled, args.runs, args.profile)
            except torch.OutOfMemoryError as e:
                print(f"{setting}: {e}")
                continue
            finally:
                card.leave_free(0)
            if header is None:
                header = "| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|"
                print(header)
            print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
