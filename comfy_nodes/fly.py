"""The node in which a camera path is flown by hand."""

from comfy_api.latest import io

from ..scene.camera_path import DEFAULT_FOV, LENSES
from ..scene.fly_path import DEFAULT_PATH, plan_flight
from ..scene.pictures import within
from .common import CATEGORY, Cameras, MoGeGeometry, Points
from .files import keep_in_temp
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
                io.Combo.Input(
                    "lens",
                    options=list(LENSES),
                    tooltip=f"auto: MoGe's estimate or the 3-D viewer's, else {DEFAULT_FOV:g} degrees wide. "
                    "A path in start keeps its lens.",
                ),
                io.Float.Input(
                    "lens_value",
                    default=DEFAULT_FOV,
                    min=1.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="The number for lens: degrees, or mm on 36 mm wide film. Not used by auto.",
                ),
                io.Float.Input(
                    "scene_depth",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.01,
                    advanced=True,
                    tooltip="Distance from the camera to the centre of the scene, in scene units: the unit of the "
                    "path. 0: the median depth of scene, else the 3-D viewer's distance to its target, else 1.",
                ),
                io.Float.Input(
                    "start_pitch",
                    default=0.0,
                    min=-89.0,
                    max=89.0,
                    step=1.0,
                    advanced=True,
                    tooltip="How far above (negative: below) the horizon the picture's camera looks, in degrees, so "
                    "that looking around stays level. Not used with start.",
                ),
                io.MultiType.Input(
                    "scene",
                    types=[MoGeGeometry, Points],
                    optional=True,
                    tooltip="MoGe's geometry of the picture, or a point cloud: what the viewer shows. It gives the "
                    "depth, and MoGe the lens.",
                ),
                io.MultiType.Input(
                    "start",
                    types=[Cameras, io.Load3DCamera],
                    optional=True,
                    tooltip="Where to start: at the last camera of another path, which this one continues and "
                    "contains, or at the camera of core's 3-D viewer.",
                ),
                io.Boolean.Input(
                    "guess_pitch",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Estimate how far up the picture's camera looks from MoGe's normals of floors, tables and "
                    "ceilings (MoGe 2 gives them), instead of start_pitch. Not used with start.",
                ),
            ],
            outputs=[
                Cameras.Output(display_name="cameras"),
                io.Image.Output(
                    display_name="picture",
                    tooltip="The path from above and from the side, from blue (start) to red (end).",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, image, path, lens, lens_value, scene_depth, start_pitch, scene=None, start=None, guess_pitch=False
    ) -> io.NodeOutput:
        height, width = within(*image.shape[1:3])
        cameras, picture, shown = plan_flight(
            image, path, lens, lens_value, scene_depth, start_pitch, scene, start, width, height, guess_pitch
        )
        cloud = keep_in_temp(VIEWER_FOLDER, shown.points)
        return io.NodeOutput(cameras, picture, ui={"worldstereo_scene": [shown.info | {"cloud": cloud}]})


NODES = [WorldStereoFlyPath]
