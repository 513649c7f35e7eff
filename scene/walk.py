"""A path through a scene: the render of the cloud, the references from memory, and what is remembered of the result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..core import throw_exception_if_processing_interrupted
from .cameras import Cameras, float64_device
from .depth import in_front
from .fuse import FrameFit, FuseReport, fuse
from .memory import asked_views, best_views, choose_references, frames_to_remember, picture_quality, view_scores
from .pictures import resize_pictures
from .render import BACKGROUND, POINTS_PER_PIXEL, check_size, render_start
from .scene import Scene, to_bytes

FIRST, LAST = "first", "last"  # views to start from
ASK_NOTHING, ASK_SPARSELY, ASK_OFTEN, ASK_MIRRORED = ASKING = (
    "nothing",
    "continue it (now and then)",
    "continue it (mostly)",
    "mirror it",
)


@dataclass(frozen=True)
class PreparedPath:
    """A path's render and references. video [N, H, W, 3] in 0..1 and holes [N, H, W]: the cloud seen by each camera,
    with the picture as the first frame. views: the numbers of the scene's views that are references; pictures [R, H, W,
    3] in 0..1 and ref_index are theirs."""

    video: torch.Tensor
    holes: torch.Tensor
    pictures: torch.Tensor
    views: tuple[int, ...]
    ref_index: tuple[int, ...]


def prepare_path(
    scene: Scene,
    image: torch.Tensor,
    cameras: Cameras,
    keyframes: int,
    references: int,
    ask: str,
    ask_path: str,
    embed: Callable[[torch.Tensor], torch.Tensor] | None,
    radius: float,
    device: str | torch.device,
    progress: Callable[[int], None],
) -> PreparedPath:
    """The render and references, at the scene's size, of a path that starts with the picture image [1, H, W, C].

    keyframes: how many of the cameras the model takes (`Cameras.thinned`, as in the conditioning). References are
    chosen for these, so that ref_index counts the keyframes that the model gets. WorldStereo's own retrieval takes
    every fourth camera of a longer path, which is the same for its 81 cameras and 21 keyframes; with 41 or 161 cameras
    these would not be the model's keyframes. references: the largest number of them.
    ask: one of ASKING; ask_path: the earlier path it refers to, or empty for the last one. embed: maps pictures
    [B, H, W, 3] in 0..1 to embeddings [B, D]; it is called only if more than `references` views were chosen. radius,
    device, progress: as in `render.render`. Raises ValueError for a single camera, as `render_start` does, and for an
    ask_path that does not exist.
    """
    if len(cameras) < 2:
        raise ValueError("cameras holds one camera; a path needs at least 2.")
    cameras = cameras.scaled_to(scene.cameras.width, scene.cameras.height)
    views, ref_index = references_of(scene, cameras.thinned(keyframes), references, ask, ask_path, embed)
    width, height = cameras.width, cameras.height
    splats = (radius, POINTS_PER_PIXEL, BACKGROUND, device, progress)
    video, holes, _ = render_start(image, scene.cloud, cameras, "", 0, 0, width, height, *splats)
    pictures = torch.cat([scene.picture(view) for view in views])
    return PreparedPath(video, holes, pictures, tuple(views), tuple(ref_index))


def references_of(
    scene: Scene,
    cameras: Cameras,
    limit: int,
    ask: str,
    ask_path: str,
    embed: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[list[int], list[int]]:
    """`memory.choose_references` for a scene; the arguments are those of `prepare_path`. Pictures are compared only if
    more than `limit` views were chosen, and only those. Raises ValueError for an earlier path that does not exist."""
    asked = None
    if ask != ASK_NOTHING:
        if not scene.paths:
            raise ValueError('ask_for: the scene has no earlier path to ask for; choose "nothing".')
        earlier = scene.path(ask_path) if ask_path else scene.paths[-1]
        asked = asked_views(earlier.views, len(cameras), ask == ASK_MIRRORED, ask != ASK_OFTEN)
    bank, size = scene.cameras, (scene.cameras.width, scene.cameras.height)
    features = quality = None
    scores = view_scores(bank.w2c.double(), bank.K.double(), cameras.w2c[1:].double(), cameras.K[1:].double(), *size)
    chosen = best_views(scores, asked).unique()
    if len(chosen) > limit:
        quality = torch.zeros(len(scene))
        quality[chosen] = torch.tensor([picture_quality(scene.pictures[view]) for view in chosen])
        if embed is not None:
            embedded = embed(torch.cat([scene.picture(view) for view in chosen])).float().cpu().flatten(1)
            features = torch.zeros(len(scene), embedded.shape[1])
            features[chosen] = embedded
    return choose_references(
        bank.w2c, bank.K, *size, cameras.w2c, cameras.K, features=features, quality=quality, ask=asked, limit=limit
    )


def start_view(scene: Scene, view: str) -> int:
    """The number of the view to start from: "first", "last" (the last frame of the last path; without a path the first
    view), or a name. Raises ValueError for a name that the scene does not have."""
    if view in ("", LAST):
        return scene.paths[-1].views[-1] if scene.paths else 0
    return 0 if view == FIRST else scene.view(view)


def new_path_name(scene: Scene) -> str:
    """The first of path_1, path_2, … that the scene does not have."""
    taken = {path.name for path in scene.paths}
    return next(name for number in range(1, len(taken) + 2) if (name := f"path_{number}") not in taken)


class _Pictures(Sequence):
    """Some frames of a clip [N, H, W, C] in 0..1, resized, uint8 [height, width, 3]. Each is made when it is asked for:
    all of a long clip would take gigabytes."""

    def __init__(self, images, frames, height, width):
        self.images, self.frames, self.size = images, frames, (height, width)

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, place):
        return to_bytes(resize_pictures(self.images[self.frames[place]][None], *self.size))[0]


def remember_clip(
    scene: Scene,
    images: torch.Tensor,
    cameras: Cameras,
    name: str,
    count: int,
    depths: Sequence[torch.Tensor] | None,
    points: int,
    device: str | torch.device,
    progress: Callable[[int], None],
) -> tuple[Scene, FuseReport | None]:
    """The scene with a clip [N, H, W, C] in 0..1: `count` of its frames become views and, if depths (maps [h, w] of all
    frames or of these views) are given, the points they show are added, and the cloud is thinned to `points`. Also the
    report of `fuse`, if it ran.

    cameras: of the clip's frames; if there are more, they are thinned as the conditioning thins them. name: the path's,
    or empty for the next number. A frame whose depth fits the cloud keeps that depth, in the scene's units.
    Raises ValueError for fewer cameras than frames, another number of depths, and as `Scene` and `fuse` do.
    """
    name = name.strip() or new_path_name(scene)
    cameras = cameras.of_frames(len(images)).scaled_to(scene.cameras.width, scene.cameras.height)
    frames = frames_to_remember(len(images), count)
    check_size(len(images), cameras.height, cameras.width)
    pictures = list(_Pictures(images, frames, cameras.height, cameras.width))
    report, kept = None, None
    if depths is not None:
        seen = frames
        if len(depths) == len(images):
            seen, depths = list(range(1, len(images))), depths[1:]  # the scene already has the first frame
        elif len(depths) != len(frames):
            raise ValueError(
                f"There are {len(images)} images, of which {len(frames)} are remembered, but depth for {len(depths)}: "
                "give the depth of all images, or set remember to the same number in Keyframe Depth and Add to Scene."
            )
        cloud, report = fuse(
            scene.cloud,
            pictures if seen == frames else _Pictures(images, seen, cameras.height, cameras.width),
            depths,
            cameras[seen],
            names=[f"{name}/{frame:04}" for frame in seen],
            limit=points,
            device=device,
            progress=progress,
        )
        device = float64_device(device)  # where `fuse` computes
        size = cameras.height, cameras.width
        places = [seen.index(frame) for frame in frames]
        kept = [fitted_depth(depths[place].to(device), report.frames[place], *size) for place in places]
        scene = scene.with_cloud(cloud)
    return scene.with_path(name, cameras, frames, pictures, kept), report


def fitted_depth(depth: torch.Tensor, fit: FrameFit, height: int, width: int) -> torch.Tensor | None:
    """A frame's depth [h, w] by its fit, in the scene's units and resized to [height, width] (nearest), infinite where
    there is none; None for a frame that was refused."""
    if fit.refused:
        return None
    throw_exception_if_processing_interrupted()
    depth = torch.nn.functional.interpolate(depth[None, None].float(), (height, width), mode="nearest-exact")[0, 0]
    fitted = fit.scale * depth + fit.shift
    return fitted.where(in_front(depth) & (fitted > 0), torch.inf).cpu()
