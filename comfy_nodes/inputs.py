"""Inputs and outputs that several nodes declare alike."""

from comfy_api.latest import io

from ..scene.camera_path import DEFAULT_FOV, LENSES
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
