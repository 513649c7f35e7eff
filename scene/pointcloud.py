"""Coloured point clouds in the cameras' world, and formats that other tools read: PLY, and a folder of frames with
cameras."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from scipy.spatial import cKDTree

from ..core import throw_exception_if_processing_interrupted
from ..files.atomic import new_file, new_folder
from ..files.regular import open_regular
from ..files.text import shown
from .cameras import Cameras, rigid_inverse
from .pictures import as_bytes, write_png
from .stop import pieces, stoppable

OPENCV_TO_Y_UP = (1.0, -1.0, -1.0)  # y down, z forward to y up, z backward (glTF, three.js): half a turn about x
PLY_LIMIT, PLY_HEADER = 512 << 20, 1 << 16  # bytes
PLY_POINTS, PLY_PIECE = 20_000_000, 1 << 18  # read at most, and at a time
PIECE = 1 << 20  # points looked at or written at a time
PLY_TYPES = {
    **{name: f"<{kind}" for name, kind in (("float", "f4"), ("float32", "f4"), ("double", "f8"), ("float64", "f8"))},
    **{name: f"<{kind}" for name, kind in (("char", "i1"), ("uchar", "u1"), ("int8", "i1"), ("uint8", "u1"))},
    **{name: f"<{kind}" for name, kind in (("short", "i2"), ("ushort", "u2"), ("int", "i4"), ("uint", "u4"))},
    **{name: f"<{kind}" for name, kind in (("int16", "i2"), ("uint16", "u2"), ("int32", "i4"), ("uint32", "u4"))},
}
SPLAT_NEIGHBOURS, SPLAT_LIMIT = 3, 8.0
NEIGHBOUR_PIECE = 1 << 16  # points whose neighbours are looked for at a time
LEAF = 64  # points in a leaf of the tree: with SciPy's 16, building it takes a third more time
SPREAD = 1e-10  # of the cloud's extent: by how much points are moved apart for that


@dataclass(frozen=True, eq=False)
class PointCloud:
    """points [P, 3] float32 in the cameras' world (OpenCV axes), colors [P, 3] float32 in 0..1.

    Raises ValueError for shapes that do not match and numbers that are not finite.
    """

    points: torch.Tensor
    colors: torch.Tensor

    def __post_init__(self):
        if self.points.ndim != 2 or self.points.shape[1] != 3 or self.points.shape != self.colors.shape:
            raise ValueError(
                f"A point cloud needs points and colors of one shape [P, 3]; these are "
                f"{list(self.points.shape)} and {list(self.colors.shape)}."
            )
        for what, values in (("positions", self.points), ("colours", self.colors)):
            for part in values.split(PIECE):  # of all points at once it would take twice as much as they do
                throw_exception_if_processing_interrupted()
                if not part.isfinite().all():
                    raise ValueError(f"The point cloud holds {what} that are NaN or infinite; drop them first.")

    def __len__(self):
        return len(self.points)


def write_ply(file: BinaryIO, cloud: PointCloud, y_up: bool) -> None:
    """Writes the cloud as a binary PLY with 8-bit colours: in y-up axes, which 3-D viewers expect, or in OpenCV's."""
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(cloud)}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {channel}" for channel in ("red", "green", "blue")),
        "end_header\n",
    ]
    file.write("\n".join(header).encode("ascii"))
    axes = torch.tensor(OPENCV_TO_Y_UP if y_up else (1.0, 1.0, 1.0))
    for points, colors in zip(cloud.points.split(PIECE), cloud.colors.split(PIECE)):
        throw_exception_if_processing_interrupted()
        vertices = np.empty(len(points), [("position", "<f4", 3), ("color", "u1", 3)])
        vertices["position"] = points * axes
        vertices["color"] = as_bytes(colors)
        file.write(vertices.tobytes())


def save_ply(path: Path, cloud: PointCloud, y_up: bool) -> None:
    """`write_ply` into a new file, which appears only when it is complete. Raises as `new_file` does."""
    with new_file(path) as file:
        write_ply(file, cloud, y_up)


def read_ply(path: Path) -> PointCloud:
    """The vertices of a binary little-endian PLY: x, y, z and, if it has them, red, green, blue in bytes (else grey).

    Raises ValueError, naming the file, for any other PLY and for one that is cut short or too large, and OSError.
    """
    name = shown(path.name)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > PLY_LIMIT:
            raise ValueError(f"{name} has {size} bytes; more than {PLY_LIMIT} are not read.")
        head, found, _ = file.read(PLY_HEADER).partition(b"end_header\n")
        lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
        elements = [line for line in lines if line[:1] == ["element"]]
        if not found or lines[:1] != [["ply"]] or ["format", "binary_little_endian", "1.0"] not in lines:
            raise ValueError(f"{name} is not a binary little-endian PLY. Save the points in that format.")
        try:
            if elements[0][1] != "vertex":
                raise ValueError("its first element is not vertex")
            first = lines.index(elements[0]) + 1
            last = lines.index(elements[1]) if len(elements) > 1 else len(lines)
            fields = [(line[2], PLY_TYPES[line[1]]) for line in lines[first:last] if line[:1] == ["property"]]
            count, start = int(elements[0][2][:12]), len(head) + len(found)
            return _read_vertices(file, np.dtype(fields), count, start, size)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{name} cannot be read as points: {shown(error, 300)}.") from error


def _read_vertices(file: BinaryIO, vertex: np.dtype, count: int, start: int, size: int) -> PointCloud:
    """Reads `count` vertices, which start at the byte `start` of a file of `size` bytes, PLY_PIECE at a time."""
    if not 0 <= count <= PLY_POINTS:
        raise ValueError(f"it has {count} points; at most {PLY_POINTS} are read")
    if start + count * vertex.itemsize > size:
        raise ValueError(f"it is cut short: {count} points of {vertex.itemsize} bytes each do not fit in it")
    channels = ("red", "green", "blue")
    coloured = set(channels) <= set(vertex.names or ())
    points, colors = np.empty((count, 3), np.float32), np.full((count, 3), 0.5, np.float32)
    file.seek(start)
    for part in pieces(count, PLY_PIECE):
        wanted = part.stop - part.start
        piece = np.frombuffer(file.read(wanted * vertex.itemsize), vertex, wanted)
        for column, axis in enumerate("xyz"):
            points[part, column] = piece[axis]
        for column, channel in enumerate(channels if coloured else ()):
            colors[part, column] = piece[channel]
    if coloured:
        np.clip(np.divide(colors, 255, out=colors), 0, 1, out=colors)
    return PointCloud(torch.from_numpy(points), torch.from_numpy(colors))


def splat_sizes(cloud: PointCloud) -> torch.Tensor:
    """The standard deviation [P] of a round Gaussian for each point that closes the surface to its neighbours: half the
    mean distance to the SPLAT_NEIGHBOURS nearest, at most SPLAT_LIMIT times the median. 0 in a cloud of one point."""
    count = min(SPLAT_NEIGHBOURS, len(cloud) - 1)
    if count < 1:
        return torch.zeros(len(cloud))
    size = neighbour_distances(cloud.points, count) / 2
    return size.clamp_max(SPLAT_LIMIT * stoppable(torch.median, size))


def neighbour_distances(points: torch.Tensor, count: int, start: int = 0) -> torch.Tensor:
    """The mean distance [P - start] of each of points[start:] to its `count` nearest neighbours among all points
    [P, 3], where count < P."""
    low, high = (corner.double() for corner in stoppable(partial(torch.aminmax, dim=0), points))
    # Points in one place would share a leaf of the tree, where every query would be compared with each of them.
    spread, random = SPREAD * ((high - low).max().item() or 1.0), np.random.default_rng(0)
    places = np.empty(points.shape)
    for part in pieces(len(places), PIECE):
        places[part] = (points[part] - low).numpy() + random.uniform(0, spread, places[part].shape)
    tree = stoppable(partial(cKDTree, leafsize=LEAF, balanced_tree=False, compact_nodes=False), places)
    mean = torch.empty(len(places) - start)
    for part in pieces(len(mean), NEIGHBOUR_PIECE):
        # In a thread: on a busy machine the library's own threads wait for seconds.
        distance, _ = stoppable(partial(tree.query, k=count + 1, workers=-1), places[start:][part])
        mean[part] = torch.from_numpy(distance)[:, 1:].mean(1)
    return mean


def world_mirror(names: list[str], c2w: torch.Tensor, K: torch.Tensor) -> dict:
    """The content of WorldMirror's cameras.json, of camera-to-world poses [N, 4, 4] in OpenCV axes and intrinsics
    [N, 3, 3] in pixels."""
    return {
        "num_cameras": len(names),
        "extrinsics": [{"camera_id": name, "matrix": matrix} for name, matrix in zip(names, c2w.tolist())],
        "intrinsics": [{"camera_id": name, "matrix": matrix} for name, matrix in zip(names, K.tolist())],
    }


def write_world_mirror(folder: Path, frames: torch.Tensor, cameras: Cameras, progress: Callable[[int], object]) -> None:
    """Writes images/NNNNN.png and cameras.json into a new folder, in the format of WorldMirror's camera prior: OpenCV
    camera-to-world matrices and intrinsics in pixels of the written pictures, each with its picture's name as id. The
    folder appears only when it is complete.

    frames [N, H, W, 3] in 0..1. progress(1) is called after every picture. Raises ValueError if the counts differ,
    FileExistsError if the name is taken, and OSError, naming the folder and the cause.
    """
    if len(frames) != len(cameras):
        raise ValueError(f"There are {len(frames)} frames and {len(cameras)} cameras: each frame needs its own camera.")
    cameras = cameras.scaled_to(frames.shape[2], frames.shape[1])
    names = [f"{number:05}" for number in range(len(frames))]
    with new_folder(folder) as new:
        (new / "images").mkdir()
        for name, frame in zip(names, frames):
            write_png(new / "images" / f"{name}.png", stoppable(as_bytes, frame[..., :3]).cpu())
            progress(1)
        content = world_mirror(names, rigid_inverse(cameras.w2c), cameras.K)
        (new / "cameras.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
