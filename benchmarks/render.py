"""The point-cloud render of 21 frames of 480x768 from 368 640 points, on the CPU and on the GPU, and whether they agree.

    python benchmarks/render.py

Wall times, the best of three after a first run that warms up.
"""

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import standalone

standalone.import_all()

# isort: split
import torch
from worldstereo_fp8.scene.camera_path import Move, move_on, pinhole
from worldstereo_fp8.scene.depth import points_from_depth
from worldstereo_fp8.scene.render import render

HEIGHT, WIDTH, FRAMES = 480, 768, 21
RUNS = 3


def scene():
    """A wavy floor that rises into the distance, without edges, so that every pixel gives a point; an orbit of 20°."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    depth = 3 + torch.sin(x / 90) * 0.5 - y / HEIGHT
    start = pinhole(WIDTH, HEIGHT, 680.0)
    picture = torch.rand(HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))
    cloud = points_from_depth(picture, depth, start.w2c[0], start.K[0])
    return cloud, move_on(start, Move("orbit left", 20.0, 0.0, FRAMES, "linear", "auto"), 3.0)


def seconds(cloud, cameras, device):
    """The best wall time, and the pictures and holes."""
    times = []
    for _ in range(1 + RUNS):
        start = time.perf_counter()
        pictures, holes = render(cloud, cameras, device=device)  # on the CPU when it returns
        times.append(time.perf_counter() - start)
    return min(times[1:]), pictures, holes


def main():
    cloud, cameras = scene()
    print(f"{len(cloud)} points, {FRAMES} frames of {WIDTH}x{HEIGHT}")
    time_cpu, pictures, holes = seconds(cloud, cameras, "cpu")
    print(f"CPU, {torch.get_num_threads()} threads: {time_cpu:.2f} s, {holes.mean():.1%} holes")
    if torch.cuda.is_available():
        time_gpu, gpu_pictures, gpu_holes = seconds(cloud, cameras, "cuda")
        print(
            f"{torch.cuda.get_device_name()}: {time_gpu:.3f} s; pictures differ by at most "
            f"{(gpu_pictures - pictures).abs().max():.1e}, holes in {(gpu_holes != holes).sum()} pixels"
        )


if __name__ == "__main__":
    main()
