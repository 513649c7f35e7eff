"""Camera paths from presets, the lens and pose they start with, and a drawing of the path."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..core import throw_exception_if_processing_interrupted, turbo
from ..files.text import shown
from .cameras import Cameras, centres, quaternion_to_rotation, rigid_inverse
from .depth import depth_of_moge, points_from_depth
from .level import guess_pitch
from .pictures import resize_pictures, within
from .pointcloud import OPENCV_TO_Y_UP, PointCloud

# Axes of the starting camera, except `vertical`, the world's y axis. Signs are in OpenCV's axes (y down).
AROUND_CENTRE = {
    "orbit left": ("vertical", 1),
    "orbit right": ("vertical", -1),
    "arc up": ("right", -1),
    "arc down": ("right", 1),
}
ON_THE_SPOT = {
    "pan left": ("vertical", -1),
    "pan right": ("vertical", 1),
    "tilt up": ("right", 1),
    "tilt down": ("right", -1),
    "roll clockwise": ("forward", 1),
    "roll counter-clockwise": ("forward", -1),
}
STRAIGHT = {
    "dolly in": ("forward", 1),
    "dolly out": ("forward", -1),
    "truck left": ("right", -1),
    "truck right": ("right", 1),
    "pedestal up": ("vertical", -1),
    "pedestal down": ("vertical", 1),
}
SPIRAL, ELLIPSE = "spiral", "ellipse loop"
ELLIPSE_RISE = 4 / 3  # the ellipse loop's height divided by its width
PRESETS = (*AROUND_CENTRE, *STRAIGHT, *ON_THE_SPOT, SPIRAL, ELLIPSE)

EASINGS = {
    "linear": lambda t: t,
    "ease in": lambda t: t * t,
    "ease out": lambda t: t * (2 - t),
    "ease in and out": lambda t: t * t * (3 - 2 * t),
}
LOOK_AT = ("auto", "on", "off")
LENSES = ("auto", "horizontal field of view (degrees)", "focal length (mm, full frame)")
DEFAULT_FOV = 60.0
POINTS_PIXELS = 1 << 21  # of a picture that becomes points to be drawn
LOOKED_AT = 1 << 21  # of more than twice as many points every second or so is drawn and measured
FULL_FRAME_WIDTH = 36.0  # mm


@dataclass(frozen=True)
class Move:
    """A preset and its settings: degrees if it turns, distance in units of the scene's depth if it travels."""

    preset: str
    degrees: float
    distance: float
    keyframes: int
    easing: str
    look_at_centre: str


def pinhole(width: int, height: int, focal: float, yaw: float = 0.0, pitch: float = 0.0) -> Cameras:
    """One camera at the origin of a level world. focal: in pixels; yaw (to the right) and pitch (up): in degrees."""
    K = torch.tensor([[[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]])
    c2w = torch.eye(4, dtype=torch.float64)[None]
    c2w[:, :3, :3] = _turn((0, 1, 0), [math.radians(yaw)]) @ _turn((1, 0, 0), [math.radians(pitch)])
    return Cameras(rigid_inverse(c2w), K, width, height)


def focal_length(lens: str, value: float, width: int) -> float:
    """The focal length in pixels for a picture `width` pixels wide. lens: one of LENSES; value: its degrees or mm.

    Raises ValueError for a field of view outside 0..180 degrees and a focal length that is not positive.
    """
    if lens == LENSES[2]:
        if value <= 0:
            raise ValueError(f"The focal length is {value} mm: it must be above 0.")
        return value / FULL_FRAME_WIDTH * width
    fov = DEFAULT_FOV if lens == LENSES[0] else value
    if not 0 < fov < 180:
        raise ValueError(f"The lens's field of view is {fov} degrees (lens_value): it must lie between 0 and 180.")
    return width / 2 / math.tan(math.radians(fov) / 2)


def camera_of_viewer(info: dict, width: int, height: int, lens: str, value: float) -> tuple[Cameras, float]:
    """The camera of core's 3-D viewer (LOAD3D_CAMERA) and its distance to the viewer's target.

    The viewer's world (y up, z backward) becomes OpenCV's by half a turn about x. The lens "auto" takes the viewer's
    vertical field of view and zoom. Raises ValueError for an orthographic camera and for values that cannot be used.
    """
    if info.get("cameraType") == "orthographic":
        raise ValueError("The 3-D viewer's camera is orthographic: switch it to perspective.")
    try:
        position, target = (
            torch.tensor([info[key][axis] for axis in "xyz"], dtype=torch.float64) for key in ("position", "target")
        )
        focal = focal_length(lens, value, width)
        if lens == LENSES[0] and "fov" in info:
            focal = height / 2 / math.tan(math.radians(info["fov"]) / 2) * info.get("zoom", 1.0)
        to_opencv = torch.tensor(OPENCV_TO_Y_UP, dtype=torch.float64)
        eye, centre = position * to_opencv, target * to_opencv
        if info.get("quaternion"):
            quaternion = torch.tensor([[info["quaternion"][axis] for axis in "wxyz"]], dtype=torch.float64)
            R = quaternion_to_rotation(quaternion) * to_opencv[:, None] * to_opencv
        else:
            R = _looking_at(eye[None], centre, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        raise ValueError(f"The 3-D viewer's camera_info (start) cannot be used: {shown(repr(error))}.") from error
    camera = pinhole(width, height, focal)
    return Cameras(_poses(R, eye[None]), camera.K, width, height), (centre - eye).norm().item()


def camera_of_moge(geometry: dict, width: int, height: int, lens: str, value: float, pitch: float) -> Cameras:
    """The camera, at the origin of a level world, that took the picture of core's MOGE_GEOMETRY. pitch: in degrees. The
    lens "auto" takes MoGe's estimate. Raises ValueError as `focal_length` does."""
    camera = pinhole(width, height, focal_length(lens, value, width), pitch=pitch)
    if lens != LENSES[0]:
        return camera
    K = geometry["intrinsics"][:1].float().cpu() * torch.tensor([width, height, 1.0])[:, None]
    return Cameras(camera.w2c, K, width, height)


def depth_of_scene(cloud: PointCloud, cameras: Cameras) -> float:
    """The median depth of the points that the last camera sees or, if it sees none, the first camera. Raises ValueError
    if neither sees any."""
    points = cloud.points[:: max(1, len(cloud) // LOOKED_AT)]
    for i in (-1, 0):
        x, y, z = cameras.w2c[i, :3, :3] @ points.T + cameras.w2c[i, :3, 3:]
        u, v, w = cameras.K[i] @ torch.stack([x, y, z])
        seen = (z > 0) & (u > 0) & (u < cameras.width * w) & (v > 0) & (v < cameras.height * w)
        if seen.any():
            return z[seen].median().item()
    raise ValueError("The camera sees none of the scene's points: check its pose, or give scene_depth.")


def move_on(start: Cameras, move: Move, depth: float) -> Cameras:
    """`start`, continued by the preset: a path of `keyframes` cameras, of which the first is the last of `start`.

    The centre of the scene lies straight ahead of that camera, at `depth`. Raises ValueError for fewer than 2
    keyframes, a depth that is not positive, and a path that looks at the centre straight from above or below.
    """
    if move.keyframes < 2:
        raise ValueError(f"keyframes is {move.keyframes}: a path needs at least 2.")
    if not depth > 0:
        raise ValueError(f"The scene's depth is {depth}: it must be above 0.")
    c2w = rigid_inverse(start.w2c[-1:].double())[0]
    R0, eye = c2w[:3, :3], c2w[:3, 3]
    right, down, forward = R0.T
    axes = {"right": right, "forward": forward, "vertical": right.new_tensor([0.0, 1.0, 0.0])}
    centre = eye + depth * forward
    t = EASINGS[move.easing](torch.linspace(0, 1, move.keyframes, dtype=torch.float64))
    reach = move.distance * depth
    looks = move.look_at_centre == "on" or (
        move.look_at_centre == "auto" and move.preset in (*AROUND_CENTRE, SPIRAL, ELLIPSE)
    )

    eyes, R = eye.expand(len(t), 3), R0.expand(len(t), 3, 3)
    if move.preset in AROUND_CENTRE or move.preset in ON_THE_SPOT:
        axis, sign = (AROUND_CENTRE | ON_THE_SPOT)[move.preset]
        turn = _turn(axes[axis], sign * math.radians(move.degrees) * t)
        if move.preset in AROUND_CENTRE:
            eyes = centre + turn @ (eye - centre)
        if move.preset in ON_THE_SPOT or looks:
            R = turn @ R0
    else:
        if move.preset in STRAIGHT:
            axis, sign = STRAIGHT[move.preset]
            offset = sign * t[:, None] * axes[axis]
        else:
            phase = 2 * math.pi * t[:, None]
            if move.preset == SPIRAL:
                offset = t[:, None] * (phase.sin() * right - phase.cos() * down)
            else:
                offset = phase.sin() * right - ELLIPSE_RISE * (1 - phase.cos()) * down
        eyes = eye + reach * offset
        if looks and not move.preset.startswith("dolly"):
            R = _looking_at(eyes, centre, down)
    w2c = torch.cat([start.w2c, _poses(R, eyes)[1:].float()])
    K = torch.cat([start.K, start.K[-1:].expand(len(t) - 1, -1, -1)])
    return Cameras(w2c, K, start.width, start.height)


def _turn(axis, angles) -> torch.Tensor:
    """Rotations [N, 3, 3] about a unit axis by angles [N] in radians, right-handed."""
    half = torch.as_tensor(angles, dtype=torch.float64)[:, None] / 2
    return quaternion_to_rotation(torch.cat([half.cos(), half.sin() * torch.as_tensor(axis, dtype=torch.float64)], 1))


def _looking_at(eyes, centre, down) -> torch.Tensor:
    """Camera-to-world rotations [N, 3, 3] that look from eyes [N, 3] at the centre, with the y axis as close to `down`
    as possible. Raises ValueError if `down` is parallel to the line of sight."""
    forward = torch.nn.functional.normalize(centre - eyes, dim=1)
    right = torch.linalg.cross(down.expand_as(forward), forward)
    if (right.norm(dim=1) < 1e-6).any():
        raise ValueError(
            "At some point the path looks at the centre of the scene straight from above or below, where no direction "
            "is up: shorten the path, or set look_at_centre to off."
        )
    right = torch.nn.functional.normalize(right, dim=1)
    return torch.stack([right, torch.linalg.cross(forward, right), forward], dim=2)


def _poses(R, eyes) -> torch.Tensor:
    """World-to-camera poses [N, 4, 4] of camera-to-world rotations and centres."""
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(eyes), 1, 1)
    c2w[:, :3, :3], c2w[:, :3, 3] = R, eyes
    return rigid_inverse(c2w)


@dataclass(frozen=True, eq=False)
class PathStart:
    """What a path for a picture starts from.

    image: the picture [1, H, W, C]. lens, lens_value: as for `focal_length`. scene_depth: 0 stands for the median depth
    of the scene, else the viewer's distance to its target, else 1. start_pitch: in degrees. scene: core's MOGE_GEOMETRY
    of the picture or a point cloud. start: cameras to continue, or core's LOAD3D_CAMERA. guess_pitch: estimate the pitch
    from the normals of MoGe's geometry instead of using start_pitch.
    """

    image: torch.Tensor
    lens: str
    lens_value: float
    scene_depth: float
    start_pitch: float
    scene: dict | PointCloud | None
    start: Cameras | dict | None
    guess_pitch: bool = False


def beginning(
    start: PathStart, points_size: tuple[int, int] | None = None
) -> tuple[Cameras, float, PointCloud | None, str]:
    """How a path begins: its first cameras, the scene's depth there, the scene's points, and the pitch that was assumed,
    in words ("" where none was).

    points_size: height and width that the picture is resized to before it becomes points; by default its own size, of at
    most POINTS_PIXELS. Raises ValueError for a lens, viewer camera or geometry that cannot be used, and if the camera
    sees none of the scene's points.
    """
    pitch, assumed = start.start_pitch, ""
    if start.guess_pitch and start.start is None:
        pitch, assumed = pitch_or_guess(pitch, start.scene)
    height, width = start.image.shape[1:3]
    lens, depth = (start.lens, start.lens_value), 1.0
    moge, cloud = (start.scene, None) if isinstance(start.scene, dict) else (None, start.scene)
    picture_depth = None if moge is None else depth_of_moge(moge)
    if isinstance(start.start, Cameras):
        first = start.start
    elif start.start is not None:
        first, depth = camera_of_viewer(start.start, width, height, *lens)
    elif moge is not None:
        first = camera_of_moge(moge, width, height, *lens, pitch)
    else:
        first = pinhole(width, height, focal_length(*lens, width), pitch=pitch)
    if moge is not None:
        picture = resize_pictures(start.image, *(points_size or within(height, width, POINTS_PIXELS)))
        K = first.scaled_to(picture.shape[2], picture.shape[1]).K[0]
        cloud = points_from_depth(picture[0], picture_depth, first.w2c[0], K)
    if start.scene_depth:
        depth = start.scene_depth
    elif cloud is not None:
        depth = depth_of_scene(cloud, first)
    return first, depth, cloud, assumed


def pitch_or_guess(start_pitch: float, scene: dict | PointCloud | None) -> tuple[float, str]:
    """The pitch in degrees, estimated from the normals of MoGe's geometry or, if that is not possible, start_pitch; and
    which of the two it is, in words."""
    found = guess_pitch(scene["normal"][0]) if isinstance(scene, dict) and "normal" in scene else None
    if found is None:
        return start_pitch, f"no pitch could be guessed: start_pitch, {start_pitch:g} degrees, is used"
    return found, f"estimated pitch of the camera: {found:+.0f} degrees"


def plan_path(start: PathStart, move: Move) -> tuple[Cameras, torch.Tensor, str]:
    """A path for a picture, its drawing [1, h, w, 3], and what was assumed, in words. Raises ValueError as `beginning`
    and `move_on` do."""
    first, depth, cloud, pitch = beginning(start)
    assumed = [pitch] if pitch else []
    if start.scene is None and not start.scene_depth and not isinstance(start.start, dict):
        assumed.append("no scene is connected, so its depth is assumed to be 1. Connect MoGe's geometry to scene")
        logging.warning("WorldStereo Camera Path: %s.", assumed[-1])
    else:
        assumed.append(f"scene depth {depth:.3g}")
    cameras = move_on(first, move, depth)
    return cameras, draw_path(cameras, depth, cloud), "\n".join(assumed)


def extent(cameras: Cameras) -> float:
    """The largest distance of a camera from the first one, in scene units, or 1 if none moves."""
    centre = centres(cameras.w2c)
    return (centre - centre[0]).norm(dim=1).max().item() or 1.0


# The drawing

PANEL = 512  # pixels, the side of each of the two views
MARGIN = 56
TEXT = 26  # still readable when a node shows the drawing at 40 %
DOT = 8  # radius of the marks at start and end
FRUSTA = 21  # more would hide each other
INK, PAPER, GRID = (225, 225, 225), (24, 24, 27), (70, 70, 75)


def draw_path(cameras: Cameras, depth: float, cloud: PointCloud | None = None) -> torch.Tensor:
    """The path from above and from the side, [1, PANEL, 2·PANEL, 3] in 0..1: cameras as frusta, coloured from the first
    (blue, "start") to the last (red, "end"), over the scene's points, with a scale bar in scene units. depth: the
    scene's, from which the frusta get their size."""
    views = [("from above", (0, 2), (1, -1)), ("from the side, forward to the right", (2, 1), (1, 1))]
    panels = []
    cameras = cameras.thinned(FRUSTA)
    frusta = _frusta(cameras, 0.12 * depth)
    if cloud is not None:
        every = max(1, len(cloud) // LOOKED_AT)
        cloud = PointCloud(cloud.points[::every], cloud.colors[::every])
    for title, axes, signs in views:
        throw_exception_if_processing_interrupted()
        sign = np.array(signs)
        lines = frusta[..., axes].numpy() * sign
        shown = lines.reshape(-1, 2)
        points = np.empty((0, 2))
        if cloud is not None and len(cloud):
            points = cloud.points[:, axes].numpy() * sign
            shown = np.concatenate([shown, np.quantile(points, [0.02, 0.98], axis=0)])
        low, high = shown.min(0), shown.max(0)
        scale = (PANEL - 2 * MARGIN) / max((high - low).max(), 1e-6)
        place = lambda xy, low=low, high=high, scale=scale: (xy - (low + high) / 2) * scale + PANEL / 2

        canvas = np.empty((PANEL, PANEL, 3), np.uint8)
        canvas[:] = PAPER
        if cloud is not None and len(cloud):
            pixel = place(points).astype(int)
            inside = ((pixel >= 0) & (pixel < PANEL)).all(1)
            canvas[pixel[inside, 1], pixel[inside, 0]] = cloud.colors[torch.from_numpy(inside)].mul(200).byte().numpy()
        image = Image.fromarray(canvas)
        draw = ImageDraw.Draw(image)
        colors = turbo(torch.linspace(0.1, 0.9, len(cameras))[:, None, None]).reshape(-1, 3).mul(255).byte().tolist()
        for line, color in zip(place(lines), colors):
            draw.line([tuple(xy) for xy in line], fill=tuple(color), width=2)
        track = [tuple(xy) for xy in place(lines[:, 0])]
        draw.line(track, fill=INK, width=2)
        font = ImageFont.load_default(TEXT)
        for name, (x, y), color in (("start", track[0], colors[0]), ("end", track[-1], colors[-1])):
            draw.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=tuple(color), outline=INK, width=2)
            above = name == "end"  # so that the two names do not cover each other
            place_of_name = (min(max(x, MARGIN), PANEL - MARGIN), y - DOT - 2 if above else y + DOT + 2)
            anchor = "ms" if above else "mt"
            draw.text(place_of_name, name, fill=INK, font=font, anchor=anchor, stroke_width=3, stroke_fill=PAPER)
        unit = 10 ** math.floor(math.log10((PANEL - 2 * MARGIN) / scale / 2))
        draw.line([(MARGIN, PANEL - 16), (MARGIN + unit * scale, PANEL - 16)], fill=INK, width=3)
        draw.text(
            (MARGIN, PANEL - 20), f"{unit:g}", fill=INK, font=font, anchor="ls", stroke_width=3, stroke_fill=PAPER
        )
        draw.text((12, 8), title, fill=INK, font=font, stroke_width=3, stroke_fill=PAPER)
        draw.line([(PANEL - 1, 0), (PANEL - 1, PANEL)], fill=GRID)
        panels.append(np.asarray(image))
    return torch.from_numpy(np.concatenate(panels, axis=1).astype(np.float32) / 255)[None]


def _frusta(cameras: Cameras, length: float) -> torch.Tensor:
    """One polyline per camera, [N, points, 3]: from its centre to its picture's corners at depth `length`, and
    around."""
    w, h = cameras.width, cameras.height
    corners = torch.tensor([[0.0, 0, 1], [w, 0, 1], [w, h, 1], [0, h, 1]])
    rays = (torch.linalg.inv(cameras.K) @ corners.T * length).mT
    centre = centres(cameras.w2c)[:, None]
    a, b, c, d = (rays @ cameras.w2c[:, :3, :3] + centre).unbind(1)
    o = centre[:, 0]
    return torch.stack([o, a, b, o, c, d, o, a, d, c, b], dim=1)
