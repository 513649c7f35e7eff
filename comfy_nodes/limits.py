"""Checks of a node's inputs before it runs. ComfyUI checks the range of a widget's number, but not that of a number
from a link, and it does not check types."""

import functools
import inspect
import logging
import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io

from ..core import throw_exception_if_processing_interrupted
from ..files.text import first_few, shown
from ..scene.cameras import MAX_CAMERAS, Cameras
from ..scene.pictures import MAX_PICTURE
from ..scene.pointcloud import PointCloud
from ..scene.scene import Scene
from ..worldstereo.conditioning import References
from . import common

MAX_TEXT = 1 << 16  # characters
MAX_CHOICE = 1000  # characters of a choice, its folders included
MAX_SIDE = 1 << 15  # of one picture
MAX_FRAMES = 10_000  # pictures of one input
MAX_POINTS = 1 << 25  # a panorama's of 8192x4096
MAX_CONDITIONS = 1000
MAX_LATENT = 1 << 27  # numbers: 64 times those of 21 keyframes at 832x480
OUTSIDE = 0.05  # how far pixels may lie outside 0..1, where filters leave them, before a warning is logged
# Inputs whose nodes report a missing file themselves.
FILES = {"camera", "folder", "model_name", "base_model", "source"}


def checked(execute: Callable) -> classmethod:
    """Makes a class method of `execute` of a node, which refuses inputs that do not have their declared type, range or choices.

    A ValueError names the input. Tensors, cameras and geometries are checked as far as the nodes rely on them. Pictures
    with one channel become grey ones with three; a mask [H, W] becomes [1, H, W]. The output gets the text that the node
    has shown.
    """
    names = list(inspect.signature(execute).parameters)[1:]

    @functools.wraps(execute)
    def run(cls, *values, **named):
        declared = {entry.id: entry for entry in cls.define_schema().inputs}
        given = dict(zip(names, values, strict=False)) | named
        for name, value in given.items():
            if name not in declared:
                raise ValueError(f"{shown(name)} is not an input of {cls.define_schema().display_name}.")
            given[name] = check(declared[name], value)
        common.text_shown.set(None)
        return common.with_text_shown(cls, execute(cls, **given))

    return classmethod(run)


def check(declared: io.Input, value: Any) -> Any:
    """The value of an input, converted as `checked` says. Raises ValueError, naming the input."""
    name = declared.id
    if value is None and declared.optional:
        return None
    if declared.rawLink:  # passed on as [node, output]
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"{name} is {_what(value)}: connect a node's output.")
        return value
    for io_type in declared.get_io_type().split(","):
        kind, look = _TYPES.get(io_type, (object, None))
        if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return value if look is None else look(declared, value)
    raise ValueError(f"{name} is {_what(value)}: give {declared.get_io_type().replace(',', ' or ')}.")


def _what(value) -> str:
    if isinstance(value, str | int | float | list | None):
        return shown(repr(value)) if not isinstance(value, int) else shown(value)
    return f"a {shown(type(value).__name__)}"


def _number(declared, value):
    try:
        value = int(value) if isinstance(declared, io.Int.Input) else float(value)
    except OverflowError:  # an integer that is too large for a float
        value = math.inf
    low, high = (declared.min, declared.max)
    if not low <= value <= high:  # NaN too
        raise ValueError(f"{declared.id} is {shown(value)}: it must lie between {shown(low)} and {shown(high)}.")
    return value


def _text(declared, value):
    if len(value) > MAX_TEXT:
        raise ValueError(f"{declared.id} has {len(value)} characters; more than {MAX_TEXT} are not read.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(
            f"{declared.id} is {shown(value)}: it holds half a character (a lone surrogate). Type it again."
        )
    return value


def _choice(declared, value):
    if not value.isprintable():
        raise ValueError(f"{declared.id} is {shown(value)}: it holds characters that cannot be printed.")
    if len(value) > MAX_CHOICE:
        raise ValueError(f"{declared.id} is {shown(value)}: it has {len(value)} characters, more than any choice.")
    if declared.id not in FILES and value not in declared.options:
        raise ValueError(f"{declared.id} is {shown(repr(value))}: choose one of {first_few(declared.options, 30)}.")
    return value


def _colour(declared, value):
    try:
        common.color_of(value)
    except ValueError as error:
        raise ValueError(f"{declared.id} is {shown(repr(value))}, which is not a colour: give #rrggbb.") from error
    return value


def _shape(tensor) -> str:
    return "×".join(map(str, tensor.shape))


def _check_size(name, count, height, width):
    if min(count, height, width) < 1:
        raise ValueError(f"{name} is empty: {count} pictures of {width}×{height} pixels.")
    if max(height, width) > MAX_SIDE or height * width > MAX_PICTURE:
        raise ValueError(
            f"{name} is {width}×{height}: the limits are {MAX_SIDE} pixels per side and {MAX_PICTURE >> 20} megapixels. "
            "Make it smaller."
        )
    if count > MAX_FRAMES:
        raise ValueError(f"{name} holds {count} pictures: the limit is {MAX_FRAMES}.")


def _check_values(name, tensor) -> tuple[float, float]:
    """The smallest and the largest value of a batch, found one picture at a time, because a copy of the whole batch
    might fill the memory. Raises ValueError for NaN and infinity."""
    low, high = math.inf, -math.inf
    for number, part in enumerate(tensor):
        throw_exception_if_processing_interrupted()
        least, most = (value.item() for value in part.aminmax())
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError(
                f"{name} holds NaN or infinity, first in picture {number} (the first is 0): the node before it failed."
            )
        low, high = min(low, least), max(high, most)
    return low, high


def _pictures(declared, pictures):
    name = declared.id
    if pictures.ndim != 4 or not pictures.is_floating_point() or pictures.shape[3] not in (1, 3, 4):
        raise ValueError(
            f"{name} is {_shape(pictures)} of {pictures.dtype}: pictures are [number, height, width, 3] in 0..1."
        )
    _check_size(name, *pictures.shape[:3])
    low, high = _check_values(name, pictures)
    if low < -OUTSIDE or high > 1 + OUTSIDE:
        logging.warning("WorldStereo: pixels of %s range from %.3g to %.3g; they are clipped to 0..1.", name, low, high)
    return pictures.expand(-1, -1, -1, 3) if pictures.shape[3] == 1 else pictures


def _masks(declared, mask):
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or not mask.is_floating_point():
        raise ValueError(f"{declared.id} is {_shape(mask)} of {mask.dtype}: masks are [number, height, width] in 0..1.")
    _check_size(declared.id, *mask.shape)
    _check_values(declared.id, mask)
    return mask


def _cameras(declared, cameras):
    if len(cameras) > MAX_CAMERAS:
        raise ValueError(f"{declared.id} holds {len(cameras)} cameras: the limit is {MAX_CAMERAS}.")
    return cameras


def _points(declared, cloud):
    if len(cloud) > MAX_POINTS:
        raise ValueError(f"{declared.id} holds {len(cloud):,} points: the limit is {MAX_POINTS:,}.")
    return cloud


def _geometry(declared, geometry):
    """Core's MOGE_GEOMETRY; or LOAD3D_CAMERA, which `camera_of_viewer` checks."""
    if "LOAD3D_CAMERA" in declared.get_io_type():
        return geometry
    depth = geometry.get("depth")
    if not isinstance(depth, torch.Tensor) or depth.ndim != 3 or not depth.is_floating_point():
        raise ValueError(f"{declared.id} is not a MoGe geometry: it has no depth [number, height, width].")
    _check_size(f"{declared.id}'s depth", *depth.shape)
    count, height, width = depth.shape
    shapes = {"mask": depth.shape, "intrinsics": (count, 3, 3)}
    shapes |= dict.fromkeys(("image", "normal", "points"), (count, height, width, 3))
    for key, shape in shapes.items():
        if (part := geometry.get(key)) is None:
            continue
        if not isinstance(part, torch.Tensor) or part.shape != tuple(shape):
            is_ = _shape(part) if isinstance(part, torch.Tensor) else _what(part)
            raise ValueError(
                f"{declared.id}'s {key} is {is_}: with a depth of {_shape(depth)} it must be "
                f"{'×'.join(map(str, shape))}."
            )
    if geometry.get("mask") is not None and geometry["mask"].dtype != torch.bool:
        geometry = geometry | {"mask": geometry["mask"] > 0.5}
    for key in ("image", "intrinsics"):
        if geometry.get(key) is not None:
            _check_values(f"{declared.id}'s {key}", geometry[key])
    return {key: part for key, part in geometry.items() if part is not None}


def _conditions(declared, conditions):
    fine = 0 < len(conditions) <= MAX_CONDITIONS and all(
        isinstance(entry, list | tuple)
        and len(entry) == 2
        and isinstance(entry[0], torch.Tensor)
        and isinstance(entry[1], dict)
        for entry in conditions
    )
    if not fine:
        raise ValueError(f"{declared.id} is not a conditioning: connect a WorldStereo Prompt or CLIP Text Encode.")
    return conditions


def _latent(declared, latent):
    samples = latent.get("samples")
    if not isinstance(samples, torch.Tensor) or samples.numel() == 0 or samples.ndim not in (4, 5):
        raise ValueError(f"{declared.id} is not a latent, or an empty one: connect a sampler's.")
    if samples.numel() > MAX_LATENT:
        raise ValueError(f"{declared.id} holds {samples.numel():,} numbers: at most {MAX_LATENT:,} are taken.")
    if not all(part.isfinite().all() for part in samples):
        raise ValueError(f"{declared.id} holds NaN or infinity: the sampling failed.")
    return latent


def _has(attribute):
    def look(declared, value):
        if not hasattr(value, attribute):
            raise ValueError(f"{declared.id} is {_what(value)}: give {declared.get_io_type()}.")
        return value

    return look


_TYPES = {
    "INT": (numbers.Integral, _number),
    "FLOAT": (numbers.Real, _number),
    "STRING": (str, _text),
    "BOOLEAN": (bool, None),
    "COMBO": (str, _choice),
    "COLOR": (str, _colour),
    "IMAGE": (torch.Tensor, _pictures),
    "MASK": (torch.Tensor, _masks),
    "LATENT": (dict, _latent),
    "CONDITIONING": (list | tuple, _conditions),
    "MODEL": (object, _has("model_options")),
    "VAE": (object, _has("first_stage_model")),
    "CLIP": (object, _has("tokenize")),
    "CLIP_VISION": (object, _has("encode_image")),
    "CLIP_VISION_OUTPUT": (object, _has("penultimate_hidden_states")),
    "MOGE_GEOMETRY": (dict, _geometry),
    "MOGE_MODEL": (object, _has("num_tokens_range")),
    "LOAD3D_CAMERA": (dict, None),
    common.Cameras.io_type: (Cameras, _cameras),
    common.Points.io_type: (PointCloud, _points),
    common.Scene.io_type: (Scene, None),
    common.SceneReferences.io_type: (References, None),
}
