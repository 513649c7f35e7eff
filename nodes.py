"""The pack's nodes, as ComfyUI asks for them; `comfy_nodes` declares them by theme."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .comfy_nodes import camera, cook, fly, model, picture, sample, save, scene, scene_files, show

THEMES = (model, picture, camera, fly, scene, sample, save, scene_files, show, cook)


class WorldStereoExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for theme in THEMES for node in theme.NODES]
