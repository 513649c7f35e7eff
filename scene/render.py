"""Point-cloud renders: what each camera of a path sees of coloured points, drawn as splats.

The splats are those of the renders that WorldStereo was trained on: PyTorch3D's
PointsRasterizer with alpha compositing (Wiles et al., SynSin, 2020), here in plain torch.
"""

import logging
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from ..core import throw_exception_if_processing_interrupted
from .cameras import Cameras
from .depth import depth_of_moge, depth_of_picture, points_from_depth
from .pictures import resize_pictures, same_shape
from .pointcloud import PointCloud
from .stop import pieces, stoppable

RADIUS = 0.008  # of a splat, in units in which the shorter side of the picture spans 2
SMALLEST_PIXELS = 1.0  # the least radius of a splat in pixels: below it, points one pixel apart show gaps and moiré
POINTS_PER_PIXEL = 20
BACKGROUND = (0.5, 0.5, 0.5)  # the colour of holes: the original composites colours in -1..1 over 0
TILE_PIXELS = 1 << 16  # pixels composited at a time
CHUNK_POINTS = 1 << 20  # points projected at a time
MOST_PIXELS = 1 << 23  # of one frame: 4K, 3840x2160
RENDER_LIMIT = 4 << 30  # bytes of all frames of a render
FRAME_PIXEL = 16  # bytes: three colours and the hole, in float32
CHUNK_CELLS = 1 << 21  # pairs of a point and a pixel it may cover, at a time; with the tile, this bounds the memory
GPU_TILE_PIXELS, GPU_CHUNK_CELLS = 1 << 19, 1 << 25  # instead of these on a GPU, which is slow at many small steps


def render_start(
    image: torch.Tensor,
    scene: dict | torch.Tensor | PointCloud,
    cameras: Cameras,
    depth_picture: str,
    near: float,
    far: float,
    width: int,
    height: int,
    radius: float,
    points_per_pixel: int,
    background: tuple[float, float, float],
    device: str | torch.device,
    progress: Callable[[int], None],
) -> tuple[torch.Tensor, torch.Tensor, PointCloud]:
    """The render [N, height, width, 3] in 0..1 and its holes [N, height, width] for a picture [1, H, W, C] that the
    first of N cameras took, and the points that were drawn.

    scene: core's MOGE_GEOMETRY, a grey depth picture (`depth.depth_of_picture`), or the points themselves. The first
    frame is the picture, without holes. The trained radius is enlarged if it is less than SMALLEST_PIXELS; any other
    radius is used as it is. The other arguments are those of `render` and `depth_of_picture`. Raises ValueError for
    more than one picture, a depth that cannot be used, and as `render` does.
    """
    if len(image) != 1:
        raise ValueError(f"image holds {len(image)} pictures; WorldStereo starts from one.")
    check_size(len(cameras), height, width)
    picture = resize_pictures(image, height, width)
    cameras = cameras.scaled_to(width, height)
    if not isinstance(scene, PointCloud):
        depth = depth_of_moge(scene) if isinstance(scene, dict) else depth_of_picture(scene, depth_picture, near, far)
        if not same_shape(*depth.shape, *image.shape[1:3]):
            raise ValueError(
                f"depth is {depth.shape[1]}x{depth.shape[0]} and image {image.shape[2]}x{image.shape[1]}: "
                "they have different shapes. Take the depth of this very picture, uncropped."
            )
        scene = points_from_depth(picture[0], depth, cameras.w2c[0], cameras.K[0])
    if radius == RADIUS:
        radius = max(RADIUS, 2 * SMALLEST_PIXELS / min(width, height))
    video, holes = render(scene, cameras, radius, points_per_pixel, background, device, progress)
    video[0], holes[0] = picture[0], 0
    return video, holes, scene


def mostly_holes(holes: torch.Tensor) -> list[int]:
    """The numbers of the frames of holes [N, H, W] that are more than half holes."""
    return (holes.mean((1, 2)) > 0.5).nonzero().flatten().tolist()


def summary(cloud: PointCloud, holes: torch.Tensor) -> str:
    """Two lines about a render: its points, and its holes [N, H, W]. Also logs a warning about frames that are mostly
    holes."""
    empty = mostly_holes(holes)
    numbers = ", ".join(map(str, empty))
    if empty:
        logging.warning(
            "WorldStereo Render: these frames are more than half holes: %s. The model has to invent them; a shorter "
            "path keeps more of the picture.",
            numbers,
        )
    most = f"mostly holes: frames {numbers}" if empty else f"at most {holes.mean((1, 2)).max():.0%} in a frame"
    return f"{len(cloud):,} points, {holes.mean():.0%} holes\n{most}"


def render(
    cloud: PointCloud,
    cameras: Cameras,
    radius: float = RADIUS,
    points_per_pixel: int = POINTS_PER_PIXEL,
    background: tuple[float, float, float] = BACKGROUND,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda frames: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each camera sees of the cloud: pictures [N, H, W, 3] in 0..1 and holes [N, H, W], 1 where no point falls.

    radius: in units in which the shorter side of the picture spans 2. points_per_pixel: how many of the nearest points
    a pixel is blended from. progress(1) is called after every frame. Coordinates are computed by single IEEE
    operations, so that every device draws the same points on the same pixels. Raises ValueError for a radius outside
    0..2, less than one point per pixel, and sizes that `check_size` refuses.
    """
    points, colors = cloud.points.to(device), cloud.colors.to(device)
    height, width = cameras.height, cameras.width
    check_size(len(cameras), height, width)
    if not (0 < radius <= 2 and points_per_pixel >= 1):
        raise ValueError(
            f"radius is {radius} and points_per_pixel {points_per_pixel}: the radius must be above 0 and at most 2, "
            "and points_per_pixel at least 1."
        )
    radius = radius * min(height, width) / 2
    on_cpu = points.device.type == "cpu"
    tile, cells = (TILE_PIXELS, CHUNK_CELLS) if on_cpu else (GPU_TILE_PIXELS, GPU_CHUNK_CELLS)
    # Zeros, because copying from a GPU into memory that was not yet touched takes several times as long.
    pictures = torch.zeros(len(cameras), height, width, 3)
    holes = torch.zeros(len(cameras), height, width)
    behind = colors.new_tensor(background)
    for frame, (w2c, K) in enumerate(zip(cameras.w2c, cameras.K)):
        u, v, index = _visible(points, w2c, K, height, width, radius)
        for band in pieces(height, max(1, tile // width)):
            picture, taken = _splat(
                u, v, colors, index, band.start, band.stop, width, radius, points_per_pixel, behind, cells
            )
            pictures[frame, band] = picture.view(-1, width, 3)
            holes[frame, band] = (taken == 0).view(-1, width)
        progress(1)
    return pictures, holes


def check_size(frames: int, height: int, width: int) -> None:
    """Raises ValueError for frames of more than MOST_PIXELS pixels, and for a render of more than RENDER_LIMIT
    bytes."""
    if not 0 < height * width <= MOST_PIXELS:
        raise ValueError(
            f"A picture of {width}x{height} is not drawn: it may have at most {MOST_PIXELS} pixels. Give a smaller "
            "width and height."
        )
    most = RENDER_LIMIT // (FRAME_PIXEL * height * width)
    if frames > most:
        raise ValueError(
            f"cameras holds {frames}: their render of {width}x{height} would take "
            f"{frames * height * width * FRAME_PIXEL / 1e9:.1f} GB. Give at most {most} cameras, or a smaller size."
        )


def project(
    points: torch.Tensor, w2c: torch.Tensor, K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixel coordinates u, v [P] and depths z [P] of points [P, 3] in a camera (w2c [4, 4], K [3, 3] in pixels). Pixel
    (0, 0) has its centre at u = v = 0.5. u and v are meaningless where z is not above 0."""
    # All coordinates at once: on a GPU, starting an operation takes longer than the operation.
    pose, lens = w2c[:3, :, None].to(points), K[:2, :, None].to(points)
    terms = pose[:, :3] * points.T
    xyz = terms[:, 0] + terms[:, 1] + terms[:, 2] + pose[:, 3]
    terms = lens[:, :2] * xyz[:2]
    u, v = (terms[:, 0] + terms[:, 1]) / xyz[2] + lens[:, 2]
    return u, v, xyz[2]


def pixels_of(
    points: torch.Tensor, w2c: torch.Tensor, K: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which of points [P, 3] lie in front of a camera (w2c [4, 4], K [3, 3] in pixels) and in its height x width
    picture: their indices, rising, the row and column of the pixel that each falls on, and their depths z, all [V]."""
    u, v, z = project(points, w2c, K)
    index = ((z > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)).nonzero().squeeze(1)
    return index, v[index].long(), u[index].long(), z[index]


def _visible(points, w2c, K, height, width, radius):
    """Pixel coordinates u, v of the points whose splats reach the picture, near to far, and their indices."""
    parts = []
    for part in pieces(len(points), CHUNK_POINTS):
        u, v, z = project(points[part], w2c, K)
        inside = (z > 0) & (u > -radius) & (u < width + radius) & (v > -radius) & (v < height + radius)
        index = inside.nonzero().squeeze(1)
        parts.append((u[index], v[index], z[index], (index + part.start).int()))
    if not parts:
        none = points.new_zeros(0)
        return none, none, none.int()
    # One column after the other, from here on: with the most points each takes 130 MB.
    lists = [list(column) for column in zip(*parts)]
    parts.clear()
    u, v, z, index = (torch.cat(lists.pop(0)) for _ in range(4))
    sort = partial(torch.argsort, stable=True)
    near_to_far = stoppable(sort, z)
    del z
    columns = [u, v, index]
    del u, v, index
    for number, column in enumerate(columns):
        columns[number] = column.new_empty(len(column))
        for part in pieces(len(column), CHUNK_POINTS):
            columns[number][part] = column[near_to_far[part]]
    return tuple(columns)


def _splat(u, v, colors, index, top, bottom, width, radius, points_per_pixel, background, cells):
    """Rows top..bottom of one frame, flattened: colours [P, 3] and how many points each pixel is blended from [P].

    Points are sorted near to far, so each chunk lies behind those already composited. A chunk's splats are expanded to
    the pixels they cover and sorted by pixel; the sort is stable and so keeps them near to far.
    """
    pixels = (bottom - top) * width
    picture = colors.new_zeros(pixels, 3)
    passed = colors.new_ones(pixels)  # the transmittance of all points so far
    taken = torch.zeros(pixels, dtype=torch.long, device=colors.device)
    span = math.ceil(2 * radius)  # how many pixel centres a splat can cover along an axis
    reaching = ((v > top - radius) & (v < bottom + radius)).nonzero().squeeze(1)
    for chunk in reaching.split(max(1, cells // span**2)):
        throw_exception_if_processing_interrupted()
        room = points_per_pixel - taken
        if not room.any():
            break
        column, dx2 = _covered(u[chunk], span, radius, 0, width)
        row, dy2 = _covered(v[chunk], span, radius, top, bottom)
        d2 = (dy2[:, :, None] + dx2[:, None, :]).flatten()
        pixel = ((row - top)[:, :, None] * width + column[:, None, :]).flatten()
        splat = (d2 < radius * radius).nonzero().squeeze(1)
        pixel, order = pixel[splat].sort(stable=True)
        splat = splat[order]

        count = torch.bincount(pixel, minlength=pixels)
        rank = torch.arange(len(pixel), device=pixel.device) - (count.cumsum(0) - count)[pixel]
        fits = (rank < room[pixel]).nonzero().squeeze(1)
        pixel, splat, rank = pixel[fits], splat[fits], rank[fits]
        count = count.minimum(room)
        taken += count

        opacity = 1 - d2[splat] / (radius * radius)
        # For each pixel a column: the transmittance before each of its points.
        through = colors.new_ones(points_per_pixel + 1, pixels)
        slot = rank * pixels + pixel
        through.view(-1)[slot + pixels] = 1 - opacity
        through[0] = passed
        through = through.cumprod(0)  # along the last dimension, so short, it is slow on a GPU
        passed = through[-1]
        picture += F.embedding_bag(
            index[chunk[splat // (span * span)]].long(),
            colors,
            count.cumsum(0) - count,
            mode="sum",
            per_sample_weights=opacity * through.view(-1)[slot],
        )
    return picture + passed[:, None] * background, taken


def _covered(centre, span, radius, low, high):
    """The `span` pixels along one axis, beginning with the first that a splat at `centre` [P] covers, [P, span], and
    their squared distances [P, span], infinite outside low..high."""
    steps = torch.arange(1, span + 1, dtype=torch.int32, device=centre.device)
    pixel = (centre - radius - 0.5).floor().int()[:, None] + steps
    distance = pixel + 0.5 - centre[:, None]
    return pixel, (distance * distance).masked_fill((pixel < low) | (pixel >= high), torch.inf)
