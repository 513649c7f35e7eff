"""The demo's inputs, drawn by ray casting: a picture, a camera path, and what a point cloud of the picture would show.

World axes are OpenCV's (x right, y down, z forward) with the first camera at the origin. Lengths are in metres.
"""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT, FOCAL = 384, 256, 340.0  # pixels
FRAMES = 41  # more than the model's 21, which are taken from them
FPS = 16
FLOOR_Y, WALL_Z = 1.0, 7.0
LOOK_AT = np.array([0.0, 0.2, 4.0])
SPHERES = (  # centre, radius, colour
    ((-0.9, 0.35, 3.6), 0.65, (0.85, 0.25, 0.2)),
    ((0.7, 0.6, 2.9), 0.4, (0.95, 0.75, 0.15)),
    ((0.9, 0.0, 4.8), 1.0, (0.2, 0.45, 0.85)),
)
LIGHT = np.array([-0.4, -0.8, -0.45])


def cast(origin, rays):
    """Distance [N], in lengths of `rays` [N, 3], to what each ray from `origin` hits first, and its colour [N, 3]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        planes = [(FLOOR_Y - origin[1]) / rays[:, 1], (WALL_Z - origin[2]) / rays[:, 2]]
        distances = [np.where(distance > 0, distance, np.inf) for distance in planes]
        for centre, radius, _ in SPHERES:
            a = (rays * rays).sum(1)
            b = rays @ (origin - centre)
            c = ((origin - centre) ** 2).sum() - radius**2
            distances.append(np.nan_to_num((-b - np.sqrt(b * b - a * c)) / a, nan=np.inf))
    hit = np.argmin(distances, axis=0)
    distance = np.min(distances, axis=0)
    point = origin + rays * distance[:, None]

    checks = (np.floor(point[:, 0] * 1.5) + np.floor(point[:, 2] * 1.5)) % 2
    stripes = 0.5 + 0.5 * np.sin(point[:, 0] * 3)
    colour = np.where(
        hit[:, None] == 0,
        0.35 + 0.4 * checks[:, None] * np.array([1.0, 0.9, 0.8]),
        np.stack([0.35 + 0.1 * stripes, 0.55 + 0.2 * stripes, 0.6 - 0.05 * point[:, 1]], axis=1),
    )
    for index, (centre, radius, paint) in enumerate(SPHERES, start=2):
        shade = 0.35 + 0.65 * np.clip((point - centre) / radius @ LIGHT, 0, 1)
        colour = np.where(hit[:, None] == index, shade[:, None] * np.array(paint), colour)
    return distance, np.clip(colour, 0, 1)


def camera_path():
    """World-to-camera matrices [FRAMES, 4, 4]: a 20 degree arc to the left, always looking at LOOK_AT."""
    poses = []
    for angle in np.radians(np.linspace(0, 20, FRAMES)):
        centre = LOOK_AT + 4.0 * np.array([-np.sin(angle), 0, -np.cos(angle)]) - [0, 0.2, 0]
        forward = (LOOK_AT - centre) / np.linalg.norm(LOOK_AT - centre)
        right = np.cross([0.0, 1.0, 0.0], forward)
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward])
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, -rotation @ centre
        poses.append(pose)
    return np.stack(poses)


def render(pose, first):
    """What the camera `pose` sees, uint8 [H, W, 3], and where the camera `first` does not see it, bool [H, W]."""
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5 - WIDTH / 2, np.arange(HEIGHT) + 0.5 - HEIGHT / 2)
    rays = np.stack([x / FOCAL, y / FOCAL, np.ones_like(x)], axis=-1).reshape(-1, 3) @ pose[:3, :3]
    origin = -pose[:3, :3].T @ pose[:3, 3]
    distance, colour = cast(origin, rays)

    point = origin + rays * distance[:, None]
    first_origin = -first[:3, :3].T @ first[:3, 3]
    seen = point @ first[:3, :3].T + first[:3, 3]
    inside = (abs(seen[:, 0]) * FOCAL < WIDTH / 2 * seen[:, 2]) & (abs(seen[:, 1]) * FOCAL < HEIGHT / 2 * seen[:, 2])
    hidden = cast(first_origin, point - first_origin)[0] < 0.999
    return (colour * 255).astype(np.uint8).reshape(HEIGHT, WIDTH, 3), (hidden | ~inside).reshape(HEIGHT, WIDTH)


def write_video(path: Path, frames) -> None:
    """Frames, uint8 [H, W, 3], as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=Fraction(FPS), options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_video(path: Path) -> list[np.ndarray]:
    """All frames of a video, uint8 [H, W, 3]."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def draw(folder: Path) -> None:
    """Write image.png, camera.json, render.mp4 and render_mask.mp4 into `folder`."""
    poses = camera_path()
    pictures, masks = zip(*(render(pose, poses[0]) for pose in poses))
    Image.fromarray(pictures[0]).save(folder / "image.png")
    write_video(
        folder / "render.mp4",
        [np.where(mask[..., None], 0, picture).astype(np.uint8) for picture, mask in zip(pictures, masks)],
    )
    write_video(folder / "render_mask.mp4", [np.repeat(mask[..., None] * np.uint8(255), 3, axis=2) for mask in masks])
    intrinsic = [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]
    cameras = {"extrinsic": poses.tolist(), "intrinsic": [intrinsic] * FRAMES, "width": WIDTH, "height": HEIGHT}
    (folder / "camera.json").write_text(json.dumps(cameras), "utf-8")
