"""From a picture and its depth to coloured points, by the rules of the renders that WorldStereo was trained on: far
depths are compressed, edges and invalid depths dropped."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .pointcloud import PIECE, PointCloud
from .stop import pieces, stoppable

FAR_MEDIANS = 8.0  # depths beyond this many medians are compressed
NO_DEPTH_DISPARITY = 1e7  # what the edge test sees where there is no depth
EDGE_STEEPNESS, EDGE_KEEP = 10.0, 0.35
EDGE_PIXELS = 1 << 21  # looked at together: of a large picture they would take gigabytes
DEPTH_PICTURES = ("disparity: near is white", "depth: near is black")
GREY_TOLERANCE = 0.02


def depth_of_moge(geometry: dict) -> torch.Tensor:
    """The depth [H, W] of core's MOGE_GEOMETRY of one picture, infinite where its mask says there is none.

    Raises ValueError for a panorama, several pictures, or a geometry without depth.
    """
    if "depth" not in geometry:
        raise ValueError("The MoGe geometry holds no depth.")
    if "intrinsics" not in geometry:
        raise ValueError(
            "This MoGe geometry has no intrinsics, so its depth is a panorama's: connect it to WorldStereo Panorama, and "
            "that node's points here."
        )
    depth = geometry["depth"].float().cpu()
    if len(depth) != 1:
        raise ValueError(f"The MoGe geometry holds {len(depth)} pictures; WorldStereo starts from one.")
    return depth[0].where(geometry["mask"][0].cpu(), torch.inf) if "mask" in geometry else depth[0]


def depths_of_moge(geometry: dict) -> "MogeDepths":
    """The depths [H, W] of core's MOGE_GEOMETRY of a batch of pictures, infinite where its masks say there is none.

    Raises ValueError for a panorama and for a geometry without depth.
    """
    depths = MogeDepths(geometry)
    depths.depth(0)
    return depths


class MogeDepths(Sequence):
    """See `depths_of_moge`. Each is computed when it is asked for: together, those of large pictures take gigabytes."""

    def __init__(self, geometry: dict):
        self.geometry = geometry

    def __len__(self):
        return len(self.geometry["depth"])

    def __getitem__(self, place):
        if isinstance(place, slice):
            return MogeDepths({name: value[place] for name, value in self.geometry.items()})
        return self.depth(range(len(self))[place])

    def depth(self, number: int) -> torch.Tensor:
        return depth_of_moge({name: value[number : number + 1] for name, value in self.geometry.items()})


def depth_of_picture(image: torch.Tensor, kind: str, near: float, far: float) -> torch.Tensor:
    """The depth [H, W] that a grey picture [1, H, W, C] in 0..1 stands for, in the units of near and far.

    kind is one of DEPTH_PICTURES: disparity runs from 1/far (black) to 1/near (white), depth from near (black) to far
    (white); a metric depth map is the latter with near 0 and its scale as far. Raises ValueError for several pictures,
    a coloured one, and near and far that do not fit.
    """
    if len(image) != 1:
        raise ValueError(f"The depth picture is a batch of {len(image)}; WorldStereo starts from one picture.")
    image = image[0, ..., :3].float().cpu()
    if (image.amax(-1) - image.amin(-1)).max() > GREY_TOLERANCE:
        raise ValueError("The depth picture is coloured: give the grey depth or disparity, not a colour map of it.")
    value = image.mean(-1)
    if not near < far:
        raise ValueError(f"near is {near} and far {far}: far must be the larger.")
    if kind == DEPTH_PICTURES[1]:
        return near + value * (far - near)
    if near <= 0:
        raise ValueError(f"near is {near}: a disparity picture needs a near above 0.")
    return 1 / (1 / far + value * (1 / near - 1 / far))


def in_front(depth: torch.Tensor) -> torch.Tensor:
    """Where a depth map has a depth in front of the camera, a mask of its shape: positive and finite."""
    return (depth > 0) & (depth < torch.inf)


def draw_in(depth: torch.Tensor) -> torch.Tensor:
    """Depths [P] with the far ones compressed: d beyond m, 8 times the median of the positive ones, becomes 2m - m²/d,
    which stays below 2m. The rule of WorldStereo's renders."""
    m = FAR_MEDIANS * depth[depth > 0].median()
    return torch.where(depth > m, 2 * m - m * m / depth, depth)


def points_kept(depth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pixels of a depth map [H, W] become points, a mask [H, W], and the depths [K] of those, with the far ones
    compressed.

    Pixels without a depth (NaN, infinite or 0) and those on depth edges are dropped. A negative depth is kept: it lies
    behind the camera, where other cameras may see it. As in WorldStereo's own renders, a pixel without a depth enters
    the edge test as a disparity of 1e7, beside which all other edges are flat: with sky in the picture only the points
    beside the sky are dropped. Raises ValueError if no depth is positive.
    """
    depth, valid, disparity = stoppable(_drawn_in, depth)
    keep = valid & ~on_edge(disparity)
    return keep, stoppable(torch.masked_select, depth, keep)


def _drawn_in(depth):
    """The depth map with far ones compressed, where it has a depth, and its disparity. Raises ValueError if no depth is
    positive."""
    valid = depth.isfinite() & (depth != 0)
    if not (valid & (depth > 0)).any():
        raise ValueError(
            "The depth map has no valid depth: all of it is NaN, infinite or not positive. Check the mask "
            "of the depth model, or its near and far."
        )
    depth = depth.masked_scatter(valid, draw_in(depth[valid]))
    return depth, valid, (1 / depth).masked_fill(~valid, NO_DEPTH_DISPARITY)


def on_edge(disparity: torch.Tensor) -> torch.Tensor:
    """Where a disparity map [H, W] has an edge, a mask [H, W]: exp(-10 g) < 0.35, g its Sobel magnitude after scaling
    to 0..1. The rule of WorldStereo's renders."""
    low, high = disparity.aminmax()
    sobel_x = disparity.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([sobel_x, sobel_x.T])[:, None]
    height, width = disparity.shape
    edge, rows = torch.empty_like(disparity, dtype=torch.bool), max(1, EDGE_PIXELS // width)
    for band in pieces(height, rows):
        top, bottom = band.start, band.stop
        scaled = (disparity[max(0, top - 1) : bottom + 1] - low) / (high - low)
        scaled = F.pad(scaled[None, None], (1, 1, int(top == 0), int(bottom == height)), mode="replicate")
        across, down = F.conv2d(scaled, kernels)[0]
        magnitude = (across * across + down * down).sqrt()  # NaN if all disparities are equal; NaN is no edge
        edge[band] = torch.exp(-EDGE_STEEPNESS * magnitude) < EDGE_KEEP
    return edge


def points_from_depth(picture: torch.Tensor, depth: torch.Tensor, w2c: torch.Tensor, K: torch.Tensor) -> PointCloud:
    """The points that the camera (w2c [4, 4], K [3, 3] in pixels of the picture) sees, one at each valid pixel's
    centre.

    picture [H, W, 3] in 0..1; depth [h, w], NaN, infinite or 0 where there is none, is resized to the picture's size
    (nearest). `points_kept` decides which pixels become points. Raises ValueError if no depth is positive.
    """
    height, width = picture.shape[:2]
    depth = F.interpolate(depth[None, None].float(), (height, width), mode="nearest-exact")[0, 0]
    keep, depth = points_kept(depth)
    return unproject(picture, depth, keep, w2c, K)


def unproject(
    picture: torch.Tensor, depth: torch.Tensor, keep: torch.Tensor, w2c: torch.Tensor, K: torch.Tensor
) -> PointCloud:
    """The points at the centres of the P pixels that `keep` [H, W] marks, coloured by picture [H, W, 3] in 0..1, at
    depth [P] in front of the camera (w2c [4, 4], K [3, 3] in pixels of the picture)."""
    y, x = keep.nonzero(as_tuple=True)
    matrices = torch.linalg.inv(K.double()), w2c[:3, :3].double().T, w2c[:3, 3:].double()
    to_camera, to_world, shift = (matrix.to(depth.device) for matrix in matrices)
    points, colors = torch.empty(2, len(x), 3, device=depth.device)
    for part in pieces(len(x), PIECE):  # in float64 all points would take a gigabyte
        # No matrix products: on a GPU, cuBLAS takes longer to load than this to compute.
        u, v = x[part].double() + 0.5, y[part].double() + 0.5
        rays = to_camera[:, :1] * u + to_camera[:, 1:2] * v + to_camera[:, 2:]
        right, down, forward = rays * depth[part].double() - shift
        points[part] = (to_world[:, :1] * right + to_world[:, 1:2] * down + to_world[:, 2:] * forward).T
        colors[part] = picture[y[part], x[part]]
    return PointCloud(points, colors)
