"""Core's MultiGPU CFG Split: steps with cfg 5 on one GPU and on two, and whether the results are the same.

    python dev.py bench multigpu [--frames 21] [--references 8] [--size 832x480] [--folder DIR]

Random weights of the published shapes, FP8. Needs two GPUs of one kind.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from step import file_of, inputs, load, make_checkpoint, sample, unload  # makes ComfyUI and the pack importable

# isort: split
import comfy.multigpu
import torch

CFG = 5.0


def steps_of(patcher, args) -> tuple[torch.Tensor, float]:
    """The latent, and the median seconds of a step after the first, of a second run."""
    given = inputs(args.references, args.frames, args.size)
    for _ in range(2):
        stamps = []

        def callback(*_):
            for device in range(torch.cuda.device_count()):
                torch.cuda.synchronize(device)
            stamps.append(time.perf_counter())

        out = sample(patcher, *given, CFG, callback)
    return out, statistics.median(b - a for a, b in zip(stamps, stamps[1:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--references", type=int, default=8)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    if torch.cuda.device_count() < 2:
        sys.exit("The benchmark multigpu needs two CUDA GPUs.")
    path = file_of(args.folder, "fp8")
    make_checkpoint(path)
    patcher = load(path, "auto")
    one, seconds = steps_of(patcher, args)
    unload()
    both, faster = steps_of(comfy.multigpu.create_multigpu_deepclones(patcher, 2, reuse_loaded=True), args)
    print(
        f"{torch.cuda.get_device_name()}, cfg {CFG:g}, {args.size}, {args.frames} keyframes, {args.references} references\n\n"
        "| GPUs | step s | result |\n|---|---:|---|\n"
        f"| 1 | {seconds:.3f} | |\n| 2 | {faster:.3f} | {'the same bits' if torch.equal(one, both) else 'differs'} |"
    )
    return int(not torch.equal(one, both))


if __name__ == "__main__":
    sys.exit(main())
