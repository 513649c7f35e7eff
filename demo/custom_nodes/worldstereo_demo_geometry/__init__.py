"""Three nodes only for the demo and the tests: stand-ins for core's MoGe nodes and model, of which there is no toy
size."""

import torch
from comfy.ldm.moge.panorama import _uv_grid, spherical_uv_to_directions
from comfy_api.latest import ComfyExtension, io

Geometry = io.Custom("MOGE_GEOMETRY")


class StandInGeometry(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoDemoGeometry",
            display_name="Demo stand-in: MoGe",
            description="Stands in for MoGe in the demo: a floor that runs up into a wall, whatever the picture shows.",
            category="WorldStereo/demo",
            inputs=[io.Image.Input("image")],
            outputs=[Geometry.Output()],
        )

    @classmethod
    def execute(cls, image) -> io.NodeOutput:
        height, width = image.shape[1:3]
        below_middle = torch.linspace(-0.5, 0.5, height)[:, None].expand(height, width)
        depth = 1 / below_middle.clamp_min(0.15)
        intrinsics = torch.tensor([[[0.9, 0, 0.5], [0, 0.9 * width / height, 0.5], [0, 0, 1]]])
        return io.NodeOutput({"image": image, "depth": depth[None], "intrinsics": intrinsics})


class StandInPanoramaGeometry(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoDemoPanoramaGeometry",
            display_name="Demo stand-in: MoGe panorama",
            description="Stands in for MoGe's panorama node in the demo: a room, twice as long as it is wide and high.",
            category="WorldStereo/demo",
            inputs=[io.Image.Input("image")],
            outputs=[Geometry.Output()],
        )

    @classmethod
    def execute(cls, image) -> io.NodeOutput:
        directions = torch.from_numpy(spherical_uv_to_directions(_uv_grid(*image.shape[1:3])))
        distance = 1 / (directions.abs() / torch.tensor([2.0, 1.0, 1.0])).amax(-1)
        return io.NodeOutput(
            {
                "image": image,
                "depth": distance[None],
                "points": (directions * distance[..., None])[None],
                "mask": torch.ones_like(distance[None], dtype=torch.bool),
            }
        )


class FloorAndWall:
    """What MoGeInference and WorldStereoKeyframeDepth need of core's MoGeModel: a floor that runs up into a wall,
    whatever the pictures show."""

    load_device = torch.device("cpu")
    num_tokens_range = (1200, 3600)

    def infer(self, pictures, fov_x, **_):
        if fov_x is not None and not all(1 < degrees < 170 for degrees in torch.as_tensor(fov_x).flatten().tolist()):
            raise ValueError(f"fov_x is {fov_x}.")
        count, _, height, width = pictures.shape
        depth = 1 / torch.linspace(-0.5, 0.5, height).clamp_min(0.15)
        intrinsics = torch.tensor([[0.9, 0, 0.5], [0, 0.9 * width / height, 0.5], [0, 0, 1]])
        return {
            "depth": depth[:, None].expand(count, height, width).clone(),
            "intrinsics": intrinsics.expand(count, 3, 3),
            "mask": torch.ones(count, height, width, dtype=torch.bool),
        }


class StandInModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoDemoMoGeModel",
            display_name="Demo stand-in: MoGe model",
            description="Stands in for the MoGe model in the demo: a floor that runs up into a wall.",
            category="WorldStereo/demo",
            outputs=[io.Custom("MOGE_MODEL").Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(FloorAndWall())


class DemoGeometryExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [StandInGeometry, StandInPanoramaGeometry, StandInModel]


async def comfy_entrypoint() -> DemoGeometryExtension:
    return DemoGeometryExtension()
