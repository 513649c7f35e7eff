"""Native FP8 matmul: activations quantised token by token, multiplied by the FP8 weight in `torch._scaled_mm`."""

import torch

from .recipe import FP8, FP8_MAX

ALIGNMENT = 16  # FP8 matrix units take K and N in multiples of this


def why_not_native(in_features: int, out_features: int) -> str | None:
    """Why a layer of this size cannot be multiplied in FP8, or None if it can."""
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % ALIGNMENT:
            return f"{name} is {size}, not a multiple of {ALIGNMENT}"
    return None


def quantise_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations to FP8 with one scale a token (row).

    x: [M, K], any float dtype. Returns float8_e4m3fn [M, K] and float32 scales [M, 1] with x ≈ x8 · scale;
    scale = amax(|row|)/448, 1 for a row of zeros.
    """
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True) / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


def scaled_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x · (weight·scale)ᵀ + bias on FP8 matrix units.

    x: [..., K]. weight: float8_e4m3fn [N, K], K and N multiples of 16. scale: float32 scalar. bias: [N] or None.
    Returns [..., N] in x's dtype; the product is rounded to BF16, the only output of the row-scaled matmul.
    """
    x8, x_scale = quantise_tokens(x.reshape(-1, x.shape[-1]))
    y = torch._scaled_mm(
        x8, weight.t(), scale_a=x_scale, scale_b=scale.reshape(1, 1).expand(1, weight.shape[0]).contiguous(),
        bias=None if bias is None else bias.to(torch.bfloat16), out_dtype=torch.bfloat16, use_fast_accum=True)
    return y.to(x.dtype).unflatten(0, x.shape[:-1])
