"""A camera path flown by hand: its text, the smooth curve through its views, and what the viewer needs to show it.

The viewer draws the same curve: web/js/fly_curve.js repeats the formulas of this file, and a test checks that they
agree.

The text is JSON: {"keyframes": 21, "easing": "linear", "views": [{"position": [x, y, z], "rotation": [w, x, y, z]}]}.
Views are relative to the camera that the path starts from, which is the first view and is not in the text: positions in
its axes (OpenCV's: x right, y down, z forward) in units of the scene's depth, rotations as camera-to-start quaternions.
So the same text works with another picture.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..files import json
from ..files.text import shown
from .camera_path import EASINGS, PathStart, beginning, draw_path
from .cameras import LARGEST, Cameras, quaternion_to_rotation, rigid_inverse
from .pictures import as_bytes
from .pointcloud import PointCloud
from .render import RADIUS

MIN_KEYFRAMES, MAX_KEYFRAMES = 6, 21
MAX_VIEWS = 64
MAX_POSITION = 1000.0  # in units of the scene's depth
TEXT_LIMIT = 1 << 16  # bytes
VIEWER_POINTS = 300_000
SHORTEST_STEP = 1e-3  # the least time between two views, for those at the same place
DEFAULT_PATH = (  # an orbit to the right by 24 degrees
    '{"keyframes": 21, "easing": "ease in and out", "views": ['
    '{"position": [0.20791, 0, 0.02185], "rotation": [0.99452, 0, -0.10453, 0]}, '
    '{"position": [0.40674, 0, 0.08645], "rotation": [0.97815, 0, -0.20791, 0]}]}'
)


@dataclass(frozen=True, eq=False)
class FlyPath:
    """The number of keyframes, one of EASINGS, and the views, beginning with the start: positions [V, 3] and unit
    quaternions [V, 4] (real part first), float64."""

    keyframes: int
    easing: str
    positions: torch.Tensor
    rotations: torch.Tensor


def read_fly_path(text: str) -> FlyPath:
    """The path that a text describes. Raises ValueError, naming the view, for a text that is not a path."""
    content = json.parse(text, "The path", limit=TEXT_LIMIT)
    if not isinstance(content, dict):
        raise ValueError('The path is not a JSON object: write {"keyframes": 21, "easing": "linear", "views": [...]}.')
    _refuse_unknown(content, ("keyframes", "easing", "views"), "The path")
    keyframes, easing = content.get("keyframes", MAX_KEYFRAMES), content.get("easing", "linear")
    if type(keyframes) is not int or not MIN_KEYFRAMES <= keyframes <= MAX_KEYFRAMES:
        raise ValueError(
            f"The path's keyframes is {shown(repr(keyframes))}: give a whole number from {MIN_KEYFRAMES} to "
            f"{MAX_KEYFRAMES}."
        )
    if not isinstance(easing, str) or easing not in EASINGS:
        raise ValueError(f"The path's easing is {shown(repr(easing))}: it must be one of {', '.join(EASINGS)}.")
    views = content.get("views", [])
    if not isinstance(views, list) or len(views) > MAX_VIEWS:
        raise ValueError(f"The path's views must be a list of at most {MAX_VIEWS}.")
    positions, rotations = [[0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0, 0.0]]
    for number, view in enumerate(views, 1):
        where = f"View {number} of the path"
        if not isinstance(view, dict):
            raise ValueError(
                f'{where} is {shown(repr(view))}: write {{"position": [x, y, z], "rotation": [w, x, y, z]}}.'
            )
        _refuse_unknown(view, ("position", "rotation"), where)
        position = _numbers(view.get("position"), 3, f"{where}: position")
        if max(map(abs, position)) > MAX_POSITION:
            raise ValueError(
                f"{where}: position is {position}: no coordinate may exceed {MAX_POSITION:g} times the scene's depth."
            )
        rotation = _numbers(view.get("rotation"), 4, f"{where}: rotation")
        length = math.hypot(*rotation)
        if not 1e-3 < length < 1e3:
            raise ValueError(f"{where}: rotation is {rotation}: a quaternion (w, x, y, z) of length 1 is needed.")
        positions.append(position)
        rotations.append([value / length for value in rotation])
    return FlyPath(
        keyframes, easing, torch.tensor(positions, dtype=torch.float64), torch.tensor(rotations, dtype=torch.float64)
    )


def _refuse_unknown(content: dict, known: tuple[str, ...], where: str):
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{where} has an unknown entry {shown(repr(unknown[0]))}; known are {', '.join(known)}.")


def _numbers(value, count: int, where: str) -> list[float]:
    """A list of `count` finite numbers. Raises ValueError."""
    fine = isinstance(value, list) and len(value) == count
    if not fine or not all(type(v) in (int, float) and abs(v) < 1e100 for v in value):
        raise ValueError(f"{where} is {shown(repr(value))}: a list of {count} numbers is needed.")
    return [float(v) for v in value]


def fly(path: FlyPath) -> tuple[torch.Tensor, torch.Tensor]:
    """The keyframes along the path: positions [N, 3] and unit quaternions [N, 4], relative to the start.

    Positions: a centripetal Catmull-Rom curve (Yuksel, Schaefer, Keyser 2011) in its cubic Hermite form. A view's time
    is the sum of the square roots of the steps before it, a step being √(distance² + angle²): in a scene one unit deep,
    moving by x shifts the picture about as much as turning by x radians. Rotations: slerp.
    """
    p, q = path.positions, path.rotations
    if len(p) == 1:
        return p.expand(path.keyframes, 3), q.expand(path.keyframes, 4)
    q = _same_side(q)
    distance = (p[1:] - p[:-1]).norm(dim=1)
    angle = 2 * (q[1:] * q[:-1]).sum(1).clamp(max=1).acos()
    h = torch.hypot(distance, angle).sqrt().clamp(min=SHORTEST_STEP)  # the time of each step
    slope = (p[1:] - p[:-1]) / h[:, None]
    tangent = torch.empty_like(p)
    before, after = h[:-1, None], h[1:, None]
    tangent[1:-1] = (after * slope[:-1] + before * slope[1:]) / (before + after)
    if len(p) == 2:
        tangent[:] = slope
    else:
        tangent[0] = (3 * slope[0] - tangent[1]) / 2
        tangent[-1] = (3 * slope[-1] - tangent[-2]) / 2

    at = torch.cat([h.new_zeros(1), h.cumsum(0)])
    time = EASINGS[path.easing](torch.linspace(0, 1, path.keyframes, dtype=torch.float64)) * at[-1]
    i = (torch.searchsorted(at, time, right=True) - 1).clamp(0, len(h) - 1)
    s = ((time - at[i]) / h[i])[:, None]
    step = h[i, None]
    position = (
        (1 + 2 * s) * (1 - s) ** 2 * p[i]
        + s * (1 - s) ** 2 * step * tangent[i]
        + s * s * (3 - 2 * s) * p[i + 1]
        + s * s * (s - 1) * step * tangent[i + 1]
    )
    half = angle[i, None] / 2
    near = half < 1e-6  # where sin(half) vanishes, linear interpolation gives the same
    a = torch.where(near, 1 - s, ((1 - s) * half).sin() / half.sin())
    b = torch.where(near, s, (s * half).sin() / half.sin())
    rotation = a * q[i] + b * q[i + 1]
    return position, rotation / rotation.norm(dim=1, keepdim=True)


def _same_side(q: torch.Tensor) -> torch.Tensor:
    """Quaternions [V, 4] of the same rotations, with signs such that slerp takes the short way from each to the
    next."""
    side = torch.where((q[1:] * q[:-1]).sum(1) < 0, -1.0, 1.0).double().cumprod(0)
    return torch.cat([q[:1], q[1:] * side[:, None]])


def fly_on(start: Cameras, path: FlyPath, depth: float) -> Cameras:
    """`start`, continued by the path's keyframes, of which the first is the last of `start`. depth: the scene's, the
    unit of the path's positions."""
    position, rotation = fly(path)
    relative = torch.eye(4, dtype=torch.float64).repeat(path.keyframes, 1, 1)
    relative[:, :3, :3] = quaternion_to_rotation(rotation)
    relative[:, :3, 3] = position * depth
    w2c = rigid_inverse(rigid_inverse(start.w2c[-1:].double()) @ relative)
    K = start.K[-1:].expand(path.keyframes - 1, -1, -1)
    return Cameras(torch.cat([start.w2c, w2c[1:].float()]), torch.cat([start.K, K]), start.width, start.height)


@dataclass(frozen=True, eq=False)
class ViewerScene:
    """What the viewer draws, in the axes of the camera that the path starts from and in units of the scene's depth.

    points: P records of 16 bytes, little-endian: x, y, z as float32, then red, green, blue and 255 as bytes. info, for
    JSON: their number, the radius of a point in units in which the shorter side of the picture is 2, the size of the
    render in pixels, the lens in units of that size, and the up direction.
    """

    points: bytes
    info: dict


def viewer_scene(
    cloud: PointCloud | None, camera: Cameras, depth: float, width: int, height: int, spacing: float = 1.0
) -> ViewerScene:
    """The scene for the viewer of a width x height render. The path starts at the last of the cameras.

    spacing: the distance between the points, as a multiple of that in the render. A cloud of more than VIEWER_POINTS is
    thinned. Points are drawn larger by the factor by which they are farther apart, so that holes keep their size.
    """
    pose = camera.w2c[-1].double()
    lens = camera.K[-1].double() / torch.tensor([[camera.width], [camera.height], [1]])
    info = {
        "count": 0,
        "radius": RADIUS,
        "width": width,
        "height": height,
        "lens": [lens[0, 0].item(), lens[1, 1].item(), lens[0, 2].item(), lens[1, 2].item()],
        "up": (-pose[:3, 1]).tolist(),
    }
    if cloud is None:
        return ViewerScene(b"", info)
    points, colors = cloud.points, cloud.colors
    if len(cloud) > VIEWER_POINTS:
        # A random point from each of VIEWER_POINTS equal parts of the list. A random permutation of 33 million points
        # takes seconds.
        place = torch.rand(VIEWER_POINTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        chosen = ((torch.arange(VIEWER_POINTS) + place) * (len(cloud) / VIEWER_POINTS)).long()
        points, colors = points[chosen], colors[chosen]
    records = np.empty(len(points), [("position", "<f4", 3), ("color", "u1", 4)])
    records["position"] = ((points.double() @ pose[:3, :3].T + pose[:3, 3]) / depth).clamp(-LARGEST, LARGEST).numpy()
    records["color"] = 255
    records["color"][:, :3] = as_bytes(colors)
    info |= {"count": len(points), "radius": RADIUS * spacing * math.sqrt(len(cloud) / max(len(points), 1))}
    return ViewerScene(records.tobytes(), info)


def plan_flight(start: PathStart, text: str, width: int, height: int) -> tuple[Cameras, torch.Tensor, ViewerScene]:
    """The path that `text` describes for a picture, its drawing [1, h, w, 3], and the viewer's scene.

    width, height: of the render. Raises ValueError for bad text, and as `camera_path.beginning` does.
    """
    path = read_fly_path(text)
    # A picture is reduced to as many points as the viewer takes. Evenly spaced points keep the holes where they are.
    spacing = max(1.0, math.sqrt(width * height / VIEWER_POINTS)) if isinstance(start.scene, dict) else 1.0
    size = int(height / spacing), int(width / spacing)
    first, depth, cloud, assumed = beginning(start, size)
    cameras = fly_on(first, path, depth)
    shown = viewer_scene(cloud, first, depth, width, height, spacing)
    shown.info["assumed"] = assumed
    return cameras, draw_path(cameras, depth, cloud), shown
