"""What the nodes share: their category, their link types, colours, splats, and showing a text on a node."""

import logging
import math
from collections.abc import Sequence
from contextvars import ContextVar

import torch
from comfy_api.latest import Types, io, ui
from PIL import ImageColor

from ..core import PromptServer, throw_exception_if_processing_interrupted
from ..scene.pictures import resize_pictures, within

CATEGORY = "WorldStereo"
SH_DEGREE_0 = 0.5 / math.sqrt(math.pi)  # the constant spherical harmonic

Cameras = io.Custom("WORLDSTEREO_CAMERAS")  # scene.cameras.Cameras
Points = io.Custom("WORLDSTEREO_POINTS")  # scene.pointcloud.PointCloud
Scene = io.Custom("WORLDSTEREO_SCENE")  # scene.scene.Scene
SceneReferences = io.Custom("WORLDSTEREO_REFERENCES")  # worldstereo.conditioning.References
MoGeModel = io.Custom("MOGE_MODEL")
MoGeGeometry = io.Custom("MOGE_GEOMETRY")  # core's dict of comfy_extras/nodes_moge.py

text_shown: ContextVar[str | None] = ContextVar("text_shown", default=None)  # by the node that is running


def show_on_node(node: type[io.ComfyNode], text: str, remarks: Sequence[str] = ()) -> None:
    """Shows a text on the running node, and below it remarks, which are also logged as warnings. A node that another
    node has expanded into ("12.0.0.left.add") shows its text on that other node."""
    for remark in remarks:
        logging.warning("%s: %s.", node.define_schema().display_name, remark)
    text = "\n".join([text, *remarks])
    text_shown.set(text)
    if node.hidden.unique_id:
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id.partition(".")[0])


def with_text_shown(node: type[io.ComfyNode], output: io.NodeOutput) -> io.NodeOutput:
    """A node's output with the text it has shown. ComfyUI's cache keeps that with the previews, and web/js/node_text.js
    shows it again where the node need not run again."""
    text = text_shown.get()
    if text and node.hidden.unique_id and "." not in node.hidden.unique_id:  # the node that expanded has its own text
        previews = output.ui if isinstance(output.ui, dict | None) else output.ui.as_dict()
        output.ui = (previews or {}) | {"worldstereo_text": [text]}
    return output


def preview_of(node: type[io.ComfyNode], picture: torch.Tensor) -> ui.PreviewImage:
    """A picture [1, H, W, 3] for the node to show. A large one is reduced: ComfyUI takes seconds to write it, which the
    stop button does not end."""
    size = within(*picture.shape[1:3])
    return ui.PreviewImage(picture if picture.shape[1:3] == size else resize_pictures(picture, *size), cls=node)


def color_of(text: str) -> tuple[float, float, float]:
    """The value of a colour input (#rrggbb) in 0..1. 128 stands for mid-grey, 0.5, which no byte equals exactly. Raises
    ValueError for a text that is not a colour."""
    red, green, blue = (0.5 if channel == 128 else channel / 255 for channel in ImageColor.getrgb(text)[:3])
    return red, green, blue


def splat_of(
    points: torch.Tensor,
    sizes: torch.Tensor,
    colors: torch.Tensor,
    opacity: float,
    rotations: torch.Tensor | None = None,
) -> Types.SPLAT:
    """Gaussians in the form of core's splat nodes. points [P, 3]; sizes [P, 3], the standard deviations along the axes of
    each; colors [P, 3] in 0..1; one opacity for all; rotations [P, 4] of the axes, quaternions with the real part
    first, or None for the world's axes."""
    count = len(points)
    if rotations is None:
        rotations = points.new_tensor([1.0, 0, 0, 0]).expand(count, 4)
    throw_exception_if_processing_interrupted()
    harmonics = (colors - 0.5).div_(SH_DEGREE_0)[:, None]
    parts = (points, sizes, rotations, points.new_full((count, 1), opacity), harmonics)
    return Types.SPLAT(*(part[None] for part in parts))
