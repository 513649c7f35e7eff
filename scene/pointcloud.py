"""Coloured point clouds in the cameras' world, and what other tools read: PLY, and a folder of frames with cameras."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.spatial import cKDTree

from .cameras import Cameras, rigid_inverse

OPENCV_TO_Y_UP = (1.0, -1.0, -1.0)  # y down, z forward to y up, z backward (glTF, three.js): half a turn about x
SPLAT_NEIGHBOURS, SPLAT_LIMIT = 3, 8.0


@dataclass(frozen=True, eq=False)
class PointCloud:
    """points [P, 3] float32 in the cameras' world (OpenCV axes), colors [P, 3] float32 in 0..1.

    Raises ValueError for shapes that do not match and for positions that are not finite.
    """

    points: torch.Tensor
    colors: torch.Tensor

    def __post_init__(self):
        if self.points.ndim != 2 or self.points.shape[1] != 3 or self.points.shape != self.colors.shape:
            raise ValueError(
                f"A point cloud needs points and colors of one shape [P, 3]; these are "
                f"{list(self.points.shape)} and {list(self.colors.shape)}."
            )
        if not self.points.isfinite().all():
            raise ValueError("The point cloud holds positions that are NaN or infinite; drop them first.")

    def __len__(self):
        return len(self.points)


def ply_bytes(cloud: PointCloud, y_up: bool) -> bytes:
    """The cloud as a binary PLY with 8-bit colours, in y-up axes as 3-D viewers expect, or in OpenCV's."""
    vertices = np.empty(len(cloud), [("position", "<f4", 3), ("color", "u1", 3)])
    vertices["position"] = cloud.points * torch.tensor(OPENCV_TO_Y_UP if y_up else (1.0, 1.0, 1.0))
    vertices["color"] = (cloud.colors * 255).round().clamp(0, 255)
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(cloud)}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {channel}" for channel in ("red", "green", "blue")),
        "end_header\n",
    ]
    return "\n".join(header).encode("ascii") + vertices.tobytes()


def splat_sizes(cloud: PointCloud) -> torch.Tensor:
    """The deviation [P] of a round Gaussian for each point that closes the surface between it and its neighbours: half
    the mean distance to the SPLAT_NEIGHBOURS nearest, at most SPLAT_LIMIT times the median. 0 in a cloud of one."""
    count = min(SPLAT_NEIGHBOURS, len(cloud) - 1)
    if count < 1:
        return torch.zeros(len(cloud))
    distance, _ = cKDTree(cloud.points.numpy()).query(cloud.points.numpy(), k=count + 1, workers=-1)
    size = torch.from_numpy(distance[:, 1:].mean(1) / 2).float()
    return size.clamp_max(SPLAT_LIMIT * size.median())


def write_world_mirror(folder: Path, frames: torch.Tensor, cameras: Cameras, progress) -> None:
    """Writes images/NNNNN.png and cameras.json into a new folder, in the layout of WorldMirror's camera prior: OpenCV
    camera-to-world matrices and intrinsics in pixels of the written pictures, each named by its picture.

    frames [N, H, W, 3] in 0..1. progress(1) is called after every picture. Raises ValueError where the counts differ.
    """
    if len(frames) != len(cameras):
        raise ValueError(f"There are {len(frames)} frames and {len(cameras)} cameras: each frame needs its own camera.")
    cameras = cameras.scaled_to(frames.shape[2], frames.shape[1])
    names = [f"{number:05}" for number in range(len(frames))]
    images = folder / "images"
    images.mkdir(parents=True)
    for name, frame in zip(names, frames):
        Image.fromarray((frame[..., :3] * 255).round().clamp(0, 255).byte().cpu().numpy()).save(images / f"{name}.png")
        progress(1)
    c2w = rigid_inverse(cameras.w2c)
    content = {
        "num_cameras": len(cameras),
        "extrinsics": [{"camera_id": name, "matrix": matrix} for name, matrix in zip(names, c2w.tolist())],
        "intrinsics": [{"camera_id": name, "matrix": matrix} for name, matrix in zip(names, cameras.K.tolist())],
    }
    (folder / "cameras.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
