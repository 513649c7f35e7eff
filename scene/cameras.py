"""Cameras: the one representation of a camera path, its camera.json, and the model's inputs computed from it.

Axes are OpenCV's everywhere: x right, y down, z forward. `w2c` takes world coordinates to camera coordinates.
"""

import json
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import throw_exception_if_processing_interrupted
from ..files.atomic import new_file
from ..files.text import shown

RIGID_TOLERANCE = 1e-3
LARGEST = 1e12  # number in a pose or lens: float32, in which both are kept, can still represent products and squares
SMALLEST_FOCAL = 1e-3  # pixels
MAX_SIDE = 1 << 16  # pixels of a camera's picture
MAX_CAMERAS = 10_000  # of a path or a file
CAMERA_0_DISTANCE = 2.0  # of camera 0 from the centre of the path, after normalisation
OUTLIER_FACTOR = 10.0  # outliers are farther from the median centre than this times OUTLIER_QUANTILE of the distances
OUTLIER_QUANTILE = 0.97


def thin(count: int, wanted: int) -> torch.Tensor:
    """The indices [n] of at most `wanted` of `count` frames: linspace(0, count - 1, wanted), truncated, as WorldStereo
    thins its videos. It must be NumPy's linspace, as there: where the exact value is whole, its rounding decides."""
    return torch.from_numpy(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))


def centres(w2c: torch.Tensor) -> torch.Tensor:
    """The camera centres [..., 3] in world coordinates, of poses [..., 4, 4]."""
    return -(w2c[..., :3, :3].mT @ w2c[..., :3, 3:]).squeeze(-1)


def rigid_inverse(poses: torch.Tensor) -> torch.Tensor:
    """The inverses [..., 4, 4] of rigid poses: camera-to-world of world-to-camera and back."""
    inverse = torch.zeros_like(poses)
    inverse[..., :3, :3] = poses[..., :3, :3].mT
    inverse[..., :3, 3] = centres(poses)
    inverse[..., 3, 3] = 1
    return inverse


@dataclass(frozen=True, eq=False)
class Cameras:
    """N cameras of one width x height picture.

    w2c [N, 4, 4]: rigid world-to-camera poses. K [N, 3, 3]: intrinsics in pixels, where the picture spans 0..width and
    0..height, so that a centred principal point is (width / 2, height / 2). Both are checked in float64 and kept in
    float32. Raises ValueError, naming the camera, for poses and intrinsics that are not those of a pinhole camera.
    """

    w2c: torch.Tensor
    K: torch.Tensor
    width: int
    height: int

    def __post_init__(self):
        w2c = torch.as_tensor(self.w2c, dtype=torch.float64, device="cpu")
        K = torch.as_tensor(self.K, dtype=torch.float64, device="cpu")
        if w2c.ndim != 3 or w2c.shape[1:] != (4, 4) or len(w2c) == 0:
            raise ValueError(
                f"The poses have the shape {list(w2c.shape)}: give one or more 4x4 world-to-camera matrices, [N, 4, 4]."
            )
        if K.shape != (len(w2c), 3, 3):
            raise ValueError(
                f"The intrinsics have the shape {list(K.shape)}: {len(w2c)} poses need one 3x3 matrix "
                f"each, [{len(w2c)}, 3, 3]."
            )
        if not all(type(side) is int and 0 < side <= MAX_SIDE for side in (self.width, self.height)):
            raise ValueError(
                f"The picture size {shown(self.width)}x{shown(self.height)} cannot be used: give whole numbers from 1 "
                f"to {MAX_SIDE}, the size that the intrinsics are in pixels of."
            )

        R = w2c[:, :3, :3]
        gram_error = (R @ R.mT - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
        last_rows = w2c.new_tensor([0, 0, 0, 1])
        checks = [
            (w2c.isfinite().all((1, 2)), "its pose holds NaN or infinity"),
            (K.isfinite().all((1, 2)), "its intrinsics hold NaN or infinity"),
            ((w2c.abs() < LARGEST).all((1, 2)), f"its pose holds a number of {LARGEST:g} or more; use a larger unit"),
            ((K.abs() < LARGEST).all((1, 2)), f"its intrinsics hold a number of {LARGEST:g} or more pixels"),
            ((w2c[:, 3] == last_rows).all(1), "the last row of its pose is not 0 0 0 1 (transposed?)"),
            (gram_error <= RIGID_TOLERANCE, "its rotation is not orthonormal; remove scale and shear from the pose"),
            (R.det() > 0, "its rotation mirrors the world (determinant -1); convert the pose to OpenCV axes"),
            ((K[:, 0, 0] > 0) & (K[:, 1, 1] > 0), "its focal length is not positive; give fx and fy above 0"),
            (K.diagonal(dim1=1, dim2=2).amin(1) > SMALLEST_FOCAL, f"its focal length is below {SMALLEST_FOCAL} pixels"),
            (K[:, 1, 0] == 0, "the first number of the second row of its intrinsics is not 0"),
            ((K[:, 2] == last_rows[1:]).all(1), "the last row of its intrinsics is not 0 0 1 (transposed?)"),
        ]
        for good, problem in checks:
            if not good.all():
                raise ValueError(f"Camera {good.int().argmin().item()} of {len(w2c)} (the first is 0): {problem}.")
        object.__setattr__(self, "w2c", w2c.float())
        object.__setattr__(self, "K", K.float())

    def __len__(self):
        return len(self.w2c)

    @property
    def fov(self) -> torch.Tensor:
        """Each camera's horizontal field of view in degrees, [N]."""
        return torch.rad2deg(2 * torch.atan(self.width / 2 / self.K[:, 0, 0]))

    def __getitem__(self, index):
        """The cameras at a slice, a list of indices or one index, as Cameras. Raises IndexError for one out of
        range."""
        index = [index] if isinstance(index, int) else index
        return Cameras(self.w2c[index], self.K[index], self.width, self.height)

    def scaled_to(self, width, height):
        """The same cameras for the picture resized to width x height: intrinsics scaled on each axis."""
        scale = self.K.new_tensor([width / self.width, height / self.height, 1.0])
        return Cameras(self.w2c, self.K * scale[:, None], width, height)

    def thinned(self, count):
        """At most `count` cameras, the first and last among them; see `thin`."""
        return self[thin(len(self), count)]

    def of_frames(self, count):
        """The camera of each of `count` frames of a clip: `thinned` if there are more. Raises ValueError for fewer."""
        if len(self) < count:
            raise ValueError(f"There are {count} images and {len(self)} cameras: each keyframe needs its own camera.")
        return self.thinned(count)


def cameras_from_json(content: object) -> Cameras:
    """Cameras of the parsed content of a camera.json. Raises ValueError."""
    if not isinstance(content, dict) or not {"extrinsic", "intrinsic"} <= content.keys():
        raise ValueError("It has no `extrinsic` and `intrinsic` lists of matrices.")
    for key in ("extrinsic", "intrinsic"):
        check_count(content[key])
    w2c, K = json_matrices(content, "extrinsic"), json_matrices(content, "intrinsic")
    if K.shape[1:] != (3, 3) or len(K) == 0:
        raise ValueError(f"`intrinsic` has the shape {list(K.shape)}: it must be one 3x3 matrix for each pose.")
    width, height = (content.get(key, 2 * K[0, axis, 2].item()) for axis, key in enumerate(("width", "height")))
    return Cameras(w2c, K, json_size(width, "width"), json_size(height, "height"))


def check_count(entries: object) -> None:
    """Raises ValueError for a list of more than MAX_CAMERAS entries."""
    if isinstance(entries, list) and len(entries) > MAX_CAMERAS:
        raise ValueError(f"It holds {len(entries)} cameras; at most {MAX_CAMERAS} are read.")


def check_lengths(message: str, **lists: Sized) -> None:
    """Raises ValueError where lists that hold one entry a view differ in length; `message` has a {} for the lengths."""
    if len({len(entries) for entries in lists.values()}) > 1:
        raise ValueError(message.format(", ".join(f"{name} {len(entries)}" for name, entries in lists.items())))


def json_matrices(content: dict, key: str) -> torch.Tensor:
    """content[key], nested lists of numbers, as a float64 tensor. Raises ValueError."""
    try:
        return torch.tensor(content[key], dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"`{key}` is not a list of matrices of one size: {shown(error)}.") from error


def json_size(value: Any, key: str) -> int:
    """A picture size in whole pixels. Raises ValueError."""
    if type(value) not in (int, float) or not 0.5 <= value <= MAX_SIDE:
        raise ValueError(
            f"`{key}` is {shown(repr(value))}: it must be the size of the picture, 1 to {MAX_SIDE} pixels."
        )
    return max(1, round(value))  # 0.5 is rounded to 0


def write_camera_json(path: Path, cameras: Cameras) -> None:
    """Writes the cameras as camera.json, with the picture's width and height. The file appears only when it is
    complete.

    Raises FileExistsError if the name is taken, and OSError, naming the file and the cause.
    """
    with new_file(path) as file:
        for key, matrices in (("extrinsic", cameras.w2c), ("intrinsic", cameras.K)):
            opening = "{" if key == "extrinsic" else ""
            file.write(f'{opening}"{key}": [\n'.encode())
            for number, matrix in enumerate(matrices):  # one by one: as JSON all of them take many times their memory
                throw_exception_if_processing_interrupted()
                file.write((",\n" if number else "").encode() + json.dumps(matrix.tolist()).encode())
            file.write(b"\n],\n")
        file.write(f'"width": {cameras.width}, "height": {cameras.height}}}\n'.encode())


def normalise(w2c: torch.Tensor, targets: int | None = None) -> torch.Tensor:
    """Poses [N, 4, 4] in the frame and scale that the weights were trained with, in float64.

    The world's axes become those of camera 0, its origin the mean camera centre (without outliers), and the distance of
    camera 0 from there becomes 2. Mean and scale come from the first `targets` poses (default: all), so that references
    can be appended to their targets.
    """
    w2c = w2c.double()
    w2c = w2c @ rigid_inverse(w2c[0])
    centre = centres(w2c)
    target_centre = centre[:targets]
    distance = (target_centre - target_centre.median(0).values).norm(dim=-1)
    near = distance <= OUTLIER_FACTOR * distance.quantile(OUTLIER_QUANTILE)
    centre = centre - target_centre[near].mean(0)
    radius = centre[0].norm()
    scale = CAMERA_0_DISTANCE if radius <= 1e-5 else CAMERA_0_DISTANCE / radius
    normalised = w2c.clone()
    normalised[:, :3, 3:] = -w2c[:, :3, :3] @ (centre * scale).unsqueeze(-1)
    return normalised


def plucker(
    w2c: torch.Tensor, K: torch.Tensor, height: int, width: int, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """The Plücker coordinates of every pixel's ray, [6, N, height, width] float32: unit direction d, then moment o x d,
    in world axes.

    w2c [N, 4, 4] from `normalise`, K [N, 3, 3] in pixels of the width x height picture. A ray goes through
    (x - 0.5, y + 0.5) for the pixel in column x and row y; the weights were trained with that -0.5. The result is on
    `device`, or on the CPU if that is another kind of GPU than CUDA's.
    """
    device, w2c, K = float64_device(device), w2c.double(), K.double()
    to_rays, origin = w2c[:, :3, :3].mT @ torch.linalg.inv(K), centres(w2c)[:, :, None].expand(-1, 3, 3)
    to_lines = torch.cat([to_rays, torch.linalg.cross(origin, to_rays, dim=1)], dim=1)  # the moment is linear too
    of_x, of_y, of_one = to_lines.to(device)[..., None, None].unbind(2)
    x = torch.arange(width, dtype=torch.float64, device=device) - 0.5
    y = torch.arange(height, dtype=torch.float64, device=device)[:, None] + 0.5
    rays = torch.empty(6, len(w2c), height, width, device=device)
    for camera in range(len(w2c)):  # one by one: the float64 intermediates of all would take many times the result
        throw_exception_if_processing_interrupted()
        lines = (of_x[camera] * x + of_one[camera]) + of_y[camera] * y
        lines /= lines[:3].square().sum(0).sqrt()  # norm(dim=0) takes ten times as long
        rays[:, camera] = lines
    return rays


def float64_device(device: str | torch.device) -> torch.device:
    """The device, if it is a CUDA GPU; otherwise the CPU, because not every other GPU has float64."""
    device = torch.device(device)
    return device if device.type == "cuda" else torch.device("cpu")


def quaternions_and_translations(w2c: torch.Tensor) -> torch.Tensor:
    """[N, 7] float32: the unit quaternion of each pose's rotation (real part first, >= 0) and its translation."""
    return torch.cat([rotation_to_quaternion(w2c[:, :3, :3]), w2c[:, :3, 3]], dim=1).float()


def rotation_to_quaternion(R: torch.Tensor) -> torch.Tensor:
    """Unit quaternions [N, 4] (w, x, y, z; w >= 0) of rotations [N, 3, 3].

    The matrix 4·q·qᵀ is linear in R. Its row with the largest diagonal element is q up to scale, without cancellation.
    """
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = R.permute(1, 2, 0)
    outer = torch.stack(
        [
            torch.stack([1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01]),
            torch.stack([m21 - m12, 1 + m00 - m11 - m22, m10 + m01, m02 + m20]),
            torch.stack([m02 - m20, m10 + m01, 1 - m00 + m11 - m22, m21 + m12]),
            torch.stack([m10 - m01, m02 + m20, m21 + m12, 1 - m00 - m11 + m22]),
        ]
    ).permute(2, 0, 1)
    largest = outer.diagonal(dim1=1, dim2=2).argmax(1)
    quaternion = outer[torch.arange(len(R)), largest]
    quaternion = quaternion / quaternion.norm(dim=1, keepdim=True)
    return torch.where(quaternion[:, :1] < 0, -quaternion, quaternion)


def quaternion_to_rotation(quaternion: torch.Tensor) -> torch.Tensor:
    """Rotations [N, 3, 3] of quaternions [N, 4] (w, x, y, z) of any length but 0."""
    w, x, y, z = (quaternion / quaternion.norm(dim=1, keepdim=True)).T
    return torch.stack(
        [
            torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]),
            torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]),
            torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]),
        ]
    ).permute(2, 0, 1)
