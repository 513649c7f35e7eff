"""The node in which a camera path is flown by hand."""

from comfy_api.latest import io

from ..scene.camera_path import PathStart
from ..scene.fly_path import DEFAULT_PATH, plan_flight
from ..scene.pictures import within
from .common import CATEGORY
from .files import keep_in_temp
from .inputs import path_outputs, path_start_inputs
from .limits import checked

VIEWER_FOLDER = "worldstereo_fly_path"  # in ComfyUI's temp folder


class WorldStereoFlyPath(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoFlyPath",
            display_name="WorldStereo Fly Path",
            category=CATEGORY,
            description="A camera path that you fly: Show scene draws the picture's point cloud in the node, with the "
            "holes that the model will fill. Fly through it and add views; the path runs smoothly from the picture's "
            "own camera through them.",
            search_aliases=["fly", "camera control", "camera trajectory", "camera path editor", "3d viewer", "walk"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The picture the path starts from: its size is the cameras' size."),
                io.String.Input(
                    "path",
                    default=DEFAULT_PATH,
                    multiline=True,
                    socketless=True,
                    tooltip="The path as text. The viewer writes it; its button Text shows it.",
                ),
                *path_start_inputs(
                    "MoGe's geometry of the picture, or a point cloud: what the viewer shows. It gives the depth, and "
                    "MoGe the lens."
                ),
            ],
            outputs=path_outputs(),
        )

    @checked
    def execute(
        cls, image, path, lens, lens_value, scene_depth, start_pitch, scene=None, start=None, guess_pitch=False
    ) -> io.NodeOutput:
        height, width = within(*image.shape[1:3])
        path_start = PathStart(image, lens, lens_value, scene_depth, start_pitch, scene, start, guess_pitch)
        cameras, picture, shown = plan_flight(path_start, path, width, height)
        cloud = keep_in_temp(VIEWER_FOLDER, shown.points)
        return io.NodeOutput(cameras, picture, ui={"worldstereo_scene": [shown.info | {"cloud": cloud}]})


NODES = [WorldStereoFlyPath]
