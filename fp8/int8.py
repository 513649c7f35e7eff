"""The INT8 format with rotation: ComfyUI's `int8_tensorwise` with `convrot`.

A weight [N, K] is stored as int8 values and one FP32 scale per row, `weight_scale` [N, 1]; values · scale is the
weight, rotated in groups of its input channels (see `rotation`). `comfy_quant` describes this, as JSON in a uint8
tensor.
"""

import json

import torch

from ..files import json as bounded_json
from ..files.text import shown
from .recipe import is_quantised
from .rotation import GROUP, group_refusal, rotate

INT8 = torch.int8
INT8_MAX = 127.0
SMALLEST_SCALE = 1e-30  # of a row of zeros, as in comfy-kitchen
FORMAT = "int8_tensorwise"
SCALE_SUFFIX = "weight_scale"


def is_int8(name: str, shape: tuple[int, ...], group: int = GROUP) -> bool:
    """Whether the recipe quantises the tensor of this diffusers name and shape to INT8: the matrices that the FP8
    recipe quantises, if their input channels are a multiple of `group`."""
    return is_quantised(name, shape, "bf16") and shape[1] % group == 0


def description(group: int = GROUP) -> bytes:
    """The `comfy_quant` of a layer rotated in groups of this size, 0 for one that is not."""
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    return json.dumps({"format": FORMAT} | rotation).encode()


def group_of(quant: dict) -> int:
    """The group size of a `comfy_quant`'s rotation, 0 for none. Some tools nest the settings in `params`."""
    nested = quant.get("params")
    settings = (nested if isinstance(nested, dict) else {}) | quant
    return settings.get("convrot_groupsize", GROUP) if settings.get("convrot", False) else 0


def read_description(content: bytes, where: str) -> dict:
    """The JSON of a `comfy_quant`, which has a `format`. Raises ValueError, naming `where`, for anything else."""
    quant = bounded_json.parse(content, where)
    if not isinstance(quant, dict) or not isinstance(quant.get("format"), str):
        raise ValueError(f"{where} is not a description of a quantised layer: {shown(quant)}")
    for settings in (quant, quant.get("params")):
        group = settings.get("convrot_groupsize", GROUP) if isinstance(settings, dict) else GROUP
        if not isinstance(group, int) or isinstance(group, bool) or group < 1:
            raise ValueError(f"{where} says that convrot_groupsize is {shown(group)}; it must be a positive integer.")
    return quant


def check_group(group: int, width: int, where: str) -> None:
    """Raises ValueError, naming `where`, for a rotation that a layer of `width` input channels cannot have."""
    if group and (refusal := group_refusal(group, width)):
        raise ValueError(f"{where} says that it is rotated in groups of {group}: that is {refusal}.")


def quantise_weight(weight: torch.Tensor, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] (or some rows of it), floating point and finite, in the format.

    Returns int8 values [N, K] and FP32 scales [N, 1]: each row's largest magnitude over 127. group 0: not rotated. The
    CPU and CUDA give the same bytes: additions are done in a fixed order, and divisions are IEEE's.
    """
    rows = weight.float()
    rows = rotate(rows, group) if group else rows
    amax = rows.abs().amax(dim=1, keepdim=True)
    scale = (amax / torch.full_like(amax, INT8_MAX)).clamp_(min=SMALLEST_SCALE)
    return (rows / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(INT8), scale


def dequantise(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, group: int = GROUP) -> torch.Tensor:
    """The weight [N, K] that the values [N, K] and scales ([N, 1], or one for all) stand for, in `dtype`."""
    rows = values.float() * scale.float()
    return (rotate(rows, group) if group else rows).to(dtype)
