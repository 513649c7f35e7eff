"""A scene as Gaussians: one for each remembered pixel that has a depth, for viewers and renderers of splats.

Nothing is optimised: it is what the views show, where their depth puts it. The size is that of a pixel at its depth.
"""

from dataclasses import dataclass

import torch

from ..core import throw_exception_if_processing_interrupted
from .depth import points_kept, unproject
from .fuse import thin_by_voxels
from .pointcloud import splat_sizes
from .scene import Scene

SIGMA_PIXELS = 0.5  # a Gaussian's deviation: at a spacing of one pixel its neighbours close the surface
OPACITY = 0.95


@dataclass(frozen=True, eq=False)
class Gaussians:
    """points [P, 3] in the cameras' world (OpenCV axes), sizes [P] the deviations of round Gaussians, colors [P, 3] in
    0..1. All of one OPACITY."""

    points: torch.Tensor
    sizes: torch.Tensor
    colors: torch.Tensor


def gaussians_of_scene(scene: Scene, limit: int) -> Gaussians:
    """A Gaussian for each pixel of each view that has a depth map; where no view has one, for each point of the cloud.

    Depth edges are left out, far depths drawn in, as for the points of a render. More than `limit` are thinned by
    voxels, earlier views first, and what stays is widened to close the gaps. Raises ValueError for a scene that has
    neither depth nor points.
    """
    points, sizes, colors, voxel = scene.cloud.points[:0], torch.zeros(0), scene.cloud.colors[:0], 0.0
    seen = [
        view for view, depth in enumerate(scene.depths) if depth is not None and (depth.isfinite() & (depth > 0)).any()
    ]
    for view in seen:
        throw_exception_if_processing_interrupted()
        keep, depth = points_kept(scene.depths[view])
        K = scene.cameras.K[view]
        cloud = unproject(scene.pictures[view].float() / 255, depth, keep, scene.cameras.w2c[view], K)
        points, colors = torch.cat([points, cloud.points]), torch.cat([colors, cloud.colors])
        sizes = torch.cat([sizes, SIGMA_PIXELS * depth.abs() / (K[0, 0] * K[1, 1]).sqrt()])
        if len(points) > 2 * limit:  # so that the memory stays bounded
            points, sizes, colors, voxel = _thinned(points, sizes, colors, limit, voxel)
    if not seen:
        points, sizes, colors = scene.cloud.points, splat_sizes(scene.cloud), scene.cloud.colors
    if not len(points):
        raise ValueError("The scene has neither depth nor points: there is nothing to make Gaussians of.")
    points, sizes, colors, _ = _thinned(points, sizes, colors, limit, voxel)
    return Gaussians(points, sizes, colors)


def _thinned(points, sizes, colors, limit, voxel):
    keep, size = thin_by_voxels(points, limit)
    voxel = max(voxel, size)
    return points[keep], sizes[keep].clamp(min=SIGMA_PIXELS * voxel), colors[keep], voxel
