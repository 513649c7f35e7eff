"""An equirectangular panorama as a start: its points from core's panorama MoGe, and pinhole pictures taken from it.

The panorama's middle looks along z of a level OpenCV world; its left and right edges meet behind. Core's point map is
in a world with z up in which the panorama's middle looks along -x (comfy/ldm/moge/panorama.py,
spherical_uv_to_directions).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from ..core import throw_exception_if_processing_interrupted
from .cameras import Cameras
from .depth import points_kept
from .pointcloud import PointCloud
from .render import RADIUS
from .stop import pieces, stoppable

WHOLE = 0.01  # by how much of its width a panorama may differ from twice its height
ROWS = 256  # of a panorama that become points, and of a view that are computed, at a time
NEARER = 2.0  # the factor by which things may come nearer than at the start before gaps open


def directions(height: int, width: int, rows: slice = slice(None)) -> torch.Tensor:
    """The unit rays [H, W, 3] of an equirectangular picture's pixel centres, in OpenCV axes; or those of some rows."""
    longitude = ((torch.arange(width) + 0.5) / width - 0.5) * 2 * math.pi
    elevation = (0.5 - (torch.arange(height)[rows, None] + 0.5) / height) * math.pi
    x, y, z = elevation.cos() * longitude.sin(), -elevation.sin(), elevation.cos() * longitude.cos()
    return torch.stack([x, y.expand_as(x), z], dim=-1)


def points_of_panorama(geometry: dict) -> PointCloud:
    """The points of core's MOGE_GEOMETRY of a panorama, whose depth is the distance along the ray, by the rules of
    `depth.points_from_depth`. Raises ValueError for the geometry of an ordinary picture and if no distance is valid."""
    if missing := [part for part in ("mask", "image") if part not in geometry]:
        raise ValueError(f"The MoGe geometry of a panorama has no {missing[0]}: run MoGe Panorama Inference.")
    if "intrinsics" in geometry:
        raise ValueError(
            "This MoGe geometry is an ordinary picture's: connect it to WorldStereo Render, or run MoGe Panorama "
            "Inference on the panorama."
        )
    distance, picture = geometry["depth"][0].float().cpu(), geometry["image"][0].float().cpu()
    keep, kept = points_kept(distance.where(geometry["mask"][0].cpu(), torch.inf))
    height, width = distance.shape
    points, colors, done = torch.empty(len(kept), 3), torch.empty(len(kept), 3), 0
    for rows in pieces(len(keep), ROWS):  # the rays of all pixels would take as much as the points
        here = slice(done, done + int(keep[rows].sum()))
        points[here] = directions(height, width, rows)[keep[rows]] * kept[here, None]
        colors[here] = picture[rows][keep[rows]]
        done = here.stop
    return PointCloud(points, colors)


def too_coarse(panorama_width: int, camera: Cameras) -> str | None:
    """A remark on a panorama whose points lie so far apart that the splats in renders of the (first) camera leave gaps
    once it has come half-way to what it sees. None if the panorama is wide enough. panorama_width: in pixels."""
    focal, side = camera.K[0, 0, 0].item(), min(camera.width, camera.height)
    gap = 2 * math.pi * focal / panorama_width  # pixels between points in the middle of the view
    wanted = math.ceil(2 * math.pi * focal * NEARER * math.sqrt(2) / (RADIUS * side))
    if panorama_width >= wanted:
        return None
    return (
        f"the panorama is {panorama_width} pixels wide: in this view its points are {gap:.1f} pixels apart, and gaps "
        f"open as the camera comes near. It should be about {math.ceil(wanted / 64) * 64} wide: enlarge it before MoGe"
    )


def not_whole(height: int, width: int) -> str | None:
    """A remark on a panorama that is not twice as wide as high, which is read as if it were. None for one that is."""
    if abs(width - 2 * height) <= max(1, WHOLE * width):
        return None
    return (
        f"the panorama is {width}x{height} and is stretched, because it is read as a full 360 degree one, which is "
        f"twice as wide as high: pad or crop it to {2 * height}x{height} before MoGe"
    )


def reduced(panorama: torch.Tensor, camera: Cameras) -> torch.Tensor:
    """The panorama [1, H, W, 3] at the scale of the middle of a view of this (first) camera, or as it is where it is not
    finer."""
    panorama = panorama[..., :3].float().cpu()
    height, width = panorama.shape[1:3]
    wanted = max(1, round(2 * math.pi * camera.K[0, 0, 0].item()))
    if wanted >= width:
        return panorama
    size = max(1, round(height * wanted / width)), wanted
    channels = []
    for channel in panorama.split(1, 3):
        throw_exception_if_processing_interrupted()
        channels.append(F.interpolate(channel.movedim(-1, 1), size, mode="bilinear", antialias=True).clamp_(0, 1))
    return torch.cat(channels, 1).movedim(1, -1)


def view_of_panorama(panorama: torch.Tensor, camera: Cameras) -> torch.Tensor:
    """The picture [1, height, width, 3] that the (first) camera takes from the panorama's centre.

    panorama [1, H, W, 3] in 0..1, equirectangular. If it is finer than the view, it is first reduced to the view's
    scale (`reduced`, which serves all views of one lens).
    """
    panorama = reduced(panorama, camera).movedim(-1, 1)
    # For interpolation across the seam.
    panorama = stoppable(partial(F.pad, pad=(1, 1, 0, 0), mode="circular"), panorama)
    width = panorama.shape[3]
    view = torch.empty(1, panorama.shape[1], camera.height, camera.width)
    for rows in pieces(camera.height, ROWS):
        x, y, z = rays(camera, rows)
        longitude, elevation = torch.atan2(x, z), torch.atan2(-y, torch.hypot(x, z))
        grid = torch.stack([longitude / math.pi * (width - 2) / width, -elevation / math.pi * 2], dim=-1)
        view[:, :, rows] = F.grid_sample(
            panorama, grid[None], mode="bilinear", padding_mode="border", align_corners=False
        )
    return view.movedim(1, -1)


def rays(camera: Cameras, rows: slice = slice(None)) -> torch.Tensor:
    """The rays [3, H, W] through the (first) camera's pixel centres, in world axes, of length 1 along its z; or those
    of some rows."""
    y, x = torch.meshgrid(torch.arange(camera.height)[rows] + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).reshape(3, -1)
    return (camera.w2c[0, :3, :3].T @ torch.linalg.inv(camera.K[0]) @ pixels).view(3, *x.shape)


def depth_of_view(distance: torch.Tensor, camera: Cameras) -> torch.Tensor:
    """The depth along z, [height, width], that the (first) camera sees from the panorama's centre, by the nearest of
    the distances [H, W] along the panorama's rays."""
    height, width = distance.shape
    depth = torch.empty(camera.height, camera.width)
    for rows in pieces(camera.height, ROWS):
        x, y, z = rays(camera, rows)
        horizontal = torch.hypot(x, z)
        column = ((torch.atan2(x, z) / (2 * math.pi) + 0.5) * width).long() % width
        row = ((0.5 + torch.atan2(y, horizontal) / math.pi) * height).long().clamp(0, height - 1)
        depth[rows] = distance[row, column] / torch.hypot(horizontal, y)
    return depth
