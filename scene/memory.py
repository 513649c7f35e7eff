"""A scene's memory, by the rules of WorldStereo's memory bank: which views become references of a new path, which
frames of a new clip are remembered, and which views a path prefers that follows or mirrors an earlier one.

All of it is geometry in float64. Bounding boxes are aligned with the axes of the cameras' world, so the same cameras in
a rotated world may give other references.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .cameras import centres, rotation_to_quaternion

REFERENCES = 8  # the most the model was trained with
REMEMBERED = 8  # of the 21 keyframes of a clip, as in the original
NEAR, FAR = 0.1, 10.0  # distances from the camera between which frusta are compared, in scene units
STEEPNESS = 5.0  # with which the score falls beyond FREE_ANGLE
FREE_ANGLE = 90.0  # degrees between two viewing directions up to which the score does not fall
ASKED = 1.0  # added to the score of a view that is asked for
CAMERA_SHARE, PICTURE_SHARE = 0.3, 0.7  # weights of the features by which the references are spread out
QUALITY_WEIGHT = 0.1
TINY = 1e-8
ASK_ALWAYS_BUT = (4, 8, 12, 16)
ASK_ONLY_AT = (1, 2, 3, 5, 7, 9, 13, 17)


def choose_references(
    w2c: torch.Tensor,
    K: torch.Tensor,
    width: float,
    height: float,
    targets_w2c: torch.Tensor,
    targets_K: torch.Tensor,
    *,
    features: torch.Tensor | None = None,
    quality: torch.Tensor | None = None,
    ask: dict[int, int] | None = None,
    limit: int = REFERENCES,
) -> tuple[list[int], list[int]]:
    """The views that become references of a path, in the order of first use, and the ref_index of each: one less than
    the first target that chose it.

    w2c [N, 4, 4], K [N, 3, 3]: the memory's cameras. targets_w2c [F, 4, 4], targets_K [F, 3, 3]: the path's keyframes,
    of which the first chooses nothing. Intrinsics are in pixels of width x height pictures. features [N, D]: any
    embedding of the pictures; quality [N]: see `picture_quality`. Both matter only if more than `limit` views were
    chosen, and only for these views; without them only cameras are compared. ask {target: view}: views to prefer.
    Raises ValueError for shapes that do not match, an empty memory, and numbers out of range.
    """
    w2c, targets_w2c = _poses(w2c, "w2c"), _poses(targets_w2c, "targets_w2c")
    K, targets_K = _intrinsics(K, len(w2c), "K"), _intrinsics(targets_K, len(targets_w2c), "targets_K")
    count, frames = len(w2c), len(targets_w2c)
    if limit < 1:
        raise ValueError(f"limit is {limit}: at least one reference is needed.")
    for name, values in (("features", features), ("quality", quality)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name} holds {len(values)} entries for {count} views: one each is needed.")
    for target, view in (ask or {}).items():
        if not 0 <= target < frames or not 0 <= view < count:
            raise ValueError(
                f"ask: target {target} asks for view {view}; targets are numbered 0 to {frames - 1} and views 0 to "
                f"{count - 1}."
            )
    if frames < 2:
        return [], []
    scores = view_scores(w2c, K, targets_w2c[1:], targets_K[1:], width, height)
    chosen = best_views(scores, ask)
    if len(chosen.unique()) > limit:
        embedding = None if features is None else torch.as_tensor(features, dtype=torch.float64)[chosen]
        goodness = None if quality is None else torch.as_tensor(quality, dtype=torch.float64)[chosen]
        picked = chosen[spread_out(w2c[chosen], embedding, goodness, limit)]
        chosen = picked[scores[:, picked].argmax(1)]
    first_use: dict[int, int] = {}
    for index, view in enumerate(chosen.tolist()):
        first_use.setdefault(view, index)
    return list(first_use), list(first_use.values())


def best_views(scores: torch.Tensor, ask: dict[int, int] | None = None) -> torch.Tensor:
    """For each target, beginning with 1, the view with the highest score, [T]. scores: [T, N]; ask: as in
    `choose_references`."""
    preferred = scores.clone()
    for target, view in (ask or {}).items():
        if target > 0:
            preferred[target - 1, view] += ASKED
    return preferred.argmax(1)


def view_scores(
    w2c: torch.Tensor, K: torch.Tensor, targets_w2c: torch.Tensor, targets_K: torch.Tensor, width: float, height: float
) -> torch.Tensor:
    """How well each of N views (w2c [N, 4, 4], K [N, 3, 3]) suits each of T targets (likewise), [T, N] float64: the
    intersection over union of their frusta's axis-aligned bounding boxes, reduced if their viewing directions differ by
    more than FREE_ANGLE."""
    low, high = _boxes(w2c, K, width, height)
    target_low, target_high = _boxes(targets_w2c, targets_K, width, height)
    shared = (torch.minimum(high, target_high[:, None]) - torch.maximum(low, target_low[:, None])).clamp(min=0).prod(2)
    union = (high - low).prod(1) + (target_high - target_low).prod(1)[:, None] - shared
    cosine = targets_w2c[:, 2, :3] @ w2c[:, 2, :3].T
    angle = torch.rad2deg(cosine.clamp(-1, 1).acos())
    return shared / (union + TINY) * torch.exp(STEEPNESS * (FREE_ANGLE - angle) / 180).clamp(max=1)


def _boxes(w2c, K, width, height):
    """The axis-aligned bounding boxes, low [N, 3] and high [N, 3], of the frusta between NEAR and FAR along the corner
    rays."""
    corners = K.new_tensor([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]])
    rays = F.normalize((torch.linalg.inv(K) @ corners.T).mT, dim=2) @ w2c[:, :3, :3]
    points = centres(w2c)[:, None] + torch.cat([NEAR * rays, FAR * rays], dim=1)
    return points.amin(1), points.amax(1)


def spread_out(w2c: torch.Tensor, features: torch.Tensor | None, quality: torch.Tensor | None, count: int) -> list[int]:
    """The indices of `count` candidates (poses [C, 4, 4], picture features [C, D] or None, quality [C] or None) that
    lie
    far apart, in the order picked: farthest-point sampling, beginning near the mean, preferring good pictures."""
    quaternion = rotation_to_quaternion(w2c[:, :3, :3])[:, [1, 2, 3, 0]]
    place = CAMERA_SHARE * _standardised(torch.cat([centres(w2c), quaternion], dim=1))
    if features is not None:
        place = torch.cat([place, PICTURE_SHARE * _standardised(features.flatten(1))], dim=1)
    q = place.new_full((len(place),), 0.5)
    if quality is not None:
        q = (quality - quality.min()) / (quality.max() - quality.min() + TINY)
    picked = [(QUALITY_WEIGHT * q - (place - place.mean(0)).norm(dim=1)).argmax().item()]
    distance = torch.full_like(q, math.inf)
    while len(picked) < count:
        distance = torch.minimum(distance, (place - place[picked[-1]]).norm(dim=1))
        gain = distance * (1 + QUALITY_WEIGHT * (q - 0.5))
        gain[picked] = -math.inf
        picked.append(gain.argmax().item())
    return picked


def _standardised(values):
    return (values - values.mean(0)) / (values.std(0, correction=0) + TINY)


def picture_quality(picture: torch.Tensor) -> float:
    """How sharp and rich in detail a picture (uint8 [H, W, 3]) is: 0.4 ln(1 + variance of its Laplacian) + 0.3 times
    the entropy of its grey histogram in bits + 0.3 times its standard deviation / 128. Red and blue are swapped in the
    grey values, as in WorldStereo."""
    grey = (picture.double() @ torch.tensor([0.114, 0.587, 0.299], dtype=torch.float64)).round()
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    laplacian = F.conv2d(F.pad(grey[None, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None])
    share = torch.bincount(grey.flatten().long(), minlength=256) / grey.numel()
    entropy = -torch.xlogy(share, share).sum() / math.log(2)
    sharpness = torch.log1p(laplacian.var(correction=0))
    return (0.4 * sharpness + 0.3 * entropy + 0.3 * grey.std(correction=0) / 128).item()


def frames_to_remember(frames: int, count: int = REMEMBERED) -> list[int]:
    """The numbers of the frames of a clip that are remembered: never the first, always the last, closer together
    towards the end. All but the first if there are no more than `count` of these. Raises ValueError for fewer than 2
    frames or a count below 1."""
    if frames < 2 or count < 1:
        raise ValueError(f"{count} of {frames} frames: a clip needs 2 frames, and at least 1 is remembered.")
    count = min(count, frames - 1)
    share, more = divmod(frames - 1 - count, count)
    steps = torch.tensor([1 + share + (place < more) for place in range(count)])
    return steps.cumsum(0).tolist()


def asked_views(views: Sequence[int], frames: int, mirrored: bool = False, sparsely: bool = True) -> dict[int, int]:
    """The views that a path of `frames` keyframes asks for, {target: view} for `choose_references`. views: those
    remembered of the earlier path that it continues or mirrors, in order.

    Of eight views, those at the places 3, 5 and 7 are asked for in turn; by a mirrored path only those in the first
    half.
    sparsely: only at the targets 1, 2, 3, 5, 7, 9, 13 and 17; otherwise at every target but 4, 8, 12 and 16.
    Raises ValueError for an earlier path of which nothing was remembered.
    """
    if not views:
        raise ValueError("The path that is asked for has no remembered views.")
    places = range(3, len(views), 2) if len(views) > 3 else [len(views) - 1]
    if mirrored:
        places = [place for place in places if place < len(views) / 2] or places[:1]
    targets = range(1, frames)
    asking = [i for i in targets if i in ASK_ONLY_AT] if sparsely else [i for i in targets if i not in ASK_ALWAYS_BUT]
    return {i: views[places[i * len(places) // frames]] for i in asking}


def _poses(poses, name):
    poses = torch.as_tensor(poses, dtype=torch.float64, device="cpu")
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or len(poses) == 0 or not poses.isfinite().all():
        raise ValueError(f"{name} has the shape {list(poses.shape)}: one or more finite 4x4 poses are needed.")
    return poses


def _intrinsics(K, count, name):
    K = torch.as_tensor(K, dtype=torch.float64, device="cpu")
    if K.shape != (count, 3, 3) or not K.isfinite().all():
        raise ValueError(f"{name} has the shape {list(K.shape)}: {count} poses need one finite 3x3 matrix each.")
    return K
