"""Nodes for a scene that remembers: start it, render a path, add the generated frames, continue, explore a list of
paths."""

from comfy_api.latest import io

from ..core import GraphBuilder, ProgressBar, get_torch_device
from ..scene.depth import depths_of_moge
from ..scene.explore import LAST, LISTS, OWN_LIST, read_walks
from ..scene.fuse import POINTS_LIMIT
from ..scene.keyframe_depth import MOGE_BATCH, MOGE_LEVEL, keyframe_geometry
from ..scene.memory import REFERENCES, REMEMBERED, frames_to_remember
from ..scene.panorama import not_whole
from ..scene.pictures import stretches, within
from ..scene.render import RADIUS, summary
from ..scene.scene import MAX_POINTS
from ..scene.start import VIEW_SIZE, is_panorama, scene_of_panorama, scene_of_picture
from ..scene.walk import ASKING, prepare_path, remember_clip, start_view
from ..worldstereo.comfy_model import config_of
from ..worldstereo.conditioning import References, keyframe_size
from ..worldstereo.config import WorldStereoConfig
from .common import CATEGORY, Cameras, MoGeGeometry, MoGeModel, Points, Scene, SceneReferences, preview_of, show_on_node
from .files import check_prefix
from .inputs import (
    clip_inputs,
    depth_picture_inputs,
    radius_input,
    remember_input,
    render_outputs,
    size_inputs,
    size_model_input,
)
from .limits import checked


class WorldStereoStartScene(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoStartScene",
            display_name="WorldStereo Start Scene",
            category=CATEGORY,
            description="Starts a scene that remembers: from one picture and its depth, or from a panorama, from which "
            "27 views are taken. Paths through it then see what earlier paths showed.",
            search_aliases=["world", "scene memory", "explore", "panorama bank", "memory bank"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to start from, or an equirectangular panorama."),
                io.MultiType.Input(
                    "depth",
                    types=[MoGeGeometry, io.Image],
                    tooltip="MoGe's geometry of the same picture, or its grey depth or disparity picture. For a "
                    "panorama: the geometry from Run MoGe Panorama Inference.",
                ),
                Cameras.Input(
                    "camera",
                    optional=True,
                    tooltip="The camera that took the picture. Without it: a level camera at the origin with MoGe's "
                    "lens. Not used for a panorama.",
                ),
                *depth_picture_inputs(advanced=True),
                *size_inputs(
                    "the scene's views",
                    "the model's size for this picture, or, without model, the picture's "
                    f"own size; for a panorama {VIEW_SIZE[0]}x{VIEW_SIZE[1]}",
                ),
                size_model_input(),
            ],
            outputs=[Scene.Output(display_name="scene")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls, image, depth, depth_picture, near, far, width, height, camera=None, model=None) -> io.NodeOutput:
        panorama = is_panorama(depth)
        if not width or not height:
            size = VIEW_SIZE[::-1] if panorama else image.shape[1:3]
            height, width = within(*size) if model is None else keyframe_size(config_of(model), *size)
        if panorama:
            scene = scene_of_panorama(depth, width, height)
            remarks = [remark] if (remark := not_whole(*depth["image"].shape[1:3])) else []
        else:
            scene = scene_of_picture(image, depth, camera, depth_picture, near, far, width, height)
            remarks = stretches(height, width, image=image.shape[1:3])
        show_on_node(cls, str(scene), remarks)
        return io.NodeOutput(scene, ui=preview_of(cls, scene.picture(0)))


class WorldStereoScenePath(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoScenePath",
            display_name="WorldStereo Scene Path",
            category=CATEGORY,
            description="Prepares a camera path through a scene: the render of the scene's points with its holes, and "
            "the remembered views that the model is shown as references.",
            search_aliases=["memory", "reference views", "retrieval", "point cloud render"],
            inputs=[
                Scene.Input("scene"),
                io.Image.Input("image", tooltip="The picture the path starts with. It is also the first frame."),
                Cameras.Input("cameras", tooltip="The path, in the scene's world, from Camera Path or a file."),
                io.Int.Input(
                    "references",
                    default=REFERENCES,
                    min=1,
                    max=20,
                    tooltip=f"The most views to show the model. It was trained with up to {REFERENCES}; fewer are "
                    "faster.",
                ),
                io.Combo.Input(
                    "ask_for",
                    options=list(ASKING),
                    tooltip="Prefer the views of an earlier path that this path continues or mirrors.",
                ),
                io.String.Input(
                    "ask_path", default="", tooltip="For ask_for: the name of the earlier path. Empty: the last one."
                ),
                radius_input(),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="If more views fit than references allows, it helps to choose ones that look different; "
                    "without it, ones whose cameras differ are chosen.",
                ),
            ],
            outputs=[
                *render_outputs(),
                SceneReferences.Output(display_name="references", tooltip="For WorldStereo Conditioning."),
                io.Image.Output(display_name="reference_images", tooltip="The chosen views, to look at."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls, scene, image, cameras, references, ask_for, ask_path, radius, clip_vision=None) -> io.NodeOutput:
        embed = None if clip_vision is None else lambda pictures: clip_vision.encode_image(pictures).image_embeds
        path = prepare_path(
            scene,
            image,
            cameras,
            WorldStereoConfig().nframe,
            references,
            ask_for,
            ask_path.strip(),
            embed,
            radius,
            get_torch_device(),
            ProgressBar(len(cameras)).update,
        )
        views, ref_index = list(path.views), path.ref_index
        chosen = References(path.pictures, scene.cameras[views], ref_index)
        listed = ", ".join(f"{scene.names[view]} from keyframe {index + 1}" for view, index in zip(views, ref_index))
        show_on_node(cls, f"{summary(scene.cloud, path.holes)}\nreferences: {listed}")
        return io.NodeOutput(path.video, path.holes, chosen, path.pictures)


class WorldStereoKeyframeDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoKeyframeDepth",
            display_name="WorldStereo Keyframe Depth",
            category=CATEGORY,
            description="Finds the depth of the keyframes that Add to Scene remembers, with MoGe in half precision. It "
            "is several times faster than Run MoGe Inference on all keyframes, and it knows the path's lens.",
            search_aliases=["moge", "depth estimation", "geometry", "depth of a path"],
            inputs=[
                MoGeModel.Input("moge_model", tooltip="From core's Load MoGe Model."),
                *clip_inputs(),
                remember_input("How many keyframes get a depth: the same number as in Add to Scene."),
                io.Int.Input(
                    "resolution_level",
                    default=MOGE_LEVEL,
                    min=0,
                    max=9,
                    advanced=True,
                    tooltip="MoGe's detail: 0 is the fastest, 9 the most detailed.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=MOGE_BATCH,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="The most keyframes at a time; fewer where VRAM is short. Each takes about 1 GiB of VRAM "
                    "at the most detailed level.",
                ),
            ],
            outputs=[
                MoGeGeometry.Output(
                    display_name="depth", tooltip="For Add to Scene. Render MoGe Geometry shows its depth and mask."
                )
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls, moge_model, images, cameras, remember, resolution_level, batch_size) -> io.NodeOutput:
        progress = ProgressBar(len(frames_to_remember(len(images), remember)))
        given = (moge_model, images, cameras, remember, resolution_level, batch_size)
        geometry = keyframe_geometry(*given, progress.update)
        count, share = len(geometry["mask"]), geometry["mask"].float().mean().item()
        show_on_node(cls, f"depth of {count} of {len(images)} keyframes, in {share:.0%} of their pixels")
        return io.NodeOutput(geometry)


class WorldStereoAddToScene(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoAddToScene",
            display_name="WorldStereo Add to Scene",
            category=CATEGORY,
            description="Adds a generated path to the scene: some of its keyframes as views and, with their depth, the "
            "points they show. The scene it was given stays as it was: bypass this node to undo it.",
            search_aliases=["memory", "remember", "fuse", "grow point cloud"],
            inputs=[
                Scene.Input("scene"),
                *clip_inputs(),
                io.String.Input("name", default="", tooltip="The path's name. Empty: path_1, path_2 and so on."),
                remember_input("How many keyframes become views: never the first, always the last."),
                io.Int.Input(
                    "max_points",
                    default=POINTS_LIMIT,
                    min=1000,
                    max=MAX_POINTS,
                    step=1000,
                    advanced=True,
                    tooltip="The point cloud is thinned to about this many points.",
                ),
                MoGeGeometry.Input(
                    "depth",
                    optional=True,
                    tooltip="From Keyframe Depth, or MoGe's geometry of all the keyframes (it runs on a batch). Its "
                    "scale is fitted to the scene; frames that do not fit add no points. Without it the point cloud "
                    "stays as it is.",
                ),
            ],
            outputs=[
                Scene.Output(display_name="scene"),
                Points.Output(display_name="points", tooltip="The scene's point cloud."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls, scene, images, cameras, name, remember, max_points, depth=None) -> io.NodeOutput:
        depths = None if depth is None else depths_of_moge(depth)
        progress = ProgressBar(len(images) if depths is None else len(depths))
        given = (scene, images, cameras, name, remember, depths, max_points, get_torch_device(), progress.update)
        grown, report = remember_clip(*given)
        show_on_node(cls, f"{grown}\n{report or 'no depth given: the point cloud stays as it is'}")
        return io.NodeOutput(grown, grown.cloud)


class WorldStereoContinue(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoContinue",
            display_name="WorldStereo Continue",
            category=CATEGORY,
            description="Takes a view of the scene as the start of the next path: its picture for image and its camera "
            "for start of Camera Path, and the scene's points.",
            search_aliases=["extend", "last frame", "next path", "walk on"],
            inputs=[
                Scene.Input("scene"),
                io.String.Input(
                    "view",
                    default=LAST,
                    tooltip="last: the last frame of the last path. first: the scene's first view. Or a view by name, "
                    "such as path_1/0012 or panorama/0003.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The start picture."),
                Cameras.Output(display_name="camera", tooltip="For start of WorldStereo Camera Path."),
                Points.Output(display_name="points", tooltip="For scene of WorldStereo Camera Path."),
                io.Float.Output(
                    display_name="fov",
                    tooltip="The camera's horizontal field of view in degrees, for fov_x_degrees of Run MoGe "
                    "Inference.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @checked
    def execute(cls, scene, view) -> io.NodeOutput:
        number = start_view(scene, view.strip())
        picture = scene.picture(number)
        camera = scene.cameras[number]
        show_on_node(cls, f"{scene.names[number]}, one of {len(scene)} views")
        return io.NodeOutput(picture, camera, scene.cloud, camera.fov.item(), ui=preview_of(cls, picture))


class WorldStereoExploreScene(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        def linked(type_, name, **options):
            return type_.Input(
                name, raw_link=True, **options
            )  # the link itself, so that ComfyUI's cache knows the source

        return io.Schema(
            node_id="WorldStereoExploreScene",
            display_name="WorldStereo Explore Scene",
            category=CATEGORY,
            description="Takes a list of paths through a scene, one after the other, each with the memory of those "
            "before. It becomes ordinary nodes when it runs, so a finished path is not computed again, not even after "
            "an interruption.",
            search_aliases=["world", "explore", "walk through", "all paths", "scene trajectory"],
            inputs=[
                linked(Scene, "scene", tooltip="From Start Scene, Load Scene or Add to Scene."),
                linked(io.Model, "model", tooltip="A memory variant, from Load WorldStereo FP8."),
                linked(io.Conditioning, "positive"),
                linked(io.Conditioning, "negative"),
                linked(io.Vae, "vae", tooltip="The Wan 2.1 VAE."),
                linked(io.Sampler, "sampler", tooltip="euler for memory-dmd."),
                linked(io.Sigmas, "sigmas", tooltip="From WorldStereo DMD Sigmas for memory-dmd."),
                linked(
                    io.ClipVision,
                    "clip_vision",
                    optional=True,
                    tooltip="CLIP ViT-H: encodes each path's start picture, as the model expects, and helps the choice "
                    "among many references.",
                ),
                linked(
                    MoGeModel,
                    "moge_model",
                    optional=True,
                    tooltip="From core's Load MoGe Model: the depth of each new path adds to the scene's point cloud. "
                    "Without it the cloud does not grow.",
                ),
                io.Combo.Input(
                    "paths",
                    options=[*LISTS, OWN_LIST],
                    tooltip="Which paths to take. The lists with fewer headings are quicker.",
                ),
                io.String.Input(
                    "own_list",
                    multiline=True,
                    default="left from first: orbit left 25\non: dolly in 0.2",
                    tooltip=f"For {OWN_LIST}: one line per path, NAME [from VIEW]: PRESET AMOUNT [asks PATH | mirrors "
                    "PATH]. Without a view it continues the previous path. AMOUNT: degrees, or units of the scene's "
                    "depth.",
                ),
                io.Int.Input(
                    "stop_after",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Take only this many paths from the start of the list; 0: all. Raise it to continue from "
                    "there.",
                ),
                io.Int.Input("keyframes", default=21, min=2, max=21, tooltip="Keyframes of each path."),
                io.Int.Input(
                    "references",
                    default=REFERENCES,
                    min=1,
                    max=20,
                    tooltip="The most remembered views that each path is shown.",
                ),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the first path; each following path adds one. Keep it fixed, or every path is "
                    "computed again at each run.",
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="1 for memory-dmd, 5 for memory."
                ),
                io.String.Input(
                    "video_prefix",
                    default="video/scene",
                    tooltip="Each path's keyframes are saved as a video with this name in ComfyUI's output folder. "
                    "Empty: only shown, not saved.",
                ),
                io.String.Input(
                    "scene_prefix",
                    default="",
                    tooltip="The whole scene is saved after each path, every time in a new folder with this name in "
                    "ComfyUI's output folder. Empty: not saved; connect Save Scene to save the last one.",
                ),
            ],
            outputs=[
                Scene.Output(display_name="scene"),
                io.Image.Output(display_name="images", tooltip="The keyframes of the last path."),
                Points.Output(display_name="points", tooltip="The scene's point cloud."),
            ],
            enable_expand=True,
            hidden=[io.Hidden.unique_id],
        )

    @checked
    def execute(cls, paths, own_list, stop_after, noise_seed, **inputs) -> io.NodeOutput:
        for name in ("video_prefix", "scene_prefix"):  # before the work, not when it is time to save
            check_prefix(name, inputs[name].strip())
        walks = read_walks(own_list if paths == OWN_LIST else LISTS[paths])
        walks = walks[: stop_after or len(walks)]
        graph = GraphBuilder()
        scene = inputs.pop("scene")
        for number, walk in enumerate(walks):
            scene, images, points = cls.take_path(graph, walk, scene, noise_seed + number, **inputs)
        show_on_node(cls, f"{len(walks)} paths: {', '.join(walk.name for walk in walks)}")
        return io.NodeOutput(scene, images, points, expand=graph.finalize())

    @staticmethod
    def take_path(
        graph,
        walk,
        scene,
        seed,
        model,
        positive,
        negative,
        vae,
        sampler,
        sigmas,
        keyframes,
        references,
        cfg,
        video_prefix,
        scene_prefix,
        clip_vision=None,
        moge_model=None,
    ):
        """Adds the nodes of one path to the graph. Returns the links to the scene with the path, to its keyframes and
        to the points."""

        def node(class_type, step, **values):
            given = {name: value for name, value in values.items() if value is not None}
            return graph.node(class_type, f"{walk.name}.{step}", **given).out

        start = node("WorldStereoContinue", "start", scene=scene, view=walk.view)
        seen = None
        if clip_vision is not None:
            seen = node("CLIPVisionEncode", "picture", clip_vision=clip_vision, image=start(0), crop="center")(0)
        cameras = node(
            "WorldStereoCameraPath",
            "cameras",
            image=start(0),
            start=start(1),
            scene=start(2),
            preset=walk.preset,
            degrees=walk.degrees,
            distance=walk.distance,
            keyframes=keyframes,
            easing="linear",
            look_at_centre="auto",
            lens="auto",
            lens_value=60.0,
            scene_depth=0.0,
            start_pitch=0.0,
        )(0)
        look = node(
            "WorldStereoScenePath",
            "look",
            scene=scene,
            image=start(0),
            cameras=cameras,
            references=references,
            ask_for=walk.ask,
            ask_path=walk.asked,
            radius=RADIUS,
            clip_vision=clip_vision,
        )
        conditioned = node(
            "WorldStereoConditioning",
            "conditioning",
            model=model,
            positive=positive,
            negative=negative,
            vae=vae,
            image=start(0),
            render_video=look(0),
            render_mask=look(1),
            cameras=cameras,
            clip_vision_output=seen,
            references=look(2),
        )
        sampled = node(
            "SamplerCustom",
            "sample",
            model=model,
            add_noise=True,
            noise_seed=seed % 2**64,
            cfg=cfg,
            positive=conditioned(0),
            negative=conditioned(1),
            sampler=sampler,
            sigmas=sigmas,
            latent_image=conditioned(2),
        )
        images = node("WorldStereoKeyframeDecode", "decode", samples=sampled(0), vae=vae)(0)
        depth = None
        if moge_model is not None:
            depth = node(
                "WorldStereoKeyframeDepth",
                "depth",
                moge_model=moge_model,
                images=images,
                cameras=cameras,
                remember=REMEMBERED,
                resolution_level=MOGE_LEVEL,
                batch_size=MOGE_BATCH,
            )(0)
        added = node(
            "WorldStereoAddToScene",
            "add",
            scene=scene,
            images=images,
            cameras=cameras,
            name=walk.name,
            remember=REMEMBERED,
            max_points=POINTS_LIMIT,
            depth=depth,
        )
        if video_prefix.strip():
            video = node("CreateVideo", "video", images=images, fps=16.0)(0)
            prefix = f"{video_prefix.strip()}_{walk.name}"
            node("SaveVideo", "save", video=video, filename_prefix=prefix, format="auto", codec="auto")
        else:
            node("WorldStereoPreviewClip", "show", images=images, render_video=look(0), fps=16.0)
        if scene_prefix.strip():
            node("WorldStereoSaveScene", "keep", scene=added(0), filename_prefix=scene_prefix.strip())
        return added(0), images, added(1)


NODES = [
    WorldStereoStartScene,
    WorldStereoScenePath,
    WorldStereoKeyframeDepth,
    WorldStereoAddToScene,
    WorldStereoContinue,
    WorldStereoExploreScene,
]
