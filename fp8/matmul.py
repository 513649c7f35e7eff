"""FP8 matmul: activations quantised with a dynamic scale, multiplied by the FP8 weight in `torch._scaled_mm`."""

import torch

from .activations import QuantisedTokens, quantise

ALIGNMENT = 16  # FP8 matrix units take K and N in multiples of this


def size_refusal(in_features: int, out_features: int) -> str | None:
    """Why a layer of this size cannot be multiplied in FP8, or None if it can."""
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % ALIGNMENT:
            return f"{name} is {size}, not a multiple of {ALIGNMENT}"
    return None


def scaled_linear(
    x: torch.Tensor | QuantisedTokens, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x · (weight·scale)ᵀ + bias on FP8 matrix units.

    x: [..., K], as a tensor or already quantised. weight: float8_e4m3fn [N, K], K and N multiples of 16. scale: float32
    scalar. bias: [N] or None. Returns [..., N] in x's dtype, rounded to BF16, the only output dtype of the row-scaled
    matmul.
    """
    if not isinstance(x, QuantisedTokens):
        x = quantise(x)
    shape = (*x.shape[:-1], len(weight))
    if x.values.numel() == 0:
        return x.values.new_empty(shape, dtype=x.dtype)
    scale = scale.reshape(1, 1)
    if x.scale.numel() > 1:  # with a scale per token torch wants one per output channel too, contiguous
        scale = scale.expand(1, len(weight)).contiguous()
    y = torch._scaled_mm(
        x.values,
        weight.t(),
        scale_a=x.scale,
        scale_b=scale,
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y.to(x.dtype).reshape(shape)
