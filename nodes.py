"""The nodes: each declares its schema and calls one function of the pack."""

import os
from pathlib import Path, PureWindowsPath

import comfy.model_management
import comfy.utils
import folder_paths
import node_helpers
import numpy as np
import torch
from comfy_api.latest import ComfyExtension, Types, io, ui
from PIL import ImageColor
from server import PromptServer
from typing_extensions import override

from . import remap
from .fp8.cook import Options, cook
from .fp8.files import INDEX_SUFFIX, SHARD, open_files
from .fp8.linear import COMPUTE
from .fp8.recipe import CONVS, RECIPES
from .loaders import load_worldstereo
from .scene.camera_files import files_of, read_cameras
from .scene.camera_path import (
    DEFAULT_FOV, EASINGS, LENSES, LOOK_AT, PRESETS, Move, draw_path, extent, focal_length, pinhole, plan_path,
)
from .scene.cameras import write_camera_json
from .worldstereo.conditioning import References, condition, decode_keyframes, encode_keyframes, keyframe_size
from .worldstereo.config import WorldStereoConfig, config_to_embed
from .scene.depth import DEPTH_PICTURES
from .worldstereo.model import config_of
from .scene.panorama import points_of_panorama, view_of_panorama
from .scene.pointcloud import ply_bytes, write_world_mirror
from .scene.render import POINTS_PER_PIXEL, RADIUS, render_start, summary
from .worldstereo.schedule import dmd_sigmas

CATEGORY = "WorldStereo"
SAFETENSORS = (".safetensors", ".sft")
NO_BASE = "none"
CONVS_OF_RECIPE = "as the recipe"

CAMERA_FILES = (".json", ".txt")
PLY_AXES = ("y up (3-D viewers)", "OpenCV (y down, z forward)")

Cameras = io.Custom("WORLDSTEREO_CAMERAS")  # scene.cameras.Cameras
Points = io.Custom("WORLDSTEREO_POINTS")  # scene.pointcloud.PointCloud
MoGeGeometry = io.Custom("MOGE_GEOMETRY")  # core's dict of comfy_extras/nodes_moge.py


def diffusion_models() -> list[str]:
    """The safetensors files in ComfyUI's diffusion_models folders, but for the shards of models in several files."""
    return [name for name in folder_paths.get_filename_list("diffusion_models")
            if name.lower().endswith(SAFETENSORS) and not SHARD.search(name)]


def cook_sources() -> list[str]:
    """What in the diffusion_models folders can be cooked: safetensors files, and the index of a model in shards."""
    files = [name for folder in folder_paths.get_folder_paths("diffusion_models")
             for name in folder_paths.recursive_search(folder, [".git"])[0] if name.endswith(INDEX_SUFFIX)]
    return sorted({*files, *diffusion_models()})


def file_name(name: str, suffix: str) -> str:
    """A file's name with the suffix. Raises ValueError for one that has path parts, on any system."""
    stem = name.removesuffix(suffix)
    if not stem.strip(". ") or PureWindowsPath(name).name != name:
        raise ValueError(f"{name!r} is no file name: give a name alone, without a folder.")
    return stem + suffix


def camera_files() -> list[str]:
    """The files in ComfyUI's input folder that may hold cameras."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in CAMERA_FILES and path.is_file())


def camera_file(name: str) -> Path:
    """Where a file of `camera_files` is. Raises ValueError for any other name."""
    if name not in camera_files():
        raise ValueError(f"camera: {name!r} is no camera file in ComfyUI's input folder; upload it there.")
    return Path(folder_paths.get_input_directory()) / name


def new_output(filename_prefix: str, suffix: str) -> tuple[Path, str]:
    """A path in the output folder that does not exist yet, numbered as core's savers do, and its subfolder."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory())
    return Path(folder) / f"{name}_{counter:05}_{suffix}", subfolder


def tell(node: type[io.ComfyNode], text: str):
    """Shows a text on the node that runs."""
    if node.hidden.unique_id:
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


class LoadWorldStereoFP8(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadWorldStereoFP8",
            display_name="Load WorldStereo FP8",
            category=CATEGORY,
            description="Loads a WorldStereo checkpoint (camera, memory or memory-dmd; scaled FP8 or BF16, any naming) "
                        "as an ordinary MODEL for ComfyUI's samplers, LoRA loaders and offloading.",
            search_aliases=["worldstereo", "fp8", "wan", "novel view"],
            inputs=[
                io.Combo.Input("model_name", options=diffusion_models(),
                               tooltip="A WorldStereo .safetensors file in models/diffusion_models. The scaled-FP8 "
                                       "file takes 20 GB of disk, the BF16 source 35 GB."),
                io.Combo.Input("compute", options=list(COMPUTE), default=COMPUTE[0],
                               tooltip="How FP8 layers multiply. auto: native FP8 where the card has it (GeForce RTX "
                                       "40, Hopper and newer), else the weight is upcast for each product. fp8: "
                                       "native, or an error. bf16: always upcast."),
                io.Combo.Input("base_model", options=[NO_BASE, *diffusion_models()], default=NO_BASE, optional=True,
                               advanced=True,
                               tooltip="Only for an overlay file that holds a part of the backbone: the "
                                       "Wan2.1-I2V-14B-480P model it was made on."),
                io.Boolean.Input("prompt_cache", default=True, optional=True, advanced=True,
                                 tooltip="Keeps what depends on the prompt or the timestep alone: 0.6 GB a prompt, in "
                                         "VRAM during a run, for which 8 GB of weights need not stay there. Off: "
                                         "computed anew at every step, with the same result."),
            ],
            outputs=[
                io.Model.Output(),
                io.String.Output(display_name="negative_prompt",
                                 tooltip="The negative prompt of the model's configuration, for the variants that are "
                                         "sampled with cfg above 1; empty where the configuration has none."),
            ],
        )

    @classmethod
    def execute(cls, model_name, compute, base_model=NO_BASE, prompt_cache=True) -> io.NodeOutput:
        path, base = (None if name == NO_BASE else folder_paths.get_full_path_or_raise("diffusion_models", name)
                      for name in (model_name, base_model))
        model = load_worldstereo(path, compute, base=base, prompt_cache=prompt_cache)
        return io.NodeOutput(model, config_of(model).negative_prompt)


class WorldStereoConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoConditioning",
            display_name="WorldStereo Conditioning",
            category=CATEGORY,
            description="Puts the picture, the point-cloud render and the cameras into the conditioning, at the size "
                        "of the model's table nearest to the picture's shape, and makes the empty latent to sample.",
            search_aliases=["worldstereo", "camera control", "image to video"],
            inputs=[
                io.Model.Input("model", tooltip="From Load WorldStereo FP8: its settings say sizes and frame counts."),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                io.Image.Input("image", tooltip="The one picture to start from. Camera 0 took it."),
                io.Image.Input("render_video", tooltip="The point cloud seen by each camera, as many frames as "
                                                       "cameras. More than the model's 21 keyframes are thinned "
                                                       "evenly. The first frame is replaced by the picture."),
                io.Mask.Input("render_mask", tooltip="For each frame of the render, 1 (white) where no point fell."),
                Cameras.Input("cameras", tooltip="One camera a frame: world-to-camera, OpenCV axes."),
                io.ClipVisionOutput.Input("clip_vision_output", optional=True,
                                          tooltip="The picture through CLIP ViT-H. Without it only the text is "
                                                  "attended to, and the result follows the picture less."),
                io.Image.Input("reference_images", optional=True,
                               tooltip="Memory variants: other views of the scene, as many as keyframes at most. "
                                       "Without them the picture itself is the reference."),
                Cameras.Input("reference_cameras", optional=True,
                              tooltip="One camera for each reference, in the same world as the cameras."),
                io.String.Input("reference_index", default="", optional=True,
                                tooltip="For each reference the keyframe it stands nearest to, from 0, separated by "
                                        "commas: 0, 5, 12"),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, vae, image, render_video, render_mask, cameras, clip_vision_output=None,
                reference_images=None, reference_cameras=None, reference_index="") -> io.NodeOutput:
        references = References.of(reference_images, reference_cameras, reference_index)
        values, latent = condition(config_of(model), vae, image, render_video, render_mask, cameras, references)
        if clip_vision_output is not None:
            values["clip_vision_output"] = clip_vision_output
        return io.NodeOutput(node_helpers.conditioning_set_values(positive, values),
                             node_helpers.conditioning_set_values(negative, values), {"samples": latent})


class WorldStereoKeyframeDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoKeyframeDecode",
            display_name="WorldStereo Keyframe Decode",
            category=CATEGORY,
            description="Decodes every keyframe alone, as WorldStereo's latents are made. The plain VAE Decode would "
                        "read them as one video and blend them.",
            search_aliases=["vae decode"],
            inputs=[io.Latent.Input("samples"), io.Vae.Input("vae", tooltip="The Wan 2.1 VAE.")],
            outputs=[io.Image.Output(tooltip="The keyframes in order; show them at 16 frames a second.")],
        )

    @classmethod
    def execute(cls, samples, vae) -> io.NodeOutput:
        return io.NodeOutput(decode_keyframes(vae, samples["samples"]))


class WorldStereoKeyframeEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoKeyframeEncode",
            display_name="WorldStereo Keyframe Encode",
            category=CATEGORY,
            description="Encodes every picture alone into a keyframe latent, the inverse of Keyframe Decode: to start "
                        "from existing frames with a denoise below 1.",
            search_aliases=["vae encode"],
            inputs=[
                io.Image.Input("pixels", tooltip="The keyframes in order; both sides are cropped to a multiple of 8 "
                                                 "pixels, and the model wants multiples of 16."),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels, vae) -> io.NodeOutput:
        return io.NodeOutput({"samples": encode_keyframes(vae, pixels[..., :3])})


class WorldStereoDMDSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoDMDSigmas",
            display_name="WorldStereo DMD Sigmas",
            category=CATEGORY,
            description="The few noise levels that the memory-dmd variant was distilled for (4 steps: 1, 0.9375, "
                        "0.8333, 0.625, then 0), from the model's own settings. Sample with euler and cfg 1.",
            search_aliases=["scheduler", "steps"],
            inputs=[io.Model.Input("model", tooltip="From Load WorldStereo FP8, a memory-dmd checkpoint.")],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(dmd_sigmas(config_of(model)))


class WorldStereoLoadCamera(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoLoadCamera",
            display_name="WorldStereo Load Camera",
            category=CATEGORY,
            description="Reads a camera path: camera.json, NeRF's transforms.json, or COLMAP's images.txt with "
                        "cameras.txt beside it. World-to-camera, OpenCV axes (x right, y down, z forward).",
            search_aliases=["camera.json", "colmap", "nerf", "transforms.json", "trajectory"],
            inputs=[
                io.Combo.Input("camera", options=camera_files(),
                               tooltip="A .json or .txt in ComfyUI's input folder; the kind is told by its content."),
            ],
            outputs=[
                Cameras.Output(display_name="cameras"),
                io.Image.Output(display_name="picture", tooltip="The path from above and from the side."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, camera):
        return [path.stat().st_mtime_ns for path in files_of(camera_file(camera))]

    @classmethod
    def execute(cls, camera) -> io.NodeOutput:
        cameras, kind = read_cameras(camera_file(camera))
        tell(cls, f"{len(cameras)} cameras of a {cameras.width}x{cameras.height} picture\n{kind}")
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
            search_aliases=["camera trajectory", "orbit", "dolly", "pan", "camera motion"],
            inputs=[
                io.Image.Input("image", tooltip="The picture the path starts from: its size is the cameras' size."),
                io.Combo.Input("preset", options=list(PRESETS),
                               tooltip="orbit and arc circle the centre of the scene; dolly, truck, pedestal and "
                                       "spiral travel; pan, tilt and roll turn on the spot; ellipse loop comes back."),
                io.Float.Input("degrees", default=30.0, min=-720.0, max=720.0, step=1.0,
                               tooltip="How far orbit, arc, pan, tilt and roll turn, in degrees."),
                io.Float.Input("distance", default=0.3, min=-100.0, max=100.0, step=0.01,
                               tooltip="How far dolly, truck and pedestal travel, the radius at which the spiral ends, "
                                       "and half the width of the ellipse loop, in units of the scene's depth."),
                io.Int.Input("keyframes", default=21, min=2, max=1000,
                             tooltip="Cameras of this path, its start among them. The model takes 21 and thins more "
                                     "evenly."),
                io.Combo.Input("easing", options=list(EASINGS), tooltip="How the speed changes along the path."),
                io.Combo.Input("look_at_centre", options=list(LOOK_AT),
                               tooltip="on: turn to keep the centre of the scene in the middle. off: keep the "
                                       "direction. auto: on for orbit, arc, spiral and ellipse loop. Dolly, pan, tilt "
                                       "and roll keep their own."),
                io.Combo.Input("lens", options=list(LENSES),
                               tooltip=f"auto: MoGe's estimate or the 3-D viewer's, else {DEFAULT_FOV:g} degrees wide. "
                                       "A path in start keeps its lens."),
                io.Float.Input("lens_value", default=DEFAULT_FOV, min=1.0, max=1000.0, step=0.5,
                               tooltip="The number for lens: degrees, or mm on 36 mm wide film. Not used by auto."),
                io.Float.Input("scene_depth", default=0.0, min=0.0, max=1e6, step=0.01, advanced=True,
                               tooltip="Distance from the camera to the centre of the scene, in scene units. 0: the "
                                       "median depth of scene, else the 3-D viewer's distance to its target, else 1."),
                io.Float.Input("start_pitch", default=0.0, min=-89.0, max=89.0, step=1.0, advanced=True,
                               tooltip="How far up (down: below 0) the picture's camera looks, in degrees, so that "
                                       "orbits and pans stay level. Not used with start."),
                io.MultiType.Input("scene", types=[MoGeGeometry, Points], optional=True,
                                   tooltip="MoGe's geometry of the picture, or a point cloud: gives the depth (and "
                                           "MoGe the lens), and is drawn into the picture of the path."),
                io.MultiType.Input("start", types=[Cameras, io.Load3DCamera], optional=True,
                                   tooltip="Where to start: after the last camera of another path, which stays in "
                                           "front, or at the camera of core's 3-D viewer."),
            ],
            outputs=[
                Cameras.Output(display_name="cameras"),
                io.Image.Output(display_name="picture",
                                tooltip="The path from above and from the side, blue to red in time."),
            ],
        )

    @classmethod
    def execute(cls, image, preset, degrees, distance, keyframes, easing, look_at_centre, lens, lens_value, scene_depth,
                start_pitch, scene=None, start=None) -> io.NodeOutput:
        move = Move(preset, degrees, distance, keyframes, easing, look_at_centre)
        cameras, picture = plan_path(image, move, lens, lens_value, scene_depth, start_pitch, scene, start)
        return io.NodeOutput(cameras, picture, ui=ui.PreviewImage(picture, cls=cls))


class WorldStereoRender(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoRender",
            display_name="WorldStereo Render",
            category=CATEGORY,
            description="Makes a point cloud of the picture and its depth and shows what each camera sees of it: the "
                        "render and the holes that WorldStereo fills. The first camera is the one that took it.",
            search_aliases=["point cloud render", "warp", "novel view", "moge"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to start from. It is also the first frame."),
                io.MultiType.Input("depth", types=[MoGeGeometry, io.Image, Points],
                                   tooltip="MoGe's geometry of the picture, a grey depth or disparity picture, or a "
                                           "point cloud in the cameras' world."),
                Cameras.Input("cameras", tooltip="One camera a frame: world-to-camera, OpenCV axes."),
                io.Combo.Input("depth_picture", options=list(DEPTH_PICTURES),
                               tooltip="For a depth picture: what its grey means. Depth Anything gives disparity."),
                io.Float.Input("near", default=1.0, min=0.0, max=1e6, step=0.01,
                               tooltip="For a depth picture: the depth of its nearest grey, in scene units. 0 for a "
                                       "metric depth map."),
                io.Float.Input("far", default=10.0, min=0.0, max=1e6, step=0.01,
                               tooltip="For a depth picture: the depth of its farthest grey, in scene units; for a "
                                       "metric depth map, the depth that white stands for."),
                io.Int.Input("width", default=0, min=0, max=8192, step=16, advanced=True,
                             tooltip="Of the render, in pixels. If width or height is 0, both are the model's size "
                                     "nearest to the picture's shape."),
                io.Int.Input("height", default=0, min=0, max=8192, step=16, advanced=True,
                             tooltip="Of the render, in pixels. If width or height is 0, both are the model's size "
                                     "nearest to the picture's shape."),
                io.Float.Input("radius", default=RADIUS, min=0.0005, max=0.2, step=0.0005, round=0.0001, advanced=True,
                               tooltip="Radius of a point, where the shorter side of the picture is 2. The model was "
                                       f"trained with {RADIUS}."),
                io.Int.Input("points_per_pixel", default=POINTS_PER_PIXEL, min=1, max=200, advanced=True,
                             tooltip="How many of the nearest points a pixel is blended from."),
                io.Color.Input("background", default="#000000", advanced=True,
                               tooltip="Colour of the holes, behind the points. Black is the default; the published "
                                       "example renders have mid-grey (#808080) holes. The choice is yours: the mask "
                                       "tells the model where they are."),
            ],
            outputs=[
                io.Image.Output(display_name="render_video"),
                io.Mask.Output(display_name="render_mask", tooltip="1 where no point falls."),
                Points.Output(display_name="points"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image, depth, cameras, depth_picture, near, far, width, height, radius, points_per_pixel,
                background) -> io.NodeOutput:
        if not width or not height:
            height, width = keyframe_size(WorldStereoConfig(), *image.shape[1:3])
        progress = comfy.utils.ProgressBar(len(cameras))
        video, holes, cloud = render_start(
            image, depth, cameras, depth_picture, near, far, width, height, radius, points_per_pixel,
            tuple(channel / 255 for channel in ImageColor.getrgb(background)[:3]),
            comfy.model_management.get_torch_device(), progress.update)
        tell(cls, summary(cloud, holes))
        return io.NodeOutput(video, holes, cloud)


class WorldStereoPanorama(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoPanorama",
            display_name="WorldStereo Panorama",
            category=CATEGORY,
            description="Starts from an equirectangular panorama: the point cloud of all around, and an ordinary "
                        "picture in a chosen direction with its camera, for Camera Path and Render.",
            search_aliases=["360", "equirectangular", "panorama to perspective"],
            inputs=[
                MoGeGeometry.Input("moge_geometry", tooltip="From core's Run MoGe Panorama Inference."),
                io.Float.Input("yaw", default=0.0, min=-360.0, max=360.0, step=1.0,
                               tooltip="Degrees to the right of the panorama's middle."),
                io.Float.Input("pitch", default=0.0, min=-89.0, max=89.0, step=1.0,
                               tooltip="Degrees above the horizon (below: negative)."),
                io.Float.Input("fov", default=75.0, min=10.0, max=150.0, step=1.0,
                               tooltip="Horizontal field of view of the picture, in degrees."),
                io.Int.Input("width", default=768, min=16, max=8192, step=16, tooltip="Of the picture, in pixels."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Of the picture, in pixels."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The start picture."),
                Points.Output(display_name="points", tooltip="For depth of Render and scene of Camera Path."),
                Cameras.Output(display_name="camera", tooltip="The start picture's camera, for start of Camera Path."),
            ],
        )

    @classmethod
    def execute(cls, moge_geometry, yaw, pitch, fov, width, height) -> io.NodeOutput:
        camera = pinhole(width, height, focal_length(LENSES[1], fov, width), yaw, pitch)
        cloud = points_of_panorama(moge_geometry)
        return io.NodeOutput(view_of_panorama(moge_geometry["image"], camera), cloud, camera)


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
                io.String.Input("filename_prefix", default="worldstereo/camera",
                                tooltip="In ComfyUI's output folder; a number is added, nothing is overwritten."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, cameras, filename_prefix) -> io.NodeOutput:
        path, _ = new_output(filename_prefix, ".json")
        write_camera_json(path, cameras)
        tell(cls, os.path.relpath(path, folder_paths.get_output_directory()))
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
                io.String.Input("filename_prefix", default="3d/worldstereo",
                                tooltip="In ComfyUI's output folder; a number is added, nothing is overwritten."),
                io.Combo.Input("axes", options=list(PLY_AXES),
                               tooltip="y up stands upright in 3-D viewers. OpenCV keeps the axes of the cameras, for "
                                       "tools that read them too."),
            ],
            outputs=[io.File3DPLY.Output(display_name="ply")],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, points, filename_prefix, axes) -> io.NodeOutput:
        path, subfolder = new_output(filename_prefix, ".ply")
        path.write_bytes(ply_bytes(points, y_up=axes == PLY_AXES[0]))
        tell(cls, f"{len(points):,} points\n{os.path.relpath(path, folder_paths.get_output_directory())}")
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
                Cameras.Input("cameras", tooltip="One camera a frame. Where there are more, they are thinned as "
                                                 "WorldStereo Conditioning thinned them."),
                io.String.Input("filename_prefix", default="worldstereo/frames",
                                tooltip="Of a new folder in ComfyUI's output folder; a number is added, nothing is "
                                        "overwritten."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, cameras, filename_prefix) -> io.NodeOutput:
        path, _ = new_output(filename_prefix, "")
        progress = comfy.utils.ProgressBar(len(images))
        write_world_mirror(path, images, cameras.thinned(len(images)), progress.update)
        tell(cls, os.path.relpath(path, folder_paths.get_output_directory()))
        return io.NodeOutput()


class CookFP8(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CookFP8",
            display_name="Cook FP8",
            category=CATEGORY,
            description="Makes the 20 GB scaled-FP8 file from a WorldStereo BF16 model (35 GB), in less than 2 GB of memory, "
                        "and says what it cost. The file appears under its name only when it is whole.",
            search_aliases=["quantize", "convert", "fp8", "worldstereo"],
            inputs=[
                io.Combo.Input("source", options=cook_sources(),
                               tooltip="A BF16, FP16 or FP32 WorldStereo model in models/diffusion_models, or the "
                                       ".safetensors.index.json of one in shards."),
                io.String.Input("result", default="worldstereo_fp8_scaled",
                                tooltip="The name of the new file, without a folder. It is written beside the source."),
                io.Combo.Input("recipe", options=list(RECIPES), default=RECIPES[0],
                               tooltip="default: the scale is rounded before the division, so the error is smaller; loads "
                                       "wherever published files load. published: bit for bit as the published files."),
                io.Combo.Input("convs", options=[CONVS_OF_RECIPE, *CONVS.values()], default=CONVS_OF_RECIPE, advanced=True,
                               tooltip="What becomes of the two convolution weights of the mask embedding. The recipe "
                                       "default leaves them in BF16, published makes them FP8."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of that name."),
            ],
            outputs=[io.String.Output(display_name="report"), io.Image.Output(display_name="picture")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, source, **_):
        files = open_files(folder_paths.get_full_path_or_raise("diffusion_models", source)).files
        return [file.stat().st_mtime_ns for file in files]

    @classmethod
    def execute(cls, source, result, recipe, convs, overwrite) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise("diffusion_models", source))
        bar = comfy.utils.ProgressBar(100)

        def on_progress(progress):
            comfy.model_management.throw_exception_if_processing_interrupted()
            percent = 100 * progress.nbytes // progress.total_nbytes
            if percent > bar.current:
                bar.update_absolute(percent)
                tell(cls, str(progress))

        report = cook(path, path.with_name(file_name(result, ".safetensors")),
                      Options(recipe, None if convs == CONVS_OF_RECIPE else convs), overwrite=overwrite,
                      find_config=config_to_embed, why_not=remap.why_no_source,
                      device=comfy.model_management.get_torch_device(), on_progress=on_progress)
        picture = torch.from_numpy(np.array(report.picture(), dtype=np.float32) / 255)[None]
        return io.NodeOutput(report.as_text(), picture)


class WorldStereoExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadWorldStereoFP8,
            WorldStereoConditioning,
            WorldStereoKeyframeDecode,
            WorldStereoKeyframeEncode,
            WorldStereoDMDSigmas,
            WorldStereoLoadCamera,
            WorldStereoCameraPath,
            WorldStereoRender,
            WorldStereoPanorama,
            WorldStereoSaveCamera,
            WorldStereoSavePointCloud,
            WorldStereoSaveFrames,
            CookFP8,
        ]
