"""One denoising step of the 14 B memory-dmd model through ComfyUI's sampler: seconds, VRAM, weights moved.

    python benchmarks/step.py [--references 0 8] [--vram 15.0 22.5 0] [--compute auto bf16] [--checkpoint FILE]

The weights are random, in the published scaled-FP8 format and shapes; the file is made on the GPU the first time.
--vram: how much memory in GiB the card is taken to have (0: all of it); the process is capped at that.
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import conftest  # noqa: E402, F401  makes ComfyUI and the pack importable
import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from worldstereo_fp8.fp8.recipe import MARKER, is_quantised, quantise, scale_name  # noqa: E402
from worldstereo_fp8.loaders import load_worldstereo  # noqa: E402
from worldstereo_fp8.worldstereo.config import WorldStereoConfig  # noqa: E402
from worldstereo_fp8.worldstereo.layout import tensor_shapes  # noqa: E402

GIB = 2**30
HEIGHT, WIDTH, FRAMES, STEPS = 480, 768, 21, 4


def make_checkpoint(path: Path):
    """Random weights of the published shapes and format, drawn on the GPU: activations stay near unit size."""
    tensors = {MARKER: torch.zeros(1, dtype=torch.bfloat16)}
    torch.manual_seed(0)
    for name, shape in tensor_shapes(WorldStereoConfig()).items():
        value = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * math.prod(shape[1:]) ** -0.5
        if len(shape) == 1:
            value = value * 0.02 + (1 if "norm" in name and name.endswith("weight") else 0)
        if is_quantised(name, shape, "bf16"):
            value, scale = quantise(value)
            tensors[scale_name(name)] = scale.cpu()
        tensors[name] = value.cpu()
    save_file(tensors, path, {"config": json.dumps({"model_type": "worldstereo-memory-dmd"})})


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
        stats = torch.cuda.memory_stats()
        reserved, active = stats["reserved_bytes.all.current"], stats["active_bytes.all.current"]
        free, cached = cap - reserved, reserved - active
        return (free + cached, cached) if torch_free_too else free + cached

    comfy.model_management.get_free_memory = get_free_memory


def weights_on_gpu(model) -> int:
    return sum(p.nbytes for p in model.parameters() if p.device.type == "cuda")


def measure(path: Path, references: int, vram: float, compute: str, runs: int = 3) -> dict:
    comfy.model_management.unload_all_models()
    gc.collect()
    torch.cuda.empty_cache()
    as_if_the_card_had(vram)
    start = time.perf_counter()
    patcher = load_worldstereo(path, compute=compute)
    row = {"references": references, "vram": vram or "all", "compute": compute, "load_s": time.perf_counter() - start}
    cond = conditioning(references)
    latent = torch.zeros(1, 16, FRAMES, HEIGHT // 8, WIDTH // 8)
    noise = torch.randn_like(latent)
    with torch.inference_mode():
        for run in range(runs):
            torch.cuda.reset_peak_memory_stats()
            stamps, moved = [time.perf_counter()], []

            def callback(*_):
                torch.cuda.synchronize()
                stamps.append(time.perf_counter())
                moved.append(comfy_bytes_moved())

            start = time.perf_counter()
            out = comfy.sample.sample(patcher, noise, STEPS, 1.0, "euler", "simple", cond, cond, latent, seed=0,
                                      callback=callback, disable_pbar=True)
            total = time.perf_counter() - start
            steps = [b - a for a, b in zip(stamps, stamps[1:])]
            row[f"run{run}"] = [round(s, 3) for s in steps] + [round(total, 3)]
            row[f"peak{run}"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            row[f"moved{run}"] = [round((b - a) / 1e9, 2) for a, b in zip([0, *moved], moved)]
    assert out.isfinite().all()
    row["resident"] = round(weights_on_gpu(patcher.model) / 1e9, 2)
    row["step"] = statistics.median(row[f"run{runs - 1}"][1:STEPS])
    return row


_moved = 0


def comfy_bytes_moved() -> int:
    """Bytes of weights copied to the GPU so far by core's casts of offloaded layers."""
    return _moved


def count_moves():
    """Counts what core's cast of offloaded weights copies: every such copy goes through cast_to."""
    original = comfy.model_management.cast_to

    def cast_to(weight, dtype=None, device=None, *args, **kwargs):
        global _moved
        if device is not None and weight.device != device and device.type == "cuda" and isinstance(weight, torch.nn.Parameter):
            _moved += weight.nbytes
        return original(weight, dtype, device, *args, **kwargs)

    comfy.model_management.cast_to = cast_to


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--vram", type=float, nargs="+", default=[15.0, 22.5])
    parser.add_argument("--compute", nargs="+", default=["auto"])
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "worldstereo_random.safetensors")
    args = parser.parse_args()
    if not args.checkpoint.exists():
        start = time.perf_counter()
        make_checkpoint(args.checkpoint)
        print(f"made {args.checkpoint} in {time.perf_counter() - start:.0f} s, {args.checkpoint.stat().st_size / 1e9:.2f} GB")
    count_moves()
    rows = []
    for compute in args.compute:
        for references in args.references:
            for vram in args.vram:
                try:
                    rows.append(measure(args.checkpoint, references, vram, compute))
                except torch.OutOfMemoryError as e:
                    rows.append({"references": references, "vram": vram, "compute": compute, "error": str(e)[:300]})
                print(json.dumps(rows[-1]), flush=True)
    if os.environ.get("OUT"):
        Path(os.environ["OUT"], "step.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
