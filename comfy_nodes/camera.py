"""Nodes for camera paths and point-cloud renders."""

from comfy_api.latest import io, ui

from ..core import ProgressBar, get_torch_device
from ..scene.camera_files import files_of, read_cameras
from ..scene.camera_path import (
    EASINGS,
    LENSES,
    LOOK_AT,
    PRESETS,
    Move,
    PathStart,
    draw_path,
    extent,
    focal_length,
    pinhole,
    plan_path,
)
from ..scene.panorama import not_whole, points_of_panorama, too_coarse, view_of_panorama
from ..scene.pictures import stretches, within
from ..scene.render import POINTS_PER_PIXEL, check_size, render_start, summary
from ..worldstereo.comfy_model import config_of
from ..worldstereo.conditioning import keyframe_size
from .common import CATEGORY, Cameras, MoGeGeometry, Points, color_of, show_on_node
from .files import camera_file, camera_files
from .inputs import (
    depth_picture_inputs,
    path_outputs,
    path_start_inputs,
    radius_input,
    render_outputs,
    size_inputs,
    size_model_input,
)
from .limits import checked


class WorldStereoLoadCamera(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoLoadCamera",
            display_name="WorldStereo Load Camera",
            category=CATEGORY,
            description="Reads a camera path: camera.json, NeRF's transforms.json, or COLMAP's images.txt with "
            "cameras.txt beside it, or RealEstate10K's text. World-to-camera, OpenCV axes (x right, y down, z "
            "forward).",
            search_aliases=["camera.json", "colmap", "nerf", "transforms.json", "trajectory", "realestate10k"],
            inputs=[
                io.Combo.Input(
                    "camera",
                    options=camera_files(),
                    tooltip="A .json or .txt file in ComfyUI's input folder; its format is recognised by its content.",
                )
            ],
            outputs=[
                Cameras.Output(display_name="cameras"),
                io.Image.Output(display_name="picture", tooltip="The path from above and from the side."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, camera):
        return [path.stat().st_mtime_ns for path in files_of(camera_file(camera))]

    @checked
    def execute(cls, camera) -> io.NodeOutput:
        cameras, kind = read_cameras(camera_file(camera))
        show_on_node(cls, f"{len(cameras)} cameras of a {cameras.width}x{cameras.height} picture\n{kind}")
        picture = draw_path(cameras, extent(cameras))
        return io.NodeOutput(cameras, picture, ui=ui.PreviewImage(picture, cls=cls))


class WorldStereoCameraPath(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoCameraPath",
            display_name="WorldStereo Camera Path",
            category=CATEGORY,
            description="A camera path from a preset, starting where the picture was taken. Chain several through "
            "start. Cameras are world-to-camera in OpenCV axes (x right, y down, z forward).",
            search_aliases=[
                "camera trajectory",
                "orbit",
                "dolly",
                "pan",
                "camera motion",
                "camera control",
                "parallax",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The picture the path starts from: its size is the cameras' size."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    tooltip="orbit and arc circle the centre of the scene; dolly, truck, pedestal and "
                    "spiral travel; pan, tilt and roll turn on the spot; ellipse loop comes back.",
                ),
                io.Float.Input(
                    "degrees",
                    default=30.0,
                    min=-720.0,
                    max=720.0,
                    step=1.0,
                    tooltip="How far orbit, arc, pan, tilt and roll turn, in degrees.",
                ),
                io.Float.Input(
                    "distance",
                    default=0.3,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How far dolly, truck and pedestal travel, the radius at which the spiral ends, "
                    "and half the width of the ellipse loop, in units of the scene's depth.",
                ),
                io.Int.Input(
                    "keyframes",
                    default=21,
                    min=2,
                    max=1000,
                    tooltip="Cameras of this path, its start included. The model takes 21; more are thinned evenly.",
                ),
                io.Combo.Input("easing", options=list(EASINGS), tooltip="How the speed changes along the path."),
                io.Combo.Input(
                    "look_at_centre",
                    options=list(LOOK_AT),
                    tooltip="on: the camera turns to keep the centre of the scene in the middle. off: it keeps its "
                    "direction. auto: on for orbit, arc, spiral and ellipse loop. No effect on dolly, pan, tilt and "
                    "roll.",
                ),
                *path_start_inputs(
                    "MoGe's geometry of the picture, or a point cloud: gives the depth (and MoGe the lens), and is "
                    "drawn into the picture of the path."
                ),
            ],
            outputs=path_outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @checked
    def execute(
        cls,
        image,
        preset,
        degrees,
        distance,
        keyframes,
        easing,
        look_at_centre,
        lens,
        lens_value,
        scene_depth,
        start_pitch,
        scene=None,
        start=None,
        guess_pitch=False,
    ) -> io.NodeOutput:
        move = Move(preset, degrees, distance, keyframes, easing, look_at_centre)
        path_start = PathStart(image, lens, lens_value, scene_depth, start_pitch, scene, start, guess_pitch)
        cameras, picture, assumed = plan_path(path_start, move)
        sizes = {"start's picture": (cameras.height, cameras.width)}
        if isinstance(scene, dict):
            sizes["scene"] = scene["depth"].shape[1:3]
        show_on_node(cls, assumed, stretches(image.shape[1], image.shape[2], **sizes))
        return io.NodeOutput(cameras, picture, ui=ui.PreviewImage(picture, cls=cls))


class WorldStereoRender(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoRender",
            display_name="WorldStereo Render",
            category=CATEGORY,
            description="Makes a point cloud of the picture and its depth and shows what each camera sees of it: the "
            "render, and the holes that WorldStereo fills. The first camera is the one that took the picture.",
            search_aliases=["point cloud render", "depth warp", "novel view", "moge", "parallax", "3d photo"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to start from. It is also the first frame."),
                io.MultiType.Input(
                    "depth",
                    types=[MoGeGeometry, io.Image, Points],
                    tooltip="MoGe's geometry of the picture, a grey depth or disparity picture, or a "
                    "point cloud in the cameras' world.",
                ),
                Cameras.Input("cameras", tooltip="One camera per frame: world-to-camera, OpenCV axes."),
                *depth_picture_inputs(),
                *size_inputs(
                    "the render",
                    "the model's size for this picture, or, without model, the picture's own size "
                    "(reduced if it is large)",
                ),
                radius_input(),
                io.Int.Input(
                    "points_per_pixel",
                    default=POINTS_PER_PIXEL,
                    min=1,
                    max=200,
                    advanced=True,
                    tooltip="How many points, the nearest ones, a pixel is blended from.",
                ),
                io.Color.Input(
                    "background",
                    default="#808080",
                    advanced=True,
                    tooltip="Colour behind the points: it fills the holes, and thin splats fade to it. The model was "
                    "trained with mid-grey (#808080).",
                ),
                size_model_input(),
            ],
            outputs=[*render_outputs(), Points.Output(display_name="points")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @checked
    def execute(
        cls,
        image,
        depth,
        cameras,
        depth_picture,
        near,
        far,
        width,
        height,
        radius,
        points_per_pixel,
        background,
        model=None,
    ) -> io.NodeOutput:
        if not width or not height:
            size = image.shape[1:3]
            height, width = within(*size) if model is None else keyframe_size(config_of(model), *size)
        reading, splats = (depth_picture, near, far), (radius, points_per_pixel, color_of(background))
        work = get_torch_device(), ProgressBar(len(cameras)).update
        video, holes, cloud = render_start(image, depth, cameras, *reading, width, height, *splats, *work)
        sizes = {"image": image.shape[1:3], "cameras' picture": (cameras.height, cameras.width)}
        size = f"{len(video)} frames of {width}×{height}"
        show_on_node(cls, f"{size}\n{summary(cloud, holes)}", stretches(height, width, **sizes))
        return io.NodeOutput(video, holes, cloud)


class WorldStereoPanorama(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoPanorama",
            display_name="WorldStereo Panorama",
            category=CATEGORY,
            description="Starts from an equirectangular panorama: gives its point cloud, and an ordinary picture in a "
            "chosen direction with its camera, for Camera Path and Render.",
            search_aliases=["360", "equirectangular", "panorama to perspective", "world"],
            inputs=[
                MoGeGeometry.Input("moge_geometry", tooltip="From core's Run MoGe Panorama Inference."),
                io.Float.Input(
                    "yaw",
                    default=0.0,
                    min=-360.0,
                    max=360.0,
                    step=1.0,
                    tooltip="Degrees to the right of the panorama's middle.",
                ),
                io.Float.Input(
                    "pitch",
                    default=0.0,
                    min=-89.0,
                    max=89.0,
                    step=1.0,
                    tooltip="Degrees above the horizon; negative below.",
                ),
                io.Float.Input(
                    "fov",
                    default=75.0,
                    min=10.0,
                    max=150.0,
                    step=1.0,
                    tooltip="Horizontal field of view of the picture, in degrees.",
                ),
                io.Int.Input(
                    "width", default=768, min=16, max=8192, step=16, tooltip="Width of the picture, in pixels."
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=8192, step=16, tooltip="Height of the picture, in pixels."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The start picture."),
                Points.Output(display_name="points", tooltip="For depth of Render and scene of Camera Path."),
                Cameras.Output(display_name="camera", tooltip="The start picture's camera, for start of Camera Path."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls, moge_geometry, yaw, pitch, fov, width, height) -> io.NodeOutput:
        check_size(1, height, width)
        camera = pinhole(width, height, focal_length(LENSES[1], fov, width), yaw, pitch)
        cloud = points_of_panorama(moge_geometry)
        panorama = moge_geometry["image"]
        remarks = [not_whole(*panorama.shape[1:3]), too_coarse(panorama.shape[2], camera)]
        show_on_node(cls, f"{len(cloud):,} points", [remark for remark in remarks if remark])
        return io.NodeOutput(view_of_panorama(panorama, camera), cloud, camera)


NODES = [WorldStereoLoadCamera, WorldStereoCameraPath, WorldStereoRender, WorldStereoPanorama]
