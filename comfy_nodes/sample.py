"""Drawn scenes to try the workflows with, without a file or a depth model."""

from comfy_api.latest import io, ui

from ..scene import sample
from ..scene.sample import picture_or_sample
from .common import CATEGORY, Cameras, MoGeGeometry, Points
from .limits import checked


class WorldStereoSampleScene(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoSampleScene",
            display_name="WorldStereo Sample Scene",
            category=CATEGORY,
            description="A drawn room with exact depth, to try a workflow without a picture, a depth model or a camera "
            f"file: {sample.WIDTH}x{sample.HEIGHT}, in metres.",
            search_aliases=["example", "demo", "test picture", "worldstereo sample", "3d photo"],
            outputs=[
                io.Image.Output(display_name="image"),
                MoGeGeometry.Output(
                    display_name="moge_geometry",
                    tooltip="The picture's exact geometry in MoGe's form: for depth of Render and scene of Camera "
                    "Path.",
                ),
                io.Image.Output(
                    display_name="depth",
                    tooltip=f"Disparity in grey: white is {sample.NEAR:g} m, black {sample.FAR:g} m, the defaults of "
                    "WorldStereo Render.",
                ),
                Points.Output(display_name="points"),
                Cameras.Output(
                    display_name="cameras",
                    tooltip=f"{sample.MOVE.keyframes} cameras: an orbit of {sample.MOVE.degrees:g} degrees to the "
                    "left.",
                ),
            ],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls) -> io.NodeOutput:
        image, geometry, depth, points, cameras = sample.sample()
        return io.NodeOutput(image, geometry, depth, points, cameras, ui=ui.PreviewImage(image, cls=cls))


class WorldStereoSamplePanorama(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoSamplePanorama",
            display_name="WorldStereo Sample Panorama",
            category=CATEGORY,
            description="The room of WorldStereo Sample Scene as a panorama around its camera, with exact distances: "
            "to try a workflow without a file or a depth model.",
            search_aliases=["example", "demo", "360", "equirectangular"],
            outputs=[
                io.Image.Output(display_name="image", tooltip="Equirectangular."),
                MoGeGeometry.Output(
                    display_name="moge_geometry", tooltip="As core's Run MoGe Panorama Inference gives it."
                ),
            ],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls) -> io.NodeOutput:
        exact = sample.panorama_geometry()
        return io.NodeOutput(exact["image"], exact, ui=ui.PreviewImage(exact["image"], cls=cls))


class WorldStereoPictureOrSample(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoPictureOrSample",
            display_name="WorldStereo Picture or Sample",
            category=CATEGORY,
            description="Passes on your picture and its geometry. If neither is connected, or both are muted, the "
            "drawn scene of WorldStereo Sample Scene takes their place, to try a workflow without a picture or MoGe.",
            search_aliases=["example", "demo", "sample", "switch", "360"],
            inputs=[
                io.Image.Input("image", optional=True, tooltip="Your picture, at the model's size, or your panorama."),
                MoGeGeometry.Input("moge_geometry", optional=True, tooltip="MoGe's geometry of the same picture."),
                io.Combo.Input(
                    "sample",
                    options=list(sample.SAMPLE_GEOMETRIES),
                    optional=True,
                    tooltip="What takes the place of your picture: the drawn room as a picture, or as a panorama.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image"), MoGeGeometry.Output(display_name="moge_geometry")],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls, image=None, moge_geometry=None, sample="picture") -> io.NodeOutput:
        image, geometry = picture_or_sample(image, moge_geometry, sample)
        return io.NodeOutput(image, geometry, ui=ui.PreviewImage(image, cls=cls))


NODES = [WorldStereoPictureOrSample, WorldStereoSampleScene, WorldStereoSamplePanorama]
