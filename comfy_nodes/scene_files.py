"""Nodes that save and load scenes as folders, and turn them into Gaussians for core's splat nodes."""

import os

import folder_paths
from comfy_api.latest import io

from ..core import ProgressBar
from ..scene.folder import read_scene, stamp, write_scene
from ..scene.scene import MAX_POINTS
from ..scene.splat import OPACITY, gaussians_of_scene
from .common import CATEGORY, Scene, show_on_node, splat_of
from .files import save_output, scene_folder, scene_folders
from .limits import checked


class WorldStereoSaveScene(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoSaveScene",
            display_name="WorldStereo Save Scene",
            category=CATEGORY,
            description="Writes the scene as one folder into the output folder: for WorldStereo Load Scene, and with "
            "pictures, cameras and points in the formats of nerfstudio, COLMAP and WorldMirror.",
            search_aliases=["export scene", "colmap", "nerfstudio", "transforms.json", "3dgs dataset", "worldmirror"],
            inputs=[
                Scene.Input("scene"),
                io.String.Input(
                    "filename_prefix",
                    default="worldstereo/scene",
                    tooltip="The new folder's name in ComfyUI's output folder; a number is added, nothing is "
                    "overwritten.",
                ),
            ],
            outputs=[Scene.Output(display_name="scene", tooltip="The same scene, for the next node.")],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @checked
    def execute(cls, scene, filename_prefix) -> io.NodeOutput:
        progress = ProgressBar(len(scene))
        path, _ = save_output(filename_prefix, "", lambda path: write_scene(path, scene, progress.update))
        saved = os.path.relpath(path, folder_paths.get_output_directory())
        show_on_node(cls, f"{saved}\n{len(scene)} views, {len(scene.cloud):,} points, {len(scene.paths)} paths")
        return io.NodeOutput(scene)


class WorldStereoLoadScene(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoLoadScene",
            display_name="WorldStereo Load Scene",
            category=CATEGORY,
            description="Reads a scene that WorldStereo Save Scene has written, or views and points from a folder of "
            "COLMAP, nerfstudio or WorldMirror, or a bank of views.",
            search_aliases=["import scene", "continue scene", "colmap", "nerfstudio", "bank", "open scene"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=scene_folders(),
                    tooltip="A folder with scene.json, cameras.json, transforms.json or sparse/0/images.txt in "
                    "ComfyUI's output or input folder. Press R to list folders made since the page was opened.",
                )
            ],
            outputs=[Scene.Output(display_name="scene")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder):
        return stamp(scene_folder(folder))

    @checked
    def execute(cls, folder) -> io.NodeOutput:
        scene, kind = read_scene(scene_folder(folder), ProgressBar(1).update_absolute)
        deep = sum(depth is not None for depth in scene.depths)
        show_on_node(
            cls, f"{len(scene)} views, {deep} with depth, {len(scene.cloud):,} points, {len(scene.paths)} paths\n{kind}"
        )
        return io.NodeOutput(scene)


class WorldStereoSceneToSplat(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoSceneToSplat",
            display_name="WorldStereo Scene to Splat",
            category=CATEGORY,
            description="Turns each remembered pixel that has a depth into a flat Gaussian on its surface, for core's Render "
            "Splat, Merge Splats and Create 3D File (from Splat). A surface that several views show is made once, of the "
            "finest; what other views see through is left out. Nothing is optimised.",
            search_aliases=["gaussian splat", "3dgs", "splat", "preview scene", "export splat"],
            inputs=[
                Scene.Input("scene"),
                io.Int.Input(
                    "gaussians",
                    default=1_000_000,
                    min=1000,
                    max=MAX_POINTS,
                    step=1000,
                    tooltip="At most this many. Where the views have more, they are taken at a smaller size.",
                ),
            ],
            outputs=[io.Splat.Output(display_name="splat", tooltip="In the axes of splat files: y down, z forward.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls, scene, gaussians) -> io.NodeOutput:
        made = gaussians_of_scene(scene, gaussians, ProgressBar(len(scene)).update)
        show_on_node(cls, f"{len(made):,} Gaussians")
        return io.NodeOutput(splat_of(made.points, made.sizes, made.colors, OPACITY, made.rotations))


NODES = [WorldStereoSaveScene, WorldStereoLoadScene, WorldStereoSceneToSplat]
