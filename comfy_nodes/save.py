"""Nodes that write cameras, points and frames into the output folder."""

import os

import folder_paths
from comfy_api.latest import Types, io

from ..core import ProgressBar
from ..scene.cameras import write_camera_json
from ..scene.pointcloud import save_ply, write_world_mirror
from .common import CATEGORY, Cameras, Points, show_on_node
from .files import save_output
from .limits import checked

PLY_AXES = ("y up (3-D viewers)", "OpenCV (y down, z forward)")


class WorldStereoSaveCamera(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoSaveCamera",
            display_name="WorldStereo Save Camera",
            category=CATEGORY,
            description="Writes the cameras as camera.json into the output folder: world-to-camera in OpenCV axes, "
            "intrinsics in pixels, and the picture's size.",
            search_aliases=["camera.json", "export camera"],
            inputs=[
                Cameras.Input("cameras"),
                io.String.Input(
                    "filename_prefix",
                    default="worldstereo/camera",
                    tooltip="The file's name in ComfyUI's output folder; a number is added, nothing is overwritten.",
                ),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @checked
    def execute(cls, cameras, filename_prefix) -> io.NodeOutput:
        path, _ = save_output(filename_prefix, ".json", lambda path: write_camera_json(path, cameras))
        show_on_node(cls, os.path.relpath(path, folder_paths.get_output_directory()))
        return io.NodeOutput()


class WorldStereoSavePointCloud(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoSavePointCloud",
            display_name="WorldStereo Save Point Cloud",
            category=CATEGORY,
            description="Writes the point cloud with its colours as a PLY file into the output folder. Connect ply to "
            "core's Preview Point Cloud to look at it.",
            search_aliases=["ply", "export points", "3d viewer"],
            inputs=[
                Points.Input("points"),
                io.String.Input(
                    "filename_prefix",
                    default="3d/worldstereo",
                    tooltip="The file's name in ComfyUI's output folder; a number is added, nothing is overwritten.",
                ),
                io.Combo.Input(
                    "axes",
                    options=list(PLY_AXES),
                    tooltip="With y up the scene stands upright in 3-D viewers. OpenCV keeps the cameras' axes, for "
                    "tools that read the cameras too.",
                ),
            ],
            outputs=[io.File3DPLY.Output(display_name="ply")],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @checked
    def execute(cls, points, filename_prefix, axes) -> io.NodeOutput:
        y_up = axes == PLY_AXES[0]
        path, subfolder = save_output(filename_prefix, ".ply", lambda path: save_ply(path, points, y_up))
        show_on_node(cls, f"{len(points):,} points\n{os.path.relpath(path, folder_paths.get_output_directory())}")
        saved = {"filename": path.name, "subfolder": subfolder, "type": "output"}
        return io.NodeOutput(Types.File3D(str(path)), ui={"3d": [saved]})


class WorldStereoSaveFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoSaveFrames",
            display_name="WorldStereo Save Frames",
            category=CATEGORY,
            description="Writes the keyframes and their cameras as a folder for reconstruction with WorldMirror: "
            "images/*.png and cameras.json (camera-to-world in OpenCV axes, intrinsics in pixels).",
            search_aliases=["worldmirror", "reconstruction", "gaussian splatting", "export frames"],
            inputs=[
                io.Image.Input("images", tooltip="The decoded keyframes."),
                Cameras.Input(
                    "cameras",
                    tooltip="One camera per frame. If there are more, they are thinned as in WorldStereo Conditioning.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="worldstereo/frames",
                    tooltip="The new folder's name in ComfyUI's output folder; a number is added, nothing is "
                    "overwritten.",
                ),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @checked
    def execute(cls, images, cameras, filename_prefix) -> io.NodeOutput:
        progress = ProgressBar(len(images))
        cameras = cameras.thinned(len(images))
        path, _ = save_output(
            filename_prefix, "", lambda path: write_world_mirror(path, images, cameras, progress.update)
        )
        show_on_node(cls, os.path.relpath(path, folder_paths.get_output_directory()))
        return io.NodeOutput()


NODES = [WorldStereoSaveCamera, WorldStereoSavePointCloud, WorldStereoSaveFrames]
