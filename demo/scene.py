"""The demo's inputs: a picture of the sample scene, a camera path, and what a point cloud of the picture would show."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from ..scene import sample
from ..scene.render import BACKGROUND

WIDTH, HEIGHT, FOCAL = 384, 256, 340.0  # pixels
FRAMES = 41  # more than the model's 21, which are taken from them
FPS = 16
HOLE = [round(255 * channel) for channel in BACKGROUND]
LOOK_AT = np.array([0.0, 0.2, 4.0])


def camera_path(frames):
    """World-to-camera matrices [frames, 4, 4]: a 20 degree arc to the left, always looking at LOOK_AT."""
    poses = []
    for angle in np.radians(np.linspace(0, 20, frames)):
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
    distance, _, colour = (part.numpy() for part in sample.cast(torch.from_numpy(origin), torch.from_numpy(rays)))

    point = origin + rays * distance[:, None]
    first_origin = -first[:3, :3].T @ first[:3, 3]
    seen = point @ first[:3, :3].T + first[:3, 3]
    inside = (abs(seen[:, 0]) * FOCAL < WIDTH / 2 * seen[:, 2]) & (abs(seen[:, 1]) * FOCAL < HEIGHT / 2 * seen[:, 2])
    hidden = sample.distances(torch.from_numpy(first_origin), torch.from_numpy(point - first_origin)).numpy() < 0.999
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


def draw(folder: Path, frames: int = FRAMES) -> None:
    """Write image.png, camera.json, render.mp4 and render_mask.mp4 into `folder`."""
    poses = camera_path(frames)
    pictures, masks = zip(*(render(pose, poses[0]) for pose in poses))
    Image.fromarray(pictures[0]).save(folder / "image.png")
    write_video(
        folder / "render.mp4",
        [np.where(mask[..., None], HOLE, picture).astype(np.uint8) for picture, mask in zip(pictures, masks)],
    )
    write_video(folder / "render_mask.mp4", [np.repeat(mask[..., None] * np.uint8(255), 3, axis=2) for mask in masks])
    intrinsic = [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]
    cameras = {"extrinsic": poses.tolist(), "intrinsic": [intrinsic] * frames, "width": WIDTH, "height": HEIGHT}
    (folder / "camera.json").write_text(json.dumps(cameras), "utf-8")
