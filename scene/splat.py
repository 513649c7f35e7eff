"""A scene as Gaussians: flat ones on the surfaces that its views show, for viewers and renderers of splats.

Nothing is optimised: it is what the views show, where their depth puts it. A Gaussian covers the surface under its
pixel, as a surfel does (Pfister et al., Surfels, 2000; Huang et al., 2D Gaussian Splatting, 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..core import throw_exception_if_processing_interrupted
from .cameras import rotation_to_quaternion
from .depth import draw_in, unproject
from .fuse import SAME_SURFACE, despeckled, seen_through, thin_by_voxels
from .memory import view_scores
from .pointcloud import PointCloud, splat_sizes
from .render import project
from .scene import Scene

SIGMA_PIXELS = 0.75  # a Gaussian's deviation: at a spacing of one pixel its neighbours close the surface
OPACITY = 0.99
THICKNESS = 0.1  # the deviation along the normal, as a share of a pixel's
STRETCH = 5.0  # the most by which a slanted surface makes a Gaussian longer than wide
STEEPEST = 0.05  # cosine between a surface's normal and the ray: below it is a depth edge drawn out, no surface
BEND = 0.05  # relative: a disparity that is off the line between its neighbours by more lies on a depth edge
REACH = 2  # pixels on each side from which a surface's slope is taken
FINER = 1.5  # a view replaces Gaussians that are coarser than its pixels by this factor
NEIGHBOURS = 16  # views that a view's depth is compared with
SAME_LIMIT = 0.1  # the most that depths of one surface may differ, relative
FIRST_SCALE = 4.0  # the pictures are first tried this much smaller, to see how many Gaussians come of them
SURPLUS = 1.02


@dataclass(frozen=True, eq=False)
class Gaussians:
    """points [P, 3] in the cameras' world (OpenCV axes); sizes [P, 3], the deviations along the axes of each, which its
    rotation turns into the world: quaternions [P, 4], real part first; colors [P, 3] in 0..1. All of one OPACITY."""

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
    """A Gaussian for each pixel of each view that has a depth, unless another view shows that surface as finely; where
    no view has depth, one for each point of the cloud.

    Each covers its pixel on the surface and is flat along the normal. Speckles, depths drawn out between two surfaces,
    and pixels that at least as many views see through as see are left out; far depths are drawn in. Where that gives
    more than `limit`, the views are taken smaller, until it does not. progress(1) is called after every view.
    Raises ValueError for a scene that has neither depth nor points.
    """
    depths = {
        view: draw_in(depth.where(_valid(depth), torch.inf))
        for view, depth in enumerate(scene.depths)
        if depth is not None and _valid(depth).any()
    }
    views = list(depths)
    if not views:
        return _of_points(scene, limit)
    others = _neighbours(scene, views)
    tolerances = {view: _tolerance(scene, depths, view, others[view]) for view in views}
    found = _collected(scene, depths, others, tolerances, FIRST_SCALE, lambda views: None)
    scale = max(1.0, FIRST_SCALE * (len(found) / limit) ** 0.5)
    while len(found := _collected(scene, depths, others, tolerances, scale, progress)) > limit:
        scale *= SURPLUS * (len(found) / limit) ** 0.5
    if not len(found):
        raise ValueError("No view's depth agrees with the other views': there is nothing to make Gaussians of.")
    return found


def _of_points(scene, limit):
    if not len(scene.cloud):
        raise ValueError("The scene has neither depth nor points: there is nothing to make Gaussians of.")
    keep, _ = thin_by_voxels(scene.cloud.points, limit)
    cloud = PointCloud(scene.cloud.points[keep], scene.cloud.colors[keep])
    upright = cloud.points.new_tensor([1.0, 0, 0, 0]).expand(len(cloud), 4)
    return Gaussians(cloud.points, splat_sizes(cloud)[:, None].expand(-1, 3), upright, cloud.colors)


def _valid(depth):
    return depth.isfinite() & (depth > 0)


def _neighbours(scene, views):
    """{view: the views, out of these, that see most of what it sees}."""
    cameras = scene.cameras[views]
    w2c, K = cameras.w2c.double(), cameras.K.double()
    scores = view_scores(w2c, K, w2c, K, cameras.width, cameras.height).fill_diagonal_(0)
    best = scores.topk(min(NEIGHBOURS, len(views)), dim=1)
    return {
        view: [views[other] for other, score in zip(places, row) if score > 0]
        for view, places, row in zip(views, best.indices.tolist(), best.values.tolist())
    }


def _tolerance(scene, depths, view, others):
    """The relative distance within which this view's depths and other views' are one surface."""
    w2c, K = scene.cameras.w2c, scene.cameras.K
    sparse = torch.zeros_like(depths[view], dtype=torch.bool)
    sparse[::8, ::8] = True
    sparse &= depths[view].isfinite()
    points = unproject(scene.pictures[view], depths[view][sparse], sparse, w2c[view], K[view]).points
    errors = []
    for other in others:
        u, v, z = project(points, w2c[other], K[other])
        inside = (z > 0) & (u >= 0) & (u < scene.cameras.width) & (v >= 0) & (v < scene.cameras.height)
        errors.append((depths[other][v[inside].long(), u[inside].long()] / z[inside] - 1).abs())
    errors = torch.cat([*errors, points.new_zeros(1)])
    return (3 * errors[errors.isfinite()].median()).clamp(SAME_SURFACE, SAME_LIMIT).item()


def _collected(scene, depths, others, tolerances, scale, progress):
    """All views' Gaussians, of pictures `scale` times smaller."""
    made = None
    for view in depths:
        throw_exception_if_processing_interrupted()
        same, w2c = tolerances[view], scene.cameras.w2c[view]
        K, picture, depth = _smaller(scene.pictures[view], depths[view], scene.cameras.K[view], scale)
        slopes, good = _slopes(depth, K)
        cloud = unproject(picture, depth[good], good, w2c, K)
        y, x = good.nonzero(as_tuple=True)
        sizes, rotations = _surfels(x, y, depth[good], slopes[:, good], w2c, K)
        new = Gaussians(cloud.points, sizes, rotations, cloud.colors)
        seen = [(depths[n], scene.cameras.w2c[n], scene.cameras.K[n], same) for n in (view, *others[view])]
        alive = ~seen_through(new.points, seen)
        if made is not None:
            number = torch.full(depth.shape, -1)
            number[good] = torch.arange(len(new))
            u, v, z = project(made.points, w2c, K)
            inside = (z > 0) & (u >= 0) & (u < depth.shape[1]) & (v >= 0) & (v < depth.shape[0])
            there = number[v[inside].long(), u[inside].long()]
            pair = (there >= 0) & ((depth[v[inside].long(), u[inside].long()] / z[inside] - 1).abs() <= same)
            old, there = inside.nonzero().squeeze(1)[pair], there[pair]
            fine = made.sizes[old, 0] <= FINER * new.sizes[there, 0]
            shown = torch.zeros(depth.shape)
            shown[y[there[fine]], x[there[fine]]] = 1
            closed = -F.max_pool2d(-F.max_pool2d(shown[None], 3, 1, 1), 3, 1, 1)[0]  # gaps between Gaussians
            alive &= closed[good] == 0
            keep = torch.ones(len(made), dtype=torch.bool)
            keep[old[~fine & alive[there]]] = False
            made = made[keep]
        made = new[alive] if made is None else made + new[alive]
        progress(1)
    return made


def _smaller(picture, depth, K, scale):
    """Intrinsics, picture [h, w, 3] in 0..1 and depth [h, w] of a view, `scale` times smaller."""
    size = [max(1, round(side / scale)) for side in depth.shape]
    K = K * K.new_tensor([size[1] / depth.shape[1], size[0] / depth.shape[0], 1.0])[:, None]
    picture = F.interpolate(picture.movedim(-1, 0)[None].float() / 255, size, mode="area")[0].movedim(0, -1)
    return K, picture, F.interpolate(depth[None, None], size, mode="nearest-exact")[0, 0]


def _slopes(depth, K):
    """The slopes [2, H, W] of the disparity a pixel to the right and down, and which pixels lie on a surface: of the two sides the
    smaller slope is taken, so that an edge beside a pixel does not bend it, and none where they differ in sign."""
    depth, good = despeckled(depth)
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
    # Of a plane a X + b Y + c Z = 1 the disparity at the ray (x, y, 1) is a x + b y + c.
    a, b, x, y = K[0, 0] * slopes[0], K[1, 1] * slopes[1], (x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1]
    c = disparity - a * x - b * y
    lengths = (a * a + b * b + c * c).sqrt() * (x * x + y * y + 1).sqrt()
    return slopes, good & ~edge & (disparity >= STEEPEST * lengths)


def _surfels(x, y, depth, slopes, w2c, K):
    """Sizes [P, 3] and rotations [P, 4] of the Gaussians that cover the pixels x, y [P] on their surfaces."""
    to_camera = torch.linalg.inv(K)
    rays = torch.stack([x + 0.5, y + 0.5, torch.ones_like(depth)], 1) @ to_camera.T
    # The surface's steps [P, 3, 2] from a pixel to the next on both axes, in the world.
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
