"""Point-cloud renders: a picture and its depth become coloured points, and each camera of a path sees them as splats.

The rules are those of the renders that WorldStereo was trained on (section 6 of the model's description). The splats
are PyTorch3D's PointsRasterizer with alpha compositing (Wiles et al., SynSin, 2020), written in plain torch.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .cameras import Cameras
from .pointcloud import PointCloud

RADIUS = 0.008  # of a splat, in units in which the shorter side of the picture spans 2
POINTS_PER_PIXEL = 20
FAR_MEDIANS = 8.0  # depths beyond this many medians are drawn in
EDGE_STEEPNESS, EDGE_KEEP = 10.0, 0.35
TILE_PIXELS = 1 << 16  # pixels composited at a time
CHUNK_POINTS = 1 << 18  # points splatted at a time; with the tile, this bounds the memory


def valid_depths(depth: torch.Tensor) -> torch.Tensor:
    """Where a depth map holds a depth: finite and in front of the camera."""
    return depth.isfinite() & (depth > 0)


def draw_in(depth: torch.Tensor) -> torch.Tensor:
    """Valid depths, those d beyond m = 8 medians drawn in to 2m - m²/d, which stays below 2m."""
    m = FAR_MEDIANS * depth.median()
    return torch.where(depth > m, 2 * m - m * m / depth, depth)


def on_edge(disparity: torch.Tensor) -> torch.Tensor:
    """Where a disparity map [H, W] has an edge: exp(-10 g) < 0.35, g its Sobel magnitude after scaling to 0..1."""
    low, high = disparity.aminmax()
    if low == high:
        return torch.zeros_like(disparity, dtype=torch.bool)
    sobel_x = disparity.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([sobel_x, sobel_x.T])[:, None]
    scaled = F.pad(((disparity - low) / (high - low))[None, None], (1, 1, 1, 1), mode="replicate")
    magnitude = F.conv2d(scaled, kernels).norm(dim=1)[0]
    return torch.exp(-EDGE_STEEPNESS * magnitude) < EDGE_KEEP


def points_from_depth(picture: torch.Tensor, depth: torch.Tensor, w2c: torch.Tensor, K: torch.Tensor) -> PointCloud:
    """The points that the camera (w2c [4, 4], K [3, 3] in pixels of the picture) sees, one for each valid pixel centre.

    picture [H, W, 3] in 0..1; depth [h, w], NaN, infinite or <= 0 where there is none, is brought to the picture's size
    by its nearest values. Far depths are drawn in and the points on depth edges dropped. Raises ValueError where no
    depth is valid.
    """
    height, width = picture.shape[:2]
    depth = F.interpolate(depth[None, None].float(), (height, width), mode="nearest-exact")[0, 0]
    valid = valid_depths(depth)
    if not valid.any():
        raise ValueError("The depth map has no valid depth: all of it is NaN, infinite or not positive. Check the mask "
                         "of the depth model, or its near and far.")
    depth = depth.where(valid, depth.new_tensor(torch.inf))  # as far as can be: its neighbours lie on an edge
    depth[valid] = draw_in(depth[valid])
    keep = valid & ~on_edge(1 / depth)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([x[keep], y[keep], torch.ones_like(x[keep])])
    camera = (torch.linalg.inv(K.double()) @ pixels.double()) * depth[keep].double()
    world = w2c[:3, :3].double().T @ (camera - w2c[:3, 3:].double())
    return PointCloud(world.T.float().contiguous(), picture[keep].float())


def render(cloud: PointCloud, cameras: Cameras, radius: float = RADIUS, points_per_pixel: int = POINTS_PER_PIXEL,
           background: tuple[float, float, float] = (0.0, 0.0, 0.0), device: str | torch.device = "cpu",
           progress: Callable[[int], None] = lambda frames: None) -> tuple[torch.Tensor, torch.Tensor]:
    """What each camera sees of the cloud: pictures [N, H, W, 3] in 0..1 and holes [N, H, W], 1 where no point falls.

    radius is in units in which the shorter side of the picture spans 2. progress(1) is called after every frame.
    Coordinates are computed by single IEEE operations, so that every device draws the same points on the same pixels.
    """
    points, colors = cloud.points.to(device), cloud.colors.to(device)
    height, width = cameras.height, cameras.width
    radius = radius * min(height, width) / 2
    pictures = torch.empty(len(cameras), height, width, 3)
    holes = torch.empty(len(cameras), height, width)
    for frame, (w2c, K) in enumerate(zip(cameras.w2c, cameras.K)):
        u, v, index = _visible(points, w2c, K, height, width, radius)
        rows = max(1, TILE_PIXELS // width)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            picture, seen = _splat(u, v, colors, index, top, bottom, width, radius, points_per_pixel, background)
            pictures[frame, top:bottom] = picture.view(-1, width, 3)
            holes[frame, top:bottom] = (~seen).view(-1, width)
        progress(1)
    return pictures, holes


def _visible(points, w2c, K, height, width, radius):
    """Pixel coordinates u, v of the points whose splats reach the picture, near to far, and their indices."""
    x, y, z = points.unbind(1)
    x, y, z = (a * x + b * y + c * z + d for a, b, c, d in w2c[:3].tolist())
    u, v = ((a * x + b * y) / z + c for a, b, c in K[:2].tolist())
    inside = (z > 0) & (u > -radius) & (u < width + radius) & (v > -radius) & (v < height + radius)
    index = inside.nonzero().squeeze(1)
    index = index[z[index].sort(stable=True).indices]
    return u[index], v[index], index


def _splat(u, v, colors, index, top, bottom, width, radius, points_per_pixel, background):
    """Rows top..bottom of one frame, flattened: colours [P, 3] and whether a point fell there [P].

    Points come near to far, so each chunk lies behind what is composited already. A chunk's splats are spread over the
    pixels they cover and sorted by pixel; the sort is stable and keeps them near to far.
    """
    pixels = (bottom - top) * width
    picture = colors.new_zeros(pixels, 3)
    passed = colors.new_ones(pixels)  # the light that passes all points so far
    taken = torch.zeros(pixels, dtype=torch.long, device=colors.device)
    span = math.ceil(2 * radius)  # the pixel centres that a splat can cover on an axis
    for chunk in ((v > top - radius) & (v < bottom + radius)).nonzero().squeeze(1).split(CHUNK_POINTS):
        column, dx2 = _covered(u[chunk], span, radius, 0, width)
        row, dy2 = _covered(v[chunk], span, radius, top, bottom)
        d2 = (dy2[:, :, None] + dx2[:, None, :]).flatten()
        pixel = ((row - top)[:, :, None] * width + column[:, None, :]).flatten()
        splat = (d2 < radius * radius).nonzero().squeeze(1)
        pixel, order = pixel[splat].sort(stable=True)
        splat = splat[order]

        count = torch.bincount(pixel, minlength=pixels)
        rank = torch.arange(len(pixel), device=pixel.device) - (count.cumsum(0) - count)[pixel]
        room = points_per_pixel - taken
        fits = (rank < room[pixel]).nonzero().squeeze(1)
        pixel, splat, rank = pixel[fits], splat[fits], rank[fits]
        count = count.minimum(room)
        taken += count

        opacity = 1 - d2[splat] / (radius * radius)
        slot = pixel * (points_per_pixel + 1) + rank
        through = colors.new_ones(pixels * (points_per_pixel + 1))  # a row a pixel: the light left before each point
        through[slot + 1] = 1 - opacity
        through = through.view(pixels, -1)
        through[:, 0] = passed
        through = through.cumprod(1)
        passed = through[:, -1]
        picture += F.embedding_bag(index[chunk[splat // (span * span)]], colors, count.cumsum(0) - count, mode="sum",
                                   per_sample_weights=opacity * through.view(-1)[slot])
    return picture + passed[:, None] * picture.new_tensor(background), taken > 0


def _covered(centre, span, radius, low, high):
    """The `span` pixels along one axis from the first that a splat at `centre` covers, and their squared distances
    [P, span]; infinite outside low..high."""
    steps = torch.arange(1, span + 1, dtype=torch.int32, device=centre.device)
    pixel = (centre - radius - 0.5).floor().int()[:, None] + steps
    distance = pixel + 0.5 - centre[:, None]
    return pixel, (distance * distance).masked_fill((pixel < low) | (pixel >= high), torch.inf)
