"""One denoising step of the 14 B memory-dmd model through ComfyUI's sampler: seconds, VRAM, weights moved.

    python dev.py bench step [--references 0 8] [--vram 15.0 22.5 0] [--weights fp8 bf16] [--compute auto bf16] [--runs 2]

The weights are random, of the published shapes; the files are made on the GPU the first time, in --folder.
--vram: how much memory in GiB the card is taken to have (0: all of it); the process is capped at that.
--load: instead, how long a file takes to reach the GPU, against ComfyUI's own loader on a plain Wan file.
"""

import argparse
import gc
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")  # as ComfyUI starts on these cards

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import conftest  # noqa: E402, F401  makes ComfyUI and the pack importable
import comfy.cli_args  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from worldstereo_fp8.fp8.activations import backend  # noqa: E402
from worldstereo_fp8.fp8.linear import COMPUTE  # noqa: E402
from worldstereo_fp8.fp8.recipe import MARKER, is_quantised, quantise, scale_name  # noqa: E402
from worldstereo_fp8.loaders import load_worldstereo  # noqa: E402
from worldstereo_fp8.remap import to_native  # noqa: E402
from worldstereo_fp8.worldstereo.config import WorldStereoConfig  # noqa: E402
from worldstereo_fp8.worldstereo.layout import tensor_shapes  # noqa: E402

GIB = 2**30
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
            value, scale = quantise(value)
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
        "concat_latent_image": torch.randn(1, 16, FRAMES, h, w), "concat_mask": torch.ones(1, 1, FRAMES, h, w),
        "clip_vision_output": Vision, "render_latent": torch.randn(1, 16, FRAMES, h, w),
        "render_mask": torch.zeros(1, 1, FRAMES, HEIGHT, WIDTH),
        "camera_embedding": torch.randn(1, 6, FRAMES, HEIGHT, WIDTH),
        "camera_qt": torch.randn(1, FRAMES, 7),
    }
    if references:
        values |= {"reference_latent": torch.randn(1, 16, references, h, w), "ref_index": torch.arange(references)[None],
                   "camera_qt_ref": torch.randn(1, references, 7)}
    return [[torch.randn(1, 512, 4096), values]]


def as_if_the_card_had(gib: float):
    """Caps the process and tells ComfyUI, which asks the driver, the same."""
    total = torch.cuda.get_device_properties(0).total_memory
    cap = gib * GIB if gib else total
    torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0))

    def get_free_memory(dev=None, torch_free_too=False):
        reserved, active = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        free, cached = cap - reserved, reserved - active
        return (free + cached, cached) if torch_free_too else free + cached

    comfy.model_management.get_free_memory = get_free_memory


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
        for name, path, load in (("ComfyUI's, plain Wan", plain, lambda: comfy.sd.load_diffusion_model(str(plain))),
                                 ("ours", ours, lambda: load_worldstereo(ours))):
            seconds, size = to_gpu(load), path.stat().st_size / 1e9
            if turn == 1:
                print(f"| {name} | {size:.2f} | {seconds:.2f} | {seconds / size:.3f} |", flush=True)


moved = 0  # bytes of offloaded weights that core copied to the GPU


def count_moves():
    """Counts the weights that core copies to the GPU for a product: each such copy goes through cast_to."""
    original = comfy.model_management.cast_to

    def cast_to(weight, dtype=None, device=None, *args, **kwargs):
        global moved
        if device is not None and weight.device != device and isinstance(weight, torch.nn.Parameter):
            moved += weight.nbytes
        return original(weight, dtype, device, *args, **kwargs)

    comfy.model_management.cast_to = cast_to


def measure(path: Path, references: int, vram: float, compute: str, runs: int) -> dict:
    """Four steps, `runs` times; the figures are the last run's, the first also compiles kernels and loads weights."""
    unload()
    as_if_the_card_had(vram)
    patcher = load_worldstereo(path, compute=compute)
    cond = conditioning(references)
    latent = torch.zeros(1, 16, FRAMES, HEIGHT // 8, WIDTH // 8)
    noise = torch.randn_like(latent)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(runs):
        stamps, copied = [time.perf_counter()], [moved]

        def callback(*_):
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            copied.append(moved)

        with torch.inference_mode():
            out = comfy.sample.sample(patcher, noise, STEPS, 1.0, "euler", "simple", cond, cond, latent, seed=0,
                                      callback=callback, disable_pbar=True)
        total = time.perf_counter() - stamps[0]
    assert out.isfinite().all()
    steps = [b - a for a, b in zip(stamps, stamps[1:])]
    return {
        "step s": f"{statistics.median(steps[1:]):.3f}", "first step s": f"{steps[0]:.2f}", "four steps s": f"{total:.2f}",
        "four / 4 single": f"{total / (4 * statistics.median(steps[1:])):.3f}",
        "peak GB": f"{torch.cuda.max_memory_allocated() / 1e9:.2f}",
        "weights on the GPU GB": f"{sum(p.nbytes for p in patcher.model.parameters() if p.device.type == 'cuda') / 1e9:.2f}",
        "copied in step 1 GB": f"{(copied[1] - copied[0]) / 1e9:.2f}",
        "copied in steps 2-4 GB": f"{(copied[-1] - copied[1]) / 1e9:.2f}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, nargs="+", default=[8, 0])
    parser.add_argument("--vram", type=float, nargs="+", default=[15.0, 22.5, 0])
    parser.add_argument("--weights", choices=["fp8", "bf16"], nargs="+", default=["fp8"])
    parser.add_argument("--compute", choices=COMPUTE, nargs="+", default=["auto"])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--load", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA GPU.")
    comfy.cli_args.args.cuda_malloc = True
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, "
          f"kernels {backend(torch.device('cuda'))[0]}; {WIDTH}×{HEIGHT}, {FRAMES} frames, euler, {STEPS} steps, cfg 1\n")
    if args.load:
        return measure_load(args.folder)
    count_moves()
    header = None
    for weights, compute, references, vram in itertools.product(args.weights, args.compute, args.references, args.vram):
        path = args.folder / f"worldstereo_{weights}.safetensors"
        make_checkpoint(path, fp8=weights == "fp8")
        setting = {"weights": weights, "compute": compute, "references": references, "VRAM GiB": vram or "all"}
        try:
            row = setting | measure(path, references, vram, compute, args.runs)
        except torch.OutOfMemoryError as e:
            print(f"{setting}: {e}")
            continue
        if header is None:
            header = "| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|"
            print(header)
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
