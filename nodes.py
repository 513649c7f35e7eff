"""The pack's nodes, as ComfyUI asks for them; `comfy_nodes` declares them by theme."""

import importlib
import logging

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .core import MissingFromCore

THEMES = ("model", "picture", "camera", "fly", "scene", "sample", "save", "scene_files", "show", "cook")


def available() -> list[type[io.ComfyNode]]:
    """The nodes of every theme that this ComfyUI can run; the log says which themes it cannot, and why."""
    nodes = []
    for theme in THEMES:
        try:
            nodes += importlib.import_module(f".comfy_nodes.{theme}", __package__).NODES
        except MissingFromCore as e:
            logging.error(
                "WorldStereo FP8: the nodes of the theme %s are not available. %s", theme.replace("_", " "), e
            )
    return nodes


class WorldStereoExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return available()
