"""Activations: quantised token by token between FP8 matmuls, together with the element-wise operations before them; and
the element-wise operations around convolutions (`channels_last`).

Each function has three backends, taken in this order:

- triton: one kernel each (`kernels`); NVIDIA GPUs.
- kitchen: comfy-kitchen's CUDA kernels, which quantise with one scale for the whole tensor; for machines without
  Triton, such as Windows.
- eager: plain torch operations, the reference for the other two.

`backend` returns which one a device uses, and why not a better one.
"""

import functools
import os
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .recipe import FP8, FP8_MAX
from .rotation import rotate

try:
    from . import kernels
except ImportError as e:
    kernels = None  # type: ignore[assignment]
    KERNELS_MISSING = f"Triton cannot be imported ({e})"

try:
    import comfy_kitchen
except ImportError as e:
    comfy_kitchen, KITCHEN_MISSING = None, f"comfy-kitchen cannot be imported ({e})"

FP8_CAPABILITY = (8, 9)  # the first CUDA compute capability with FP8 matrix units
FORCE = "WORLDSTEREO_FP8_BACKEND"
forced = os.environ.get(FORCE)  # the name of the only backend to take, for benchmarks and tests


@dataclass(frozen=True)
class QuantisedTokens:
    """M tokens of K channels in FP8 or INT8, which stand for values · scale, rotated where `group` is not 0."""

    values: torch.Tensor  # float8_e4m3fn or int8 [M, K], contiguous
    scale: torch.Tensor  # float32: [M, 1], one per token, or [1, 1], one for all
    shape: tuple[int, ...]  # of the activations before quantisation, [..., K]
    dtype: torch.dtype  # of the activations before quantisation
    group: int = 0  # how many channels are rotated together, 0 for no rotation

    @property
    def device(self) -> torch.device:
        return self.values.device

    @classmethod
    def room(cls, x: torch.Tensor) -> "QuantisedTokens":
        """Uninitialised memory for x [..., K] in FP8 with a scale per token."""
        width = x.shape[-1]
        values = x.new_empty(x.numel() // width, width, dtype=FP8)
        return cls(values, x.new_empty(len(values), 1, dtype=torch.float32), tuple(x.shape), x.dtype)

    def dequantise(self) -> torch.Tensor:
        """The activations in their original shape and dtype."""
        rows = self.values.float() * self.scale
        return (rotate(rows, self.group) if self.group else rows).to(self.dtype).reshape(self.shape)

    def rows(self, start: int, stop: int) -> "QuantisedTokens":
        """Tokens start to stop (of M), as activations [stop − start, K]."""
        values = self.values[start:stop]
        scale = self.scale if len(self.scale) == 1 else self.scale[start:stop]
        if start % 4:
            scale = scale.clone()  # cuBLASLt reads scales 16 bytes at a time
        return QuantisedTokens(values, scale, tuple(values.shape), self.dtype, self.group)


def quantise(x: torch.Tensor, into: QuantisedTokens | None = None) -> QuantisedTokens:
    """Activations to FP8.

    x: [..., K], float32, bfloat16 or float16. The scale is amax/448 of each token, or of the whole tensor where the
    backend has only one scale; 1 where amax/448 is not a normal number (zeros). A NaN stays a NaN in the token's values
    or scale. into: tokens of x's size that are no longer needed; the backend may reuse their memory.

    This and the functions below raise ValueError where WORLDSTEREO_FP8_BACKEND names a backend that cannot run here.
    """
    return _implementation(x.device).quantise(x, into)


def gelu_quantise(x: torch.Tensor) -> QuantisedTokens:
    """`quantise` of GELU(x) in its tanh form. x: [..., K]."""
    return _implementation(x.device).gelu_quantise(x)


def layer_norm_modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over C without weights, times 1 + scale, plus shift.

    x: [B, L, C]; shift, scale: [B or 1, L or 1, C], of any float dtype. Returns x's shape and dtype.
    """
    return _implementation(x.device).layer_norm_modulate(x, shift, scale, eps)


def layer_norm_quantise(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> QuantisedTokens:
    """`quantise` of `layer_norm_modulate`; shapes as there."""
    return _implementation(x.device).layer_norm_quantise(x, shift, scale, eps)


def rms_rope(x: torch.Tensor, weight: torch.Tensor, freqs: torch.Tensor, heads: int, eps: float) -> torch.Tensor:
    """RMSNorm over all channels, then the rotary embedding of each head; x may be overwritten.

    x: [B, L, C], C = heads · d. weight: [C]. freqs: float32 [B or 1, L, 1, d/2, 2, 2], the rotations of neighbouring
    channel pairs as ComfyUI's EmbedND gives them. Returns x's shape and dtype.
    """
    return _implementation(x.device).rms_rope(x, weight, freqs, heads, eps)


def rms_silu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """SiLU(RMSNorm(x) · weight), the norm over C. x: [..., C]; weight: [C]. Returns x's shape and dtype."""
    return _implementation(x.device).rms_silu(x, weight, eps)


def add_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x + bias; x may be overwritten. x: [..., C]; bias: [C], of any float dtype. Returns x's shape and dtype."""
    return _implementation(x.device).add_bias(x, bias)


def gated_add_(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> None:
    """x += y · gate, in place. x, y: [B, L, C]; gate: [B, 1, C]."""
    _implementation(x.device).gated_add_(x, y, gate)


def add_keys_(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int
) -> None:
    """Adds more keys to a finished attention, in place: out becomes the attention over the keys it had and over k.

    out, q: [B, L, C], C = heads · d; q is scaled by 1/√d. lse: float32 [B, heads, L], contiguous, the logarithm of the
    sum over the keys so far of exp(scaled q · key). k, v: [B, K, C]; the triton backend is for K up to 128.
    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    _implementation(out.device).add_keys_(out, lse, q, k, v, heads)


class Eager:
    """Plain torch operations. The other backends have the same methods, which the functions above document."""

    @staticmethod
    def refusal(device: torch.device) -> str | None:
        return None

    @classmethod
    def quantise(cls, x, into=None):
        rows = x.reshape(-1, x.shape[-1]).float()
        scale = _scale(rows.abs().amax(dim=1, keepdim=True))
        return QuantisedTokens((rows * scale.reciprocal()).to(FP8), scale, tuple(x.shape), x.dtype)

    @classmethod
    def gelu_quantise(cls, x):
        return cls.quantise(F.gelu(x, approximate="tanh"))

    @classmethod
    def layer_norm_modulate(cls, x, shift, scale, eps):
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale).to(x.dtype)

    @classmethod
    def layer_norm_quantise(cls, x, shift, scale, eps):
        return cls.quantise(cls.layer_norm_modulate(x, shift, scale, eps))

    @classmethod
    def rms_rope(cls, x, weight, freqs, heads, eps):
        pairs = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).unflatten(-1, (heads, -1, 1, 2)).to(freqs.dtype)
        out = freqs[..., 0] * pairs[..., 0]
        out.addcmul_(freqs[..., 1], pairs[..., 1])
        return out.reshape(x.shape).to(x.dtype)

    @classmethod
    def rms_silu(cls, x, weight, eps):
        return F.silu(F.rms_norm(x, weight.shape, weight.to(x.dtype), eps), inplace=True)

    @classmethod
    def add_bias(cls, x, bias):
        return x.add_(bias)

    @classmethod
    def gated_add_(cls, x, y, gate):
        x.addcmul_(y, gate)

    @classmethod
    def add_keys_(cls, out, lse, q, k, v, heads):
        q, k, v, done = (x.unflatten(-1, (heads, -1)).transpose(1, 2).float() for x in (q, k, v, out))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        total = torch.logaddexp(lse, scores.logsumexp(-1))[..., None]
        done = done * (lse[..., None] - total).exp() + (scores - total).exp() @ v
        out.copy_(done.transpose(1, 2).flatten(2))


class Kitchen(Eager):
    @staticmethod
    def refusal(device: torch.device) -> str | None:
        if comfy_kitchen is None:
            return KITCHEN_MISSING
        if device.type != "cuda":
            return "comfy-kitchen's kernels need a CUDA device"
        cuda = comfy_kitchen.list_backends()["cuda"]
        return None if cuda["available"] else f"comfy-kitchen has no CUDA kernels here ({cuda['unavailable_reason']})"

    @classmethod
    def quantise(cls, x, into=None):
        if x.numel() == 0:  # which has no largest value
            return super().quantise(x)
        rows = x.reshape(-1, x.shape[-1])
        scale = _scale(torch.linalg.vector_norm(rows, float("inf"), dtype=torch.float32))
        return QuantisedTokens(
            comfy_kitchen.quantize_per_tensor_fp8(rows, scale), scale.reshape(1, 1), tuple(x.shape), x.dtype
        )

    @classmethod
    def layer_norm_modulate(cls, x, shift, scale, eps):
        if x.numel() == 0:  # no kernel is launched for nothing
            return super().layer_norm_modulate(x, shift, scale, eps)
        return comfy_kitchen.adaln(x.contiguous(), scale.to(x.dtype), shift.to(x.dtype), eps)

    @classmethod
    def rms_rope(cls, x, weight, freqs, heads, eps):
        if x.numel() == 0:
            return x
        x = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
        return comfy_kitchen.apply_rope1_(x.unflatten(-1, (heads, -1)), freqs).flatten(-2)


class Triton(Eager):
    @staticmethod
    def refusal(device: torch.device) -> str | None:
        if kernels is None:
            return KERNELS_MISSING
        if kernels.INTERPRETED:
            return None if device.type == "cpu" else "TRITON_INTERPRET is set, which is for the CPU"
        if device.type != "cuda" or torch.version.hip is not None:
            return "the Triton kernels need an NVIDIA GPU"
        row = torch.zeros(1, 1, 16, device=device)
        try:  # Triton compiles at the first call, which fails without a C compiler, among other reasons
            kernels.layer_norm_(row, row, row, 1e-6, torch.empty_like(row), None)
        except Exception as e:
            return f"Triton cannot compile or run a kernel ({type(e).__name__}: {e})"
        if torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:  # else nothing is quantised
            return row_scales_refusal(device)
        return None

    @classmethod
    def quantise(cls, x, into=None, gelu=False):
        out = into or QuantisedTokens.room(x)
        kernels.quantise_(_dense(x.reshape(-1, x.shape[-1])), out.values, out.scale, gelu)
        return out

    @classmethod
    def gelu_quantise(cls, x):
        return cls.quantise(x, gelu=True)

    @classmethod
    def layer_norm_modulate(cls, x, shift, scale, eps):
        if scale.dtype == x.dtype and Kitchen.refusal(x.device) is None:  # faster, but it rounds the scale to x's dtype
            return Kitchen.layer_norm_modulate(x, shift, scale, eps)
        out = x.new_empty(x.shape)
        shift, scale = (_dense(t).expand(x.shape) for t in (shift, scale))
        kernels.layer_norm_(_dense(x), shift, scale, eps, out, None)
        return out

    @classmethod
    def layer_norm_quantise(cls, x, shift, scale, eps):
        out = QuantisedTokens.room(x)
        shift, scale = (_dense(t).expand(x.shape) for t in (shift, scale))
        kernels.layer_norm_(_dense(x), shift, scale, eps, out.values, out.scale)
        return out

    @classmethod
    def rms_rope(cls, x, weight, freqs, heads, eps):
        x = _dense(x)
        kernels.rms_rope_(x, weight.contiguous(), freqs.contiguous().expand(len(x), *freqs.shape[1:]), heads, eps)
        return x

    @classmethod
    def rms_silu(cls, x, weight, eps):
        out = x.new_empty(x.shape)
        kernels.rms_silu_(_dense(x.reshape(-1, x.shape[-1])), weight.contiguous(), eps, out)
        return out

    @classmethod
    def add_bias(cls, x, bias):
        x = x.contiguous()
        kernels.add_bias_(x, bias.to(x.dtype).contiguous())  # each pair of dtypes would be another kernel to compile
        return x

    @classmethod
    def gated_add_(cls, x, y, gate):
        kernels.gated_add_(x, y.contiguous(), _dense(gate))

    @classmethod
    def add_keys_(cls, out, lse, q, k, v, heads):
        kernels.add_keys_(out, lse, _dense(q), _dense(k), _dense(v), heads)


@functools.cache
def row_scales_refusal(device: torch.device) -> str | None:
    """Why `torch._scaled_mm` does not take per-token scales on this device (some PyTorch builds for Windows), or
    None."""
    x, weight = (torch.zeros(rows, 64, dtype=FP8, device=device) for rows in (5, 48))
    x_scale, weight_scale = torch.ones(5, 1, device=device), torch.ones(1, 48, device=device)
    bias = torch.zeros(48, dtype=torch.bfloat16, device=device)
    try:
        torch._scaled_mm(
            x,
            weight.t(),
            scale_a=x_scale,
            scale_b=weight_scale,
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    except RuntimeError as e:
        return f"this PyTorch has no FP8 matmul with a scale for each token ({str(e).splitlines()[0]})"
    return None


def _scale(amax: torch.Tensor) -> torch.Tensor:
    scale = amax * (1 / FP8_MAX)
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last axis has stride 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


BACKENDS = {"triton": Triton, "kitchen": Kitchen, "eager": Eager}  # the best first


def backend(device: torch.device) -> tuple[str, str]:
    """The name of the backend for tensors on `device`, and why a better one is not used ("" for the best).

    Raises ValueError where the environment variable WORLDSTEREO_FP8_BACKEND names one that cannot run here.
    """
    return _choose(device, forced)


@functools.cache
def _choose(device: torch.device, forced: str | None) -> tuple[str, str]:  # type: ignore[return]  # torch never refuses
    if forced is not None:
        if forced not in BACKENDS:
            raise ValueError(f"{FORCE} is {forced!r}, expected one of {', '.join(BACKENDS)}. Correct or unset it.")
        refusal = BACKENDS[forced].refusal(device)
        if refusal is not None:
            raise ValueError(f"{FORCE} is {forced}, but {refusal}. Unset it, or name another of {', '.join(BACKENDS)}.")
        return forced, f"{FORCE} is set"
    reasons: list[str] = []
    for name, implementation in BACKENDS.items():
        refusal = implementation.refusal(device)
        if refusal is None:
            return name, "; ".join(reasons)
        reasons.append(refusal)


@torch.compiler.assume_constant_result
def _name(device: torch.device) -> str:
    return _choose(device, forced)[0]


def _implementation(device: torch.device) -> type[Eager]:
    return BACKENDS[_name(device)]
