"""Keyframes through the Wan 2.1 VAE's network, as ComfyUI computes it and as `worldstereo/keyframe_vae.py` does, with the
channels last in memory and fused norms: milliseconds, memory, and the error against FP32.

    python dev.py bench vae [--pictures 7] [--size 832x480]

Random weights of the published shapes; the mean of RUNS runs after one that warms up. BF16 on a GPU, FP32 on the CPU, where
`--size 160x96` takes seconds and no memory is measured.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from step import make_vae  # makes ComfyUI and the pack importable

# isort: split
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from card import GIB
from worldstereo_fp8.fp8.channels_last import ChannelsLast
from worldstereo_fp8.worldstereo.config import LATENT_CHANNELS, SPATIAL_DOWNSCALE
from worldstereo_fp8.worldstereo.keyframe_vae import BATCH, fused_norms

RUNS = 5
WAYS = [
    ["as ComfyUI"],
    ["channels last", lambda _: ChannelsLast()],
    ["channels last, fused norms", lambda _: ChannelsLast(), fused_norms],
]
CUDA = torch.cuda.is_available()


def measured(code, batch):
    """Milliseconds for each picture, GiB taken beside weights and input at the peak, and the result."""
    code(batch)
    before = torch.cuda.memory_allocated() if CUDA else 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    comfy.model_management.synchronize()
    start = time.perf_counter()
    for _ in range(RUNS):
        result = code(batch)
    comfy.model_management.synchronize()
    milliseconds = (time.perf_counter() - start) / RUNS / len(batch) * 1000
    return milliseconds, (torch.cuda.max_memory_allocated() - before) / GIB if CUDA else 0.0, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=BATCH)
    parser.add_argument("--size", default="832x480")
    args = parser.parse_args()
    width, height = (int(side) for side in args.size.split("x"))
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    torch.backends.cudnn.allow_tf32 = False  # the reference is in FP32
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "vae.safetensors"
        make_vae(file)
        weights = comfy.utils.load_torch_file(str(file))
        exact, network = (
            comfy.sd.VAE(sd=dict(weights), dtype=kind).first_stage_model.to(device, kind).eval()
            for kind in (torch.float32, dtype)
        )
        torch.manual_seed(1)
        inputs = {
            "encode": torch.rand(args.pictures, 3, 1, height, width, device=device) * 2 - 1,
            "decode": torch.randn(
                args.pictures,
                LATENT_CHANNELS,
                1,
                height // SPATIAL_DOWNSCALE,
                width // SPATIAL_DOWNSCALE,
                device=device,
            ),
        }
        name = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
        print(f"{name}, {args.pictures} pictures of {width}x{height}, {str(dtype).removeprefix('torch.')}\n")
        print("| way | part | ms a picture | peak GiB | error against FP32 |\n|---|---|---:|---:|---:|")
        for part, batch in inputs.items():
            reference = getattr(exact, part)(batch)
            for way, *modes in WAYS:
                with contextlib.ExitStack() as stack:
                    for mode in modes:
                        stack.enter_context(mode(network))
                    milliseconds, peak, result = measured(getattr(network, part), batch.to(dtype))
                error = (result.float() - reference).norm() / reference.norm()
                print(f"| {way} | {part} | {milliseconds:.2f} | {peak:.2f} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
