"""Nodes that only show something and save nothing: the keyframes as a clip and as a sheet, a point cloud in 3-D."""

import uuid
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import InputImpl, Types, io, ui

from ..files.atomic import new_file
from ..scene.pictures import StoppableFile, StoppableFrames, contact_sheet, side_by_side, within
from ..scene.pointcloud import splat_sizes, write_ply
from .common import CATEGORY, Points, splat_of
from .limits import checked

FPS = 16.0
MAX_CLIP_SIDE = 8192  # pixels that H.264 takes
PLAYED_PIXELS = 1 << 21  # of a frame of the clip on the node: the encoder ends with dozens of them in one call


class WorldStereoPreviewClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoPreviewClip",
            display_name="WorldStereo Preview Clip",
            category=CATEGORY,
            description="Plays the keyframes on the node, with the render that guided them to their left, and puts "
            "all of them on one contact sheet. Nothing is saved.",
            search_aliases=["preview video", "contact sheet", "play", "compare", "side by side"],
            inputs=[
                io.Image.Input("images", tooltip="The decoded keyframes, or what frame interpolation made of them."),
                io.Image.Input(
                    "render_video",
                    optional=True,
                    tooltip="Shown to the left of the keyframes. If it has more frames, they are thinned evenly.",
                ),
                io.Float.Input("fps", default=FPS, min=1.0, max=120.0, step=1.0, tooltip="Frames per second."),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="All frames on one sheet, numbered from 0."),
                io.Video.Output(display_name="clip", tooltip="What the node plays, for Save Video."),
            ],
            is_output_node=True,
        )

    @checked
    def execute(cls, images, render_video=None, fps=FPS) -> io.NodeOutput:
        frames = images[..., :3] if render_video is None else side_by_side(images, render_video)
        even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # H.264 needs even sides
        if not all(2 <= side <= MAX_CLIP_SIDE for side in even.shape[1:3]):
            raise ValueError(
                f"images are {frames.shape[2]}x{frames.shape[1]}: a clip's sides have 2 to {MAX_CLIP_SIDE} pixels."
            )
        name = f"worldstereo_clip_{uuid.uuid4().hex}.mp4"
        write_clip(Path(folder_paths.get_temp_directory()) / name, even, fps)
        shown = ui.PreviewVideo([ui.SavedResult(name, "", io.FolderType.temp)])
        return io.NodeOutput(contact_sheet(frames), clip_of(even, fps), ui=shown)


def write_clip(path: Path, frames: torch.Tensor, fps: float) -> None:
    """Writes frames [N, H, W, 3] of even sides as an MP4, whole or not at all. Large frames are reduced, because the
    encoder keeps dozens of them."""
    height, width = within(frames.shape[1], frames.shape[2], PLAYED_PIXELS)
    played = StoppableFrames(frames, (max(2, height // 2 * 2), max(2, width // 2 * 2)))
    with new_file(path) as file:
        clip_of(played, fps).save_to(StoppableFile(file), format=Types.VideoContainer.MP4)


def clip_of(frames: torch.Tensor | StoppableFrames, fps: float) -> InputImpl.VideoFromComponents:
    """Frames [N, H, W, 3] in 0..1 as core's video type."""
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, frame_rate=Fraction(fps)))


class WorldStereoPointsTo3D(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoPointsTo3D",
            display_name="WorldStereo Points to 3D",
            category=CATEGORY,
            description="Converts the point cloud for core's 3-D nodes without saving it: a PLY for Preview Point "
            "Cloud, and a splat, one round Gaussian per point, for Create 3D File (from Splat) and Preview Splat. To "
            "save it use WorldStereo Save Point Cloud.",
            search_aliases=["ply", "preview points", "point cloud", "3d viewer", "gaussian splat"],
            inputs=[Points.Input("points")],
            outputs=[
                io.File3DPLY.Output(display_name="ply", tooltip="For Preview Point Cloud: y up."),
                io.Splat.Output(display_name="splat", tooltip="In the axes of splat files: y down, z forward."),
            ],
        )

    @checked
    def execute(cls, points) -> io.NodeOutput:
        ply = BytesIO()
        write_ply(ply, points, y_up=True)
        sizes = splat_sizes(points)[:, None].expand(-1, 3)
        return io.NodeOutput(Types.File3D(ply, "ply"), splat_of(points.points, sizes, points.colors, 1.0))


NODES = [WorldStereoPreviewClip, WorldStereoPointsTo3D]
