"""The scaled-FP8 format: which tensors become FP8, and how their values and scales are found.

A weight is stored as float8_e4m3fn values and one BF16 scalar; weight = values · scale. Two recipes write that format:
`published`, which the published WorldStereo files were made with, and `default`, which loses less accuracy. A third,
`int8`, writes the format of `int8.py`.
"""

import math
from collections.abc import Iterable

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest value of float8_e4m3fn

MARKER = "scaled_fp8"  # the name of the tensor that marks a scaled-FP8 file
SCALE_SUFFIX = "scale_weight"  # `layer.weight` has its scale at `layer.scale_weight`

# What follows the layer's name in the files of this and other tools: a weight's scale, a static scale for the
# activations, and ComfyUI's description of the format.
SCALE_SUFFIXES = (f"weight.{SCALE_SUFFIX}", SCALE_SUFFIX, "weight_scale")
INPUT_SCALE_SUFFIXES = ("scale_input", "input_scale")
COMFY_QUANT = "comfy_quant"
SIDE_SUFFIXES = (*SCALE_SUFFIXES, MARKER, *INPUT_SCALE_SUFFIXES, COMFY_QUANT)

# A tensor with any of these words in its name stays BF16. The words are matched against diffusers names; on native Wan
# names they would hit other tensors.
EXCLUDED = (
    "norm",
    "bias",
    "time_in",
    "time_",
    "patch_embedding",
    "img_emb",
    "modulation",
    "text_embedding",
    "adapter",
    "add",
    "ref_conv",
    "audio_proj",
)

RECIPES = ("default", "published", "int8")
CONVS = {
    "default": "bf16",
    "published": "fp8",
    "int8": "bf16",
}  # what each recipe does with convolution weights by default


def is_quantised(name: str, shape: tuple[int, ...], convs: str = "fp8") -> bool:
    """Whether the recipe quantises the tensor of this diffusers name and shape to FP8.

    Args:
        convs: "fp8" takes weights of any rank ≥ 2, "bf16" leaves those of rank > 2 as they are.
    """
    if not name.endswith(".weight") or any(word in name for word in EXCLUDED):
        return False
    return len(shape) == 2 or (len(shape) > 2 and convs == "fp8")


def is_side_tensor(name: str) -> bool:
    """Whether the tensor of this name is not a weight but says how another one is quantised."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in SIDE_SUFFIXES)


def scale_name(weight_name: str) -> str:
    """`layer.weight` → `layer.scale_weight`."""
    return weight_name.removesuffix("weight") + SCALE_SUFFIX


def quantise_weight(weight: torch.Tensor, recipe: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in the scaled-FP8 format.

    Args:
        weight: floating-point tensor of any shape, with finite values.
        recipe: "published" or "default"; see `find_scale`.

    Returns:
        The values, float8_e4m3fn of the weight's shape, and the scale, a BF16 scalar.
    """
    values = weight.float()
    divisor, scale = find_scale(values.abs().max(), [(values, 1)], recipe)
    return encode(values, divisor), scale


def encode(values: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Floating-point values of any shape, divided by an FP32 scalar and rounded to the nearest float8_e4m3fn.

    The divisor stays a tensor on the values' device: CUDA divides by a Python number by multiplying with its
    reciprocal, which gives other bytes than the CPU.
    """
    return values.to(torch.float32, copy=True).div_(divisor).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def dequantise(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that FP8 values (of any shape) and their scale (a scalar) stand for, multiplied in FP32, in
    `dtype`."""
    return (values.float() * scale.float()).to(dtype)


def find_scale(
    amax: torch.Tensor, samples: Iterable[tuple[torch.Tensor, torch.Tensor | int]], recipe: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The number to divide a weight by, and the scale to store.

    `published` divides by amax / 448 in FP32 and stores that number rounded to BF16, so every value of the layer is
    restored up to 0.4 % too large or too small.

    `default` divides by the same BF16 number that it stores, amax / 448 rounded up, so nothing clips. Its coarser grid
    can still be worse than `published` by chance, or where the values lie on the grid of amax / 448 itself (a constant
    weight). Where its maximum or RMS error would be larger, it takes the scale that `published` stores: dividing by it
    gives each value the nearest multiple that the file can hold, which `published` cannot improve on in any element.
    The largest value is then at most 449.75 before rounding, and 448 is the nearest FP8 number to that.

    Args:
        amax: the weight's largest magnitude, FP32 scalar.
        samples: pairs of FP32 values and how often each occurs, together the whole weight; `default` may read them
        once.
        recipe: "published" or "default".

    Returns:
        The divisor, FP32 scalar, and the scale, BF16 scalar, on amax's device. Both are 1 for an all-zero weight.
    """
    if amax == 0:
        return torch.ones_like(amax), torch.ones_like(amax, dtype=torch.bfloat16)
    exact = amax / torch.full_like(amax, FP8_MAX)
    nearest = exact.to(torch.bfloat16)
    if recipe == "published":
        return exact, nearest
    if nearest.float() >= exact:
        return nearest.float(), nearest
    upper = torch.nextafter(nearest, torch.full_like(nearest, math.inf))
    candidates = ((upper.float(), upper), (exact, nearest))
    worst, total = [0.0, 0.0], [0, 0]
    for values, counts in samples:
        for i, (divisor, scale) in enumerate(candidates):
            error = (values.double() - encode(values, divisor).double() * scale.double()).abs_() / upper.double()
            worst[i] = max(worst[i], error.max().item())
            total[i] += _exact_sum(error * error, counts)
    scale = nearest if worst[0] > worst[1] or total[0] > total[1] else upper
    return scale.float(), scale


def _exact_sum(squares: torch.Tensor, counts: torch.Tensor | int) -> int:
    """The weighted sum of FP64 numbers below 2^9, as an integer in units of 2^-52. A floating-point sum depends on the
    order of summation, so the choice of scale, and the file's bytes, would depend on the machine."""
    squares = squares * 2**26
    whole = squares.floor()
    rest = ((squares - whole) * 2**26).long()
    return int((whole.long() * counts).sum()) * 2**26 + int((rest * counts).sum())
