"""Inputs and outputs that several nodes declare alike."""

from comfy_api.latest import io

from ..scene.camera_path import DEFAULT_FOV, LENSES
from ..scene.depth import DEPTH_PICTURES
from ..scene.memory import REMEMBERED
from ..scene.render import RADIUS
from .common import Cameras, MoGeGeometry, Points


def path_start_inputs(scene_tooltip: str) -> list[io.Input]:
    """What `scene.camera_path.PathStart` is made of, but for the picture."""
    return [
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
            tooltip="Distance from the camera to the centre of the scene, in scene units: the unit of the path's "
            "distances. 0: the median depth of scene, else the 3-D viewer's distance to its target, else 1.",
        ),
        io.Float.Input(
            "start_pitch",
            default=0.0,
            min=-89.0,
            max=89.0,
            step=1.0,
            advanced=True,
            tooltip="How far above (negative: below) the horizon the picture's camera looks, in degrees, so that "
            "orbits, pans and looking around stay level. Not used with start.",
        ),
        io.MultiType.Input("scene", types=[MoGeGeometry, Points], optional=True, tooltip=scene_tooltip),
        io.MultiType.Input(
            "start",
            types=[Cameras, io.Load3DCamera],
            optional=True,
            tooltip="Where to start: at the last camera of another path, which this one continues and contains, or at "
            "the camera of core's 3-D viewer.",
        ),
        io.Boolean.Input(
            "guess_pitch",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Estimate how far up the picture's camera looks from MoGe's normals of floors, tables and "
            "ceilings (MoGe 2 gives them), instead of start_pitch. Not used with start.",
        ),
    ]


def path_outputs() -> list[io.Output]:
    """What a node that makes a camera path gives."""
    return [
        Cameras.Output(display_name="cameras"),
        io.Image.Output(
            display_name="picture", tooltip="The path from above and from the side, from blue (start) to red (end)."
        ),
    ]


def depth_picture_inputs(advanced: bool | None = None) -> list[io.Input]:
    """How a picture of depth is read, as in `scene.depth`."""
    return [
        io.Combo.Input(
            "depth_picture",
            options=list(DEPTH_PICTURES),
            advanced=advanced,
            tooltip="For a depth picture: what its grey means. Depth Anything gives disparity.",
        ),
        io.Float.Input(
            "near",
            default=1.0,
            min=0.0,
            max=1e6,
            step=0.01,
            advanced=advanced,
            tooltip="For a depth picture: the depth of its nearest grey, in scene units. 0 for a metric depth map.",
        ),
        io.Float.Input(
            "far",
            default=10.0,
            min=0.0,
            max=1e6,
            step=0.01,
            advanced=advanced,
            tooltip="For a depth picture: the depth of its farthest grey, in scene units; for a metric depth map, the "
            "depth that white stands for.",
        ),
    ]


def size_inputs(what: str, otherwise: str) -> list[io.Input]:
    """A width and a height, where 0 stands for a size that is found: `otherwise` says which."""
    return [
        io.Int.Input(
            name,
            default=0,
            min=0,
            max=8192,
            step=16,
            advanced=True,
            tooltip=f"{name.capitalize()} of {what}, in pixels. If width or height is 0: {otherwise}.",
        )
        for name in ("width", "height")
    ]


def size_model_input() -> io.Input:
    """The model that gives the size where `size_inputs` are 0."""
    return io.Model.Input(
        "model",
        optional=True,
        tooltip="From Load WorldStereo FP8: gives the size. Not needed for a picture from WorldStereo Picture, which has "
        "it already.",
    )


def render_outputs() -> list[io.Output]:
    """What the cameras see of a point cloud."""
    return [
        io.Image.Output(display_name="render_video"),
        io.Mask.Output(display_name="render_mask", tooltip="1 where there is no point."),
    ]


def radius_input() -> io.Input:
    """The radius of `scene.render.render`."""
    return io.Float.Input(
        "radius",
        default=RADIUS,
        min=0.0005,
        max=0.2,
        step=0.0005,
        round=0.0001,
        advanced=True,
        tooltip="Radius of a point, in units in which the shorter side of the picture is 2. The model was trained with "
        f"{RADIUS}; below 250 pixels that radius is drawn larger, so that no gaps show.",
    )


def clip_inputs() -> list[io.Input]:
    """The keyframes of a path and their cameras."""
    return [
        io.Image.Input("images", tooltip="The keyframes of the path, from WorldStereo Keyframe Decode."),
        Cameras.Input("cameras", tooltip="The path's cameras; if there are more than images, they are thinned."),
    ]


def remember_input(tooltip: str) -> io.Input:
    """How many keyframes of a path, as `scene.memory.frames_to_remember` chooses them."""
    return io.Int.Input("remember", default=REMEMBERED, min=1, max=100, tooltip=tooltip)
