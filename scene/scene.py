"""A scene that remembers: the views seen so far, their cameras, the points they show, and the paths taken.

Scenes are immutable: methods return new ones, which share the pictures and depths of the old one.
"""

from dataclasses import dataclass, replace

import torch

from ..files.text import shown
from .cameras import Cameras, check_lengths
from .pictures import as_bytes
from .pointcloud import PointCloud

MAX_VIEWS, MAX_PIXELS = 1000, 1000 * 832 * 480  # 1.2 GB of pictures, and 1.6 GB of depths where all views have them
MAX_POINTS = 4_000_000  # 96 MB
MAX_NAME = 200  # characters


@dataclass(frozen=True, eq=False)
class TakenPath:
    """A path that was generated. cameras: of all its frames. views: the numbers of the scene's views that were
    remembered from it, in order; the last one is the path's last frame."""

    name: str
    cameras: Cameras
    views: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scene:
    """N views of one world, all of the same size.

    pictures: N of uint8 [H, W, 3]. cameras: N, of W x H pictures. names: N different ones, which say where a view comes
    from ("start", "panorama/0013", "path_1/0012"). depths: for each view float32 [H, W] along z in the cameras' units,
    infinite where there is none, or None. cloud: the points seen. paths: in the order taken.

    Raises ValueError if counts or sizes differ, names repeat, or MAX_VIEWS, MAX_PIXELS or MAX_POINTS is exceeded.
    """

    pictures: tuple[torch.Tensor, ...]
    cameras: Cameras
    names: tuple[str, ...]
    depths: tuple[torch.Tensor | None, ...]
    cloud: PointCloud
    paths: tuple[TakenPath, ...] = ()

    def __post_init__(self):
        check_lengths(
            "The scene's views do not match: {}. Each view has one of each.",
            pictures=self.pictures,
            cameras=self.cameras,
            names=self.names,
            depths=self.depths,
        )
        if len(self.pictures) > MAX_VIEWS:
            raise ValueError(
                f"The scene would hold {len(self.pictures)} views; at most {MAX_VIEWS} are allowed. Remember fewer "
                "frames of each path, or continue in a new scene."
            )
        if len(self.pictures) * self.cameras.width * self.cameras.height > MAX_PIXELS:
            raise ValueError(
                f"The scene would hold {len(self.pictures)} views of {self.cameras.width}x{self.cameras.height}; it holds "
                f"at most {MAX_PIXELS // 10**6} megapixels. Remember fewer frames of each path, or start with smaller views."
            )
        if len(self.cloud) > MAX_POINTS:
            raise ValueError(f"The scene's cloud has {len(self.cloud):,} points: thin it to at most {MAX_POINTS:,}.")
        size = (self.cameras.height, self.cameras.width)
        for name, picture, depth in zip(self.names, self.pictures, self.depths):
            if picture.dtype != torch.uint8 or picture.shape != (*size, 3):
                raise ValueError(
                    f"The picture of view '{shown(name)}' is {list(picture.shape)} of {picture.dtype}: the scene's are "
                    f"{[*size, 3]} of bytes."
                )
            if depth is not None and depth.shape != size:
                raise ValueError(
                    f"The depth of view '{shown(name)}' is {list(depth.shape)}: the scene's are {list(size)}."
                )
        _check_names("view", self.names)
        _check_names("path", [path.name for path in self.paths])

    def __len__(self):
        return len(self.pictures)

    def __str__(self):
        with_depth = sum(depth is not None for depth in self.depths)
        return (
            f"{len(self)} views of {self.cameras.width}x{self.cameras.height} ({with_depth} with depth), "
            f"{len(self.paths)} paths, {len(self.cloud):,} points"
        )

    def view(self, name: str) -> int:
        """The number of the view with this name. Raises ValueError if there is none."""
        return _number("view", name, self.names)

    def path(self, name: str) -> TakenPath:
        """The path with this name. Raises ValueError if there is none."""
        return self.paths[_number("path", name, [path.name for path in self.paths])]

    def picture(self, view: int) -> torch.Tensor:
        """A view's picture as ComfyUI passes pictures, [1, H, W, 3] in 0..1."""
        return self.pictures[view][None].float() / 255

    def with_views(self, pictures, cameras: Cameras, names, depths=None) -> "Scene":
        """The scene with N more views: pictures [H, W, 3] in bytes, cameras of any picture size, names, and depths
        [H, W] or None. Raises ValueError as `Scene` does."""
        cameras = cameras.scaled_to(self.cameras.width, self.cameras.height)
        w2c = torch.cat([self.cameras.w2c, cameras.w2c])
        K = torch.cat([self.cameras.K, cameras.K])
        return replace(
            self,
            pictures=(*self.pictures, *pictures),
            cameras=Cameras(w2c, K, cameras.width, cameras.height),
            names=(*self.names, *names),
            depths=(*self.depths, *([None] * len(cameras) if depths is None else depths)),
        )

    def with_path(self, name: str, cameras: Cameras, remembered: list[int], pictures, depths=None) -> "Scene":
        """The scene with a path of these cameras. The frames with the numbers `remembered` become views, named
        NAME/0012 by frame. pictures, depths: of these frames, as in `with_views`. Raises ValueError as `Scene` does."""
        first = len(self)
        names = [f"{name}/{frame:04}" for frame in remembered]
        scene = self.with_views(pictures, cameras[list(remembered)], names, depths)
        views = tuple(range(first, first + len(remembered)))
        return replace(scene, paths=(*self.paths, TakenPath(name, cameras, views)))

    def with_cloud(self, cloud: PointCloud) -> "Scene":
        """The scene with other points."""
        return replace(self, cloud=cloud)


def to_bytes(pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pictures [N, H, W, C] in 0..1 in a scene's form: N of uint8 [H, W, 3]."""
    return tuple(as_bytes(pictures[..., :3].float().cpu()).unbind())


def _check_names(kind: str, names):
    for name in names:
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise ValueError(f"The name of a {kind} is '{shown(name)}': give 1 to {MAX_NAME} printable characters.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"The scene has a {kind} named '{shown(twice)}' already: give another name.")


def _number(kind: str, name: str, names) -> int:
    if name not in names:
        known = ", ".join(f"'{shown(other)}'" for other in names[-10:]) or "none"
        raise ValueError(f"The scene has no {kind} named '{shown(name)}'; it has (the last ten): {known}.")
    return list(names).index(name)
