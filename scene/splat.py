"""A scene as Gaussians, flat on the surfaces that its views show, for viewers and renderers of splats.

Nothing is optimised: the Gaussians show the views' pixels at their depths. Each covers the surface under its pixel,
like a surfel (Pfister et al., Surfels, 2000; Huang et al., 2D Gaussian Splatting, 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..core import throw_exception_if_processing_interrupted
from .cameras import rotation_to_quaternion
from .depth import draw_in, in_front, unproject
from .fuse import SAME_SURFACE, despeckled, seen_through, thin_by_voxels
from .memory import view_scores
from .pointcloud import PIECE, PointCloud, splat_sizes
from .render import pixels_of
from .scene import Scene
from .stop import pieces, stoppable

SIGMA_PIXELS = 0.75  # a Gaussian's standard deviation in pixels: Gaussians one pixel apart close the surface
OPACITY = 0.99
THICKNESS = 0.1  # the standard deviation along the normal, relative to that of a pixel
STRETCH = 5.0  # the largest ratio of a Gaussian's length to its width, on slanted surfaces
STEEPEST = 0.05  # cosine between a surface's normal and the ray: below it, it is not a surface but a smeared depth edge
BEND = 0.05  # relative: a disparity farther than this from the line between its neighbours is on a depth edge
REACH = 2  # pixels on each side from which a surface's slope is estimated
FINER = 1.5  # a view replaces Gaussians that are coarser than its pixels by more than this factor
NEIGHBOURS = 16  # views that a view's depth is compared with
SAME_LIMIT = 0.1  # the largest relative difference of two depths of one surface
FIRST_SCALE = 4.0  # pictures are first reduced by this factor, to estimate the number of Gaussians
SURPLUS = 1.02  # by which the pictures are reduced more than the estimate says
KEPT_PIXELS = 1 << 27  # of depths at a time: 0.5 GB


@dataclass(frozen=True, eq=False)
class Gaussians:
    """points [P, 3] in the cameras' world (OpenCV axes); sizes [P, 3], the standard deviations along each Gaussian's
    own axes; rotations [P, 4], quaternions from these axes to the world's, real part first; colors [P, 3] in 0..1. All
    have the same OPACITY."""

    points: torch.Tensor
    sizes: torch.Tensor
    rotations: torch.Tensor
    colors: torch.Tensor

    def __len__(self):
        return len(self.points)

    def __getitem__(self, keep):
        return Gaussians(self.points[keep], self.sizes[keep], self.rotations[keep], self.colors[keep])

    def __add__(self, other):
        pairs = zip(vars(self).values(), vars(other).values())
        return Gaussians(*(torch.cat(pair) for pair in pairs))


def gaussians_of_scene(scene: Scene, limit: int, progress: Callable[[int], object] = lambda views: None) -> Gaussians:
    """A Gaussian for each pixel with a depth of each view, unless another view shows the surface in as fine detail; if
    no view has depth, one for each point of the cloud.

    Each covers its pixel on the surface and is flat along the normal. Speckles, smeared depth edges, and pixels that at
    least as many views see through as see are left out; far depths are compressed. If there are more than `limit`, the
    views are reduced in size. progress(1) is called after every view. Raises ValueError for a scene without depth and
    points, and if no view's depth agrees with the others'.
    """
    deep = [view for view, depth in enumerate(scene.depths) if depth is not None]
    views = [view for view in _interruptible(deep) if in_front(scene.depths[view]).any()]
    if not views:
        return _of_points(scene, limit)
    depths = _Depths(scene, views)
    others = _neighbours(scene, views)
    tolerances = {view: _tolerance(scene, depths, view, others[view]) for view in _interruptible(views)}
    found = _collected(scene, depths, others, tolerances, FIRST_SCALE, lambda views: None)
    scale = max(1.0, FIRST_SCALE * (len(found) / limit) ** 0.5)
    while len(found := _collected(scene, depths, others, tolerances, scale, progress)) > limit:
        scale *= SURPLUS * (len(found) / limit) ** 0.5
    if not len(found):
        raise ValueError("No view's depth agrees with the other views': there is nothing to make Gaussians of.")
    return found


class _Depths:
    """The views' depths, infinite where there is none, far ones compressed. They are made when they are needed, and
    the last ones kept: all of a large scene's would take as much memory as the scene."""

    def __init__(self, scene, views):
        def depth_of(view):
            depth = scene.depths[view]
            return draw_in(depth.where(in_front(depth), torch.inf))

        kept = max(NEIGHBOURS + 2, KEPT_PIXELS // (scene.cameras.width * scene.cameras.height))
        self.views, self.depth_of = views, lru_cache(kept)(depth_of)

    def __getitem__(self, view):
        return self.depth_of(view)

    def __iter__(self):
        return iter(self.views)


def _interruptible(views):
    for view in views:
        throw_exception_if_processing_interrupted()
        yield view


def _of_points(scene, limit):
    if not len(scene.cloud):
        raise ValueError("The scene has neither depth nor points: there is nothing to make Gaussians of.")
    keep, _ = thin_by_voxels(scene.cloud.points, limit)
    cloud = PointCloud(scene.cloud.points[keep], scene.cloud.colors[keep])
    upright = cloud.points.new_tensor([1.0, 0, 0, 0]).expand(len(cloud), 4)
    return Gaussians(cloud.points, splat_sizes(cloud)[:, None].expand(-1, 3), upright, cloud.colors)


def _neighbours(scene, views):
    """For each of these views, the others that see most of what it sees: {view: [views]}."""
    cameras = scene.cameras[views]
    w2c, K = cameras.w2c.double(), cameras.K.double()
    scores = view_scores(w2c, K, w2c, K, cameras.width, cameras.height).fill_diagonal_(0)
    best = scores.topk(min(NEIGHBOURS, len(views)), dim=1)
    return {
        view: [views[other] for other, score in zip(places, row) if score > 0]
        for view, places, row in zip(views, best.indices.tolist(), best.values.tolist())
    }


def _tolerance(scene, depths, view, others):
    """The relative distance up to which this view's depths and other views' count as one surface."""
    w2c, K = scene.cameras.w2c, scene.cameras.K
    sparse = torch.zeros_like(depths[view], dtype=torch.bool)
    sparse[::8, ::8] = True
    sparse &= depths[view].isfinite()
    points = unproject(scene.pictures[view], depths[view][sparse], sparse, w2c[view], K[view]).points
    errors = []
    for other in _interruptible(others):
        _, row, column, z = pixels_of(points, w2c[other], K[other], scene.cameras.height, scene.cameras.width)
        errors.append((depths[other][row, column] / z - 1).abs())
    errors = torch.cat([*errors, points.new_zeros(1)])
    return (3 * errors[errors.isfinite()].median()).clamp(SAME_SURFACE, SAME_LIMIT).item()


def _collected(scene, depths, others, tolerances, scale, progress):
    """The Gaussians of all views, whose pictures are reduced by the factor `scale`."""
    made = None
    for view in _interruptible(depths):
        made, new, alive = _judged(made, scene, depths, view, others[view], tolerances[view], scale)
        new = new[alive]
        made = new if made is None else made + new
        progress(1)
    return made


def _judged(made, scene, depths, view, others, same, scale):
    """Those of the Gaussians made so far (or None) that a view does not replace, the view's own, and which of these are
    used, a mask [P]. A function, so that the view's other arrays are dropped before its Gaussians are copied."""
    w2c = scene.cameras.w2c[view]
    K, picture, depth = _smaller(scene.pictures[view], depths[view], scene.cameras.K[view], scale)
    slopes, good = stoppable(_slopes, *despeckled(depth), K)
    cloud = unproject(picture, depth[good], good, w2c, K)
    y, x = good.nonzero(as_tuple=True)
    sizes, rotations = _surfels(x, y, depth, slopes, w2c, K)
    new = Gaussians(cloud.points, sizes, rotations, cloud.colors)
    seen = ((depths[n], scene.cameras.w2c[n], scene.cameras.K[n], same) for n in (view, *others))
    alive = ~seen_through(new.points, seen)
    if made is not None:
        throw_exception_if_processing_interrupted()
        number = torch.full(depth.shape, -1)
        number[good] = torch.arange(len(new))
        old, there = _on_surface(made.points, number, depth, w2c, K, same)
        fine = made.sizes[old, 0] <= FINER * new.sizes[there, 0]
        throw_exception_if_processing_interrupted()
        shown = torch.zeros(depth.shape)
        shown[y[there[fine]], x[there[fine]]] = 1
        closed = -F.max_pool2d(-F.max_pool2d(shown[None], 3, 1, 1), 3, 1, 1)[0]  # gaps between Gaussians
        alive &= closed[good] == 0
        throw_exception_if_processing_interrupted()
        keep = torch.ones(len(made), dtype=torch.bool)
        keep[old[~fine & alive[there]]] = False
        throw_exception_if_processing_interrupted()
        made = made[keep]
    throw_exception_if_processing_interrupted()
    return made, new, alive


def _on_surface(points, number, depth, w2c, K, same):
    """Which of points [P, 3] lie on the surface that a view shows, rising, and the number [H, W] of the pixel that each
    falls on; -1 is none."""
    old, there = [number.new_zeros(0)], [number.new_zeros(0)]
    height, width = depth.shape
    for part in pieces(len(points), PIECE):
        index, row, column, z = pixels_of(points[part], w2c, K, height, width)
        found = number[row, column]
        pair = (found >= 0) & ((depth[row, column] / z - 1).abs() <= same)
        old.append(index[pair] + part.start)
        there.append(found[pair])
    return torch.cat(old), torch.cat(there)


def _smaller(picture, depth, K, scale):
    """Intrinsics [3, 3], picture [h, w, 3] in 0..1 and depth [h, w] of a view, reduced by the factor `scale`."""
    size = [max(1, round(side / scale)) for side in depth.shape]
    K = K * K.new_tensor([size[1] / depth.shape[1], size[0] / depth.shape[0], 1.0])[:, None]
    picture = F.interpolate(picture.movedim(-1, 0)[None].float() / 255, size, mode="area")[0].movedim(0, -1)
    return K, picture, F.interpolate(depth[None, None], size, mode="nearest-exact")[0, 0]


def _slopes(depth, good, K):
    """The slopes [2, H, W] of the disparity per pixel to the right and down, and a mask [H, W] of the pixels that lie
    on a surface. depth, good: from `despeckled`. The slope is the smaller one of the two sides, so that an edge on one
    side does not distort it, and 0 where they differ in sign."""
    disparity = (1 / depth).masked_fill(~good, torch.nan)
    slopes, edge = [], torch.zeros_like(good)
    for axis in (1, 0):
        before, after = disparity.roll(REACH, axis), disparity.roll(-REACH, axis)
        before.narrow(axis, 0, min(REACH, depth.shape[axis])).fill_(torch.nan)
        after.narrow(axis, max(0, depth.shape[axis] - REACH), min(REACH, depth.shape[axis])).fill_(torch.nan)
        left, right = (disparity - before) / REACH, (after - disparity) / REACH
        left, right = left.where(left.isfinite(), right), right.where(right.isfinite(), left)
        flatter = left.where(left.abs() < right.abs(), right)
        edge |= (2 * disparity - disparity.roll(1, axis) - disparity.roll(-1, axis)).abs() > BEND * disparity
        slopes.append(flatter.where(left * right > 0, torch.zeros_like(flatter)))
    slopes = torch.stack(slopes)
    y, x = torch.meshgrid(torch.arange(depth.shape[0]) + 0.5, torch.arange(depth.shape[1]) + 0.5, indexing="ij")
    # The disparity of a plane a X + b Y + c Z = 1 at the ray (x, y, 1) is a x + b y + c.
    a, b, x, y = K[0, 0] * slopes[0], K[1, 1] * slopes[1], (x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1]
    c = disparity - a * x - b * y
    lengths = (a * a + b * b + c * c).sqrt() * (x * x + y * y + 1).sqrt()
    return slopes, good & ~edge & (disparity >= STEEPEST * lengths)


def _surfels(x, y, depth, slopes, w2c, K):
    """Sizes [P, 3] and rotations [P, 4] of the Gaussians that cover the pixels x, y [P] of a depth map on their
    surfaces."""
    sizes, rotations = torch.empty(len(x), 3), torch.empty(len(x), 4)
    for part in pieces(len(x), PIECE // 4):  # of a large view they would take gigabytes
        sizes[part], rotations[part] = _surfels_of(
            x[part], y[part], depth[y[part], x[part]], slopes[:, y[part], x[part]], w2c, K
        )
    return sizes, rotations


def _surfels_of(x, y, depth, slopes, w2c, K):
    to_camera = torch.linalg.inv(K)
    rays = torch.stack([x + 0.5, y + 0.5, torch.ones_like(depth)], 1) @ to_camera.T
    # The vectors [P, 3, 2] on the surface from a pixel to the next along both axes, in the world.
    steps = depth[:, None, None] * to_camera[:, :2] - rays[:, :, None] * (depth.square() * slopes).T[:, None]
    steps = w2c[:3, :3].T @ steps
    gram = steps.mT @ steps
    mean, half = (gram[:, 0, 0] + gram[:, 1, 1]) / 2, (gram[:, 0, 0] - gram[:, 1, 1]) / 2
    root = (half.square() + gram[:, 0, 1].square()).sqrt()
    angle = torch.atan2(gram[:, 0, 1], half) / 2
    long = F.normalize((steps @ torch.stack([angle.cos(), angle.sin()], 1)[:, :, None])[:, :, 0], dim=1)
    short = F.normalize((steps @ torch.stack([-angle.sin(), angle.cos()], 1)[:, :, None])[:, :, 0], dim=1)
    narrow = (mean - root).clamp(min=0).sqrt()
    pixel = depth * (to_camera[0, 0] * to_camera[1, 1]).sqrt()
    narrow = torch.maximum(narrow, pixel / 2)
    wide = torch.minimum((mean + root).sqrt(), STRETCH * narrow)
    sizes = SIGMA_PIXELS * torch.stack([wide, narrow, THICKNESS * pixel], 1)
    rotation = torch.stack([long, short, torch.linalg.cross(long, short)], 2)
    return sizes, rotation_to_quaternion(rotation)
