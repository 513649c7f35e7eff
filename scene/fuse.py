"""Adding new frames to the point cloud: their depth is fitted to the cloud's, and the points they add are kept.

A depth model gives a frame's depth only up to scale and, for some models, shift. Both are found from the depth that the
cloud already has in that camera (the global geometric memory of HY-World and WorldStereo).
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from ..core import throw_exception_if_processing_interrupted
from .cameras import Cameras, float64_device
from .depth import EDGE_PIXELS, draw_in, in_front, on_edge, unproject
from .pointcloud import PIECE, PointCloud, neighbour_distances
from .render import RADIUS, pixels_of, project
from .stop import pieces, stoppable

POINTS_LIMIT = 2_000_000
RESIDUAL_LIMIT = 0.08  # median relative error of the fitted depth above which a frame is refused
OVERLAP_LIMIT, SAMPLES_LIMIT = 0.02, 100  # a fit needs at least this share of a frame's pixels, and this many points
SAME_SURFACE = 0.02  # relative distance of two depths up to which they are one surface; see `FrameFit.same`
SPECKLE = 0.1  # relative distance of a depth from the median of the 3x3 around it
FIT_SCALE = 0.05  # relative error; a pair with this error or more counts as an outlier of a guess
FIT_SAMPLES, FIT_GUESSES, FIT_ROUNDS = 10_000, 512, 20
FIT_TRIAL = 2000  # about how many pairs the guesses are tried on
FIT_PRECISION = 1e-6  # change of the relative errors at which a fit is done
SHIFT_GAIN = 0.7  # a shift is used where it reduces the residual below this share of the residual without one
DISPARITY_GAIN = 0.25  # the input is taken for a disparity if that reduces the residual below this share
NEIGHBOURS, DEVIATIONS = 20, 2.0
VOXEL_TOLERANCE, VOXEL_ROUNDS, VOXEL_BITS = 0.2, 40, 20
VOXEL_PIECE = 1 << 20  # points sorted into voxels at a time


@dataclass(frozen=True)
class FrameFit:
    """How one frame was fitted: cloud depth = scale * depth + shift. overlap: the share of the frame's valid pixels
    that the cloud covers. residual: the median relative error there. added: the number of new points. refused: the
    reason, or empty. Without a fit, scale is 0 and residual infinite."""

    name: str
    overlap: float
    scale: float = 0.0
    shift: float = 0.0
    residual: float = float("inf")
    added: int = 0
    refused: str = ""

    @property
    def same(self) -> float:
        """The relative distance up to which this frame's depths and others' count as one surface."""
        return max(SAME_SURFACE, 3 * self.residual)


@dataclass(frozen=True)
class FuseReport:
    """Points before and after; points dropped because other frames see through them, and because they lie far from
    their neighbours; the voxel size of the thinning in scene units (0: none); and a fit for each frame."""

    before: int
    after: int
    seen_through: int
    outliers: int
    voxel: float
    frames: tuple[FrameFit, ...]

    def __str__(self):
        fitted = [frame for frame in self.frames if not frame.refused]
        lines = [f"{self.before:,} points before, {self.after:,} after"]
        if fitted:
            overlap = sum(frame.overlap for frame in fitted) / len(fitted)
            worst = max(frame.residual for frame in fitted)
            lines.append(f"{len(fitted)} frames fitted, overlap {overlap:.0%}, residual at most {worst:.1%}")
        else:
            lines.append(f"NO POINTS ADDED: none of the {len(self.frames)} frames fits the scene")
        return "\n".join(
            [*lines, *(f"{frame.name} refused: {frame.refused}" for frame in self.frames if frame.refused)]
        )


def fuse(
    cloud: PointCloud,
    frames: torch.Tensor | Sequence[torch.Tensor],
    depths: Sequence[torch.Tensor],
    cameras: Cameras,
    *,
    names: Sequence[str] | None = None,
    shift: bool = True,
    limit: int = POINTS_LIMIT,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda frames: None,
) -> tuple[PointCloud, FuseReport]:
    """The cloud with the points that new frames add, and a report. `cloud` itself is not changed.

    frames: N pictures [H, W, 3], uint8 or float in 0..1. depths: N maps [h, w], each in its own units, NaN, infinite or
    <= 0 where there is none; they are resized to the pictures (nearest). cameras: N, of any picture size. names: of the
    frames, for the report. shift: whether to fit a shift beside the scale.

    One frame after the other is fitted to the depth of the cloud so far (`fit_depth`), and its points are added where
    the cloud has a hole or lies behind. Depth edges and speckles give no points, and far depths are compressed.
    Finally, new points are dropped if at least as many frames see through them as see them (things that moved) or if
    they lie far from their neighbours, and the whole is thinned to about `limit` points.

    A frame adds nothing if it overlaps the cloud too little, if its fitted depth is off by more than RESIDUAL_LIMIT, or
    if its disparity fits far better than its depth; the report and a warning in the log name it. progress(1) is called
    after every frame. device: a CUDA GPU; anything else means the CPU (`float64_device`). Raises ValueError for counts
    that differ and for an empty cloud.
    """
    if not len(frames) == len(depths) == len(cameras):
        raise ValueError(
            f"There are {len(frames)} frames, {len(depths)} depth maps and {len(cameras)} cameras: each frame needs "
            "its own depth and camera."
        )
    if len(cloud) == 0:
        raise ValueError("The cloud is empty: there is nothing to fit new depth to.")
    names = names or [f"frame {number}" for number in range(len(frames))]
    device = float64_device(device)
    points, colors, old = cloud.points.to(device), cloud.colors.to(device), len(cloud)
    fits, seen = [], []
    for name, frame, depth, w2c, K in zip(names, frames, depths, cameras.w2c, cameras.K):
        throw_exception_if_processing_interrupted()
        height, width = frame.shape[:2]
        K = K * K.new_tensor([width / cameras.width, height / cameras.height, 1.0])[:, None]
        fit, depth, new = _fit_frame(name, points, depth.to(device), w2c, K, height, width, shift)
        if fit.refused:
            logging.warning("WorldStereo: %s adds nothing to the cloud. It was refused: %s", name, fit.refused)
        else:
            picture = frame[..., :3].to(device).float() / (255 if frame.dtype == torch.uint8 else 1)
            added = unproject(picture, depth[new], new, w2c, K)
            points, colors = torch.cat([points, added.points]), torch.cat([colors, added.colors])
            seen.append((depth.cpu(), w2c, K, fit.same))
        if len(points) > 2 * limit:  # bounds the memory
            keep, _ = thin_by_voxels(points, limit)
            points, colors, old = points[keep], colors[keep], int((keep < old).sum())
        fits.append(fit)
        progress(1)
    known = torch.ones(old, dtype=torch.bool, device=device)
    keep = torch.cat([known, ~seen_through(points[old:], seen)])
    seen.clear()  # the depths of many large frames take gigabytes
    passed, points, colors = int((~keep).sum()), points[keep], colors[keep]
    keep = torch.cat([known, ~outliers(points.cpu(), old).to(device)])
    far_off, points, colors = int((~keep).sum()), points[keep], colors[keep]
    keep, voxel = thin_by_voxels(points, limit)
    fused = PointCloud(points[keep].cpu(), colors[keep].cpu())
    if all(fit.refused for fit in fits):
        logging.warning(
            "WorldStereo: none of the %d frames fits the scene's point cloud, which stays as it is.", len(fits)
        )
    return fused, FuseReport(len(cloud), len(fused), passed, far_off, voxel, tuple(fits))


def seen_through(
    points: torch.Tensor, seen: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]
) -> torch.Tensor:
    """Which of points [P, 3] at least as many frames see through as see (things that moved, and errors), a mask [P].
    seen: each frame's depth [H, W], its w2c [4, 4] and K [3, 3], and the relative distance within which depths are one
    surface (`FrameFit.same`)."""
    votes = torch.zeros(len(points), dtype=torch.int32, device=points.device)
    for depth, w2c, K, same in seen:
        height, width = depth.shape
        depth = depth.to(points.device)
        for part in pieces(len(points), PIECE):
            index, row, column, z = pixels_of(points[part], w2c, K, height, width)
            ratio = depth[row, column] / z
            ratio[ratio.isinf()] = 0  # no depth: no vote
            votes[part][index] += (ratio > 1 + same).int() - ((ratio - 1).abs() <= same).int()
    return votes >= 0


def cloud_depth(
    points: torch.Tensor, w2c: torch.Tensor, K: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The depth of the nearest of points [P, 3] in each pixel, [H, W], infinite where there is none, and the index of
    that point, [H, W], -1 where there is none. w2c [4, 4], K [3, 3] in pixels of the height x width picture."""
    none = torch.iinfo(torch.int64).max
    nearest = torch.full((height * width,), none, device=points.device)
    for part in pieces(len(points), PIECE):
        index, row, column, z = pixels_of(points[part], w2c, K, height, width)
        key = (z.view(torch.int32).long() << 32) | (index + part.start)  # positive floats order like their bits
        nearest.scatter_reduce_(0, row * width + column, key, "amin")
    number = torch.where(nearest == none, -1, nearest & 0xFFFFFFFF).view(height, width)
    depth = (nearest >> 32).int().view(torch.float32).masked_fill(nearest == none, torch.inf).view(height, width)
    return depth, number


def _nearest_around(depth, reach):
    """The nearest depth in the (2 reach + 1)² pixels around each: the surface behind the gaps between points."""
    side = 2 * reach + 1
    columns = F.max_pool2d(-depth[None, None], (side, 1), 1, (reach, 0))
    return -F.max_pool2d(columns, (1, side), 1, (0, reach))[0, 0]


def fit_depth(depth: torch.Tensor, target: torch.Tensor, shift: bool = True) -> tuple[float, float, float]:
    """scale, shift and residual of target = scale * depth + shift over pairs [P], both above 0.

    Robust: guesses are made from one or two pairs each, and the best of them (M-estimator sample consensus, Torr and
    Zisserman 2000) is refined by least squares with Tukey's weights, all on the error relative to target. The residual
    is the median of that error over all pairs. A shift is used only if it clearly reduces the residual: where the
    overlap has a single depth, any shift would fit. Deterministic.
    """
    every = torch.linspace(0, len(depth) - 1, min(len(depth), FIT_SAMPLES)).long().to(depth.device)
    depth, target = depth[every].double(), target[every].double()
    pairs = torch.stack([depth / target, 1 / target])
    drawn = torch.randint(len(depth), (2, FIT_GUESSES), generator=torch.Generator().manual_seed(0)).to(depth.device)
    (d0, d1), (z0, z1) = depth[drawn], target[drawn]
    scales = z0 / d0
    best = _refined(pairs, torch.stack([scales, torch.zeros_like(scales)], 1), False)
    if shift:
        slopes = (z1 - z0) / (d1 - d0)
        guesses = torch.stack([slopes, z0 - slopes * d0], 1)
        guesses = guesses[guesses.isfinite().all(1) & (slopes > 0)]
        if len(guesses):
            shifted = _refined(pairs, guesses, True)
            best = shifted if shifted[0] > 0 and shifted[2] < SHIFT_GAIN * best[2] else best
    return best


def _disparity_words(depth: torch.Tensor, target: torch.Tensor, residual: float) -> str:
    """What to do if the input fits far better as a disparity, up to scale and shift, than as a depth; empty if not."""
    if fit_depth(1 / depth, 1 / target)[2] <= DISPARITY_GAIN * residual:
        return "It is affine in disparity: right only up to a shift of 1/depth. Give MoGe's depth, or a metric one."
    if fit_depth(depth, 1 / target)[2] <= DISPARITY_GAIN * residual:
        return "It is a disparity (large is near), not a depth. Give MoGe's depth, or a metric one."
    return ""


def _refined(pairs, guesses, shift):
    """Scale and shift of the guess that most pairs agree with, refined, and its residual. pairs: depth / target and
    1 / target, [2, P]; guesses: [G, 2].

    The refining is in NumPy, in one thread: with so few pairs, launching kernels on a GPU takes longer, and PyTorch's CPU
    threads wait for each other on a busy machine.
    """
    trial = pairs[:, :: math.ceil(pairs.shape[1] / FIT_TRIAL)]
    # Not a matrix product: for so few numbers, cuBLAS takes longer to load than this to compute.
    errors = guesses[:, :1] * trial[0] + guesses[:, 1:] * trial[1] - 1
    costs = errors.abs().clamp(max=FIT_SCALE).sum(1)
    answer, pairs = guesses[costs.argmin()].cpu().numpy(), pairs.cpu().numpy()
    used = 2 if shift else 1
    x, y = pairs
    with np.errstate(invalid="ignore", over="ignore"):
        moments = np.stack([x * x, x * y, y * y, x, y])
        error = _relative_error(answer, pairs)
        for _ in range(FIT_ROUNDS):
            size = np.abs(error)
            close = size[size < FIT_SCALE]
            spread = np.clip(4.685 * 1.4826 * _median(close), 1e-4, FIT_SCALE) if len(close) else FIT_SCALE
            weight = np.clip(1 - (error / spread) ** 2, 0, None) ** 2  # Tukey's
            xx, xy, yy, *right = sums = np.einsum("mp,p->m", moments, weight)
            if not np.isfinite(sums).all():
                break
            answer[:used] = np.linalg.lstsq(np.array([[xx, xy], [xy, yy]])[:used, :used], np.array(right[:used]))[0]
            before, error = error, _relative_error(answer, pairs)
            if np.abs(error - before).max() <= FIT_PRECISION:
                break
        residual = _median(np.abs(error))
    return float(answer[0]), float(answer[1]), float(residual)


def _median(values):
    """The lower median; NumPy's own function takes ten times as long."""
    middle = (len(values) - 1) // 2
    return np.partition(values, middle)[middle]


def _relative_error(answer, pairs):
    return answer[0] * pairs[0] + answer[1] * pairs[1] - 1


def _fit_frame(name, points, depth, w2c, K, height, width, shift):
    """The frame's fit, its fitted depth [H, W] and a mask [H, W] of the pixels that give new points."""
    depth = F.interpolate(depth[None, None].float(), (height, width), mode="nearest-exact")[0, 0]
    depth, good = despeckled(depth)
    throw_exception_if_processing_interrupted()
    seen, number = cloud_depth(points, w2c, K, height, width)
    close = stoppable(_nearest_around, seen, 1)  # a pixel is a hole if none of the eight around it has a point either
    reach = max(1, round(RADIUS * min(height, width) / 2))  # a splat's radius
    surface = stoppable(_nearest_around, seen, reach)
    throw_exception_if_processing_interrupted()
    overlap = ((surface < torch.inf) & good).sum().item() / max(1, good.sum().item())
    # Without points that are seen through gaps in nearer ones.
    shown = points[number[(seen <= surface * (1 + FIT_SCALE)) & (number >= 0)]]
    throw_exception_if_processing_interrupted()
    u, v, z = project(shown, w2c, K)
    throw_exception_if_processing_interrupted()
    disparity = depth.reciprocal()
    there = torch.where(good & ~on_edge(disparity), disparity, torch.nan)
    grid = torch.stack([2 * u / width - 1, 2 * v / height - 1], 1)[None, None]
    throw_exception_if_processing_interrupted()
    sampled = F.grid_sample(there[None, None], grid, padding_mode="border", align_corners=False).flatten()
    index = (sampled > 0).nonzero().squeeze(1)
    if overlap < OVERLAP_LIMIT or len(index) < SAMPLES_LIMIT:
        reason = f"it sees too little of the cloud to fit its depth: {overlap:.1%} of its pixels."
        return FrameFit(name, overlap, refused=reason), None, None
    throw_exception_if_processing_interrupted()
    given, z = sampled[index].reciprocal(), z[index]
    scale, offset, residual = fit_depth(given, z, shift)
    advice = _disparity_words(given, z, residual) if residual > SAME_SURFACE else ""
    if advice or not residual <= RESIDUAL_LIMIT:
        reason = f"its depth does not fit the cloud's, residual {residual:.1%} (at most {RESIDUAL_LIMIT:.0%}). "
        reason += "Is it of this scene, and is this its camera?"
        if advice:
            reason = f"its depth does not fit the cloud's, residual {residual:.1%}. {advice}"
        return FrameFit(name, overlap, scale, offset, residual, 0, reason), None, None
    throw_exception_if_processing_interrupted()
    depth = scale * depth + offset
    valid = in_front(depth)
    good &= valid
    depth = torch.where(valid, depth, torch.inf)
    depth[good] = stoppable(draw_in, depth[good])
    fit = FrameFit(name, overlap, scale, offset, residual)
    new = good & ~on_edge(depth.reciprocal()) & (depth < close * (1 - fit.same))
    fit = replace(fit, added=int(new.sum()))
    return fit, torch.where(good, depth, torch.inf), new


def despeckled(depth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The depth map [H, W], infinite where there is none, with speckles replaced by the median around them; and a mask
    [H, W] of the pixels that had a depth and were not speckles."""
    height, width = depth.shape
    depth = torch.where(in_front(depth), depth, torch.inf)
    median, rows = torch.empty_like(depth), max(1, EDGE_PIXELS // width)
    for band in pieces(height, rows):  # nine times the whole of a large map would take gigabytes
        top, bottom = band.start, band.stop
        part = depth[None, None, max(0, top - 1) : bottom + 1]
        padded = F.pad(part, (1, 1, int(top == 0), int(bottom == height)), mode="replicate")[0, 0]
        around = [padded[y : y + bottom - top, x : x + width] for y in range(3) for x in range(3)]
        median[band] = torch.stack(around).median(0).values
    speckle = ~((depth / median - 1).abs() <= SPECKLE)
    good = (depth < torch.inf) & ~speckle
    return torch.where(speckle, median, depth), good


def outliers(points: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Which of points[start:] are outliers, a mask [P - start]: those whose mean distance to their 20 nearest
    neighbours among all points [P, 3] exceeds the mean of these distances by more than 2 standard deviations (as in
    HY-World)."""
    if len(points) - start < 2 or len(points) <= NEIGHBOURS:
        return torch.zeros(len(points) - start, dtype=torch.bool)
    mean = neighbour_distances(points, NEIGHBOURS, start)
    return mean > mean.mean() + DEVIATIONS * mean.std(correction=0)


def thin_by_voxels(points: torch.Tensor, limit: int) -> tuple[torch.Tensor, float]:
    """The indices, ascending, of the points [P, 3] that are kept if each voxel keeps its first one, and the voxel size.

    The size is found by bisection, so that at most `limit` points are kept, and at least 80 % of that (fewer only if
    points coincide). If there are no more than `limit`, all are kept, and the size is 0.
    """
    if len(points) <= limit:
        return torch.arange(len(points), device=points.device), 0.0
    low, high = stoppable(partial(torch.aminmax, dim=0), points)
    extent = (high - low).max().item()
    small, large = extent / (1 << VOXEL_BITS), extent
    size, keep = large, torch.zeros(1, dtype=torch.long, device=points.device)
    for _ in range(VOXEL_ROUNDS):
        middle = (small * large) ** 0.5
        kept = _first_of_voxels(points, low, middle, limit)
        if kept is None:
            small = middle
            continue
        size, keep, large = middle, kept, middle
        if len(kept) >= (1 - VOXEL_TOLERANCE) * limit:
            break
    return keep, size


def _first_of_voxels(points, low, size, limit):
    """The numbers, rising, of the first point in each voxel; None where more than `limit` voxels hold points."""
    # Of the voxels found so far, rising, and the number of each one's first point.
    keys = numbers = torch.zeros(0, dtype=torch.long, device=points.device)
    for part in pieces(len(points), VOXEL_PIECE):
        x, y, z = ((points[part] - low) / size).long().unbind(1)
        key, order = (((x << VOXEL_BITS + 1) | y) << VOXEL_BITS + 1 | z).sort(stable=True)
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = key[1:] != key[:-1]
        place = torch.searchsorted(keys, key)
        if len(keys):
            first &= keys[place.clamp(max=len(keys) - 1)] != key
        key, place = key[first], place[first]
        if len(keys) + len(key) > limit:
            return None
        new = torch.zeros(len(keys) + len(key), dtype=torch.bool, device=points.device)
        new[place + torch.arange(len(key), device=points.device)] = True  # each goes before the one found at its place
        merged = keys.new_empty(2, len(new))
        merged[:, new] = torch.stack([key, order[first] + part.start])
        merged[:, ~new] = torch.stack([keys, numbers])
        keys, numbers = merged
    return numbers.sort().values
