"""The nodes: each declares its schema and calls one function of the pack."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

CATEGORY = "WorldStereo"

Cameras = io.Custom("WORLDSTEREO_CAMERAS")  # worldstereo.cameras.Cameras


class WorldStereoExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return []
