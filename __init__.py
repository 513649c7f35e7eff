"""WorldStereo FP8 for ComfyUI.

Importing this package needs torch and comfy only; the nodes, which need the whole ComfyUI server, are imported when
ComfyUI asks for them.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's entry point of a V3 node pack: returns the extension that lists our nodes."""
    from .nodes import WorldStereoExtension

    return WorldStereoExtension()
