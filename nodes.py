"""The pack's nodes, as ComfyUI asks for them; `comfy_nodes` declares them by theme."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .comfy_nodes import camera, cook, fly, model, sample, save


class WorldStereoExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*model.NODES, *camera.NODES, *fly.NODES, *sample.NODES, *save.NODES, *cook.NODES]
