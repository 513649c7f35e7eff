"""INT8 matmul: activations rotated and quantised with a dynamic scale for each token, multiplied by an INT8
weight.

The kernels are comfy-kitchen's. Its public `int8_linear` quantises and multiplies in one call, so three products of one
input would quantise it three times; this module calls the two kernels separately. They are not public, so each is
checked once against plain torch on a small example, and plain torch replaces one that fails.
"""

import functools
import logging
from collections.abc import Callable

import comfy_kitchen
import torch
from torch.nn import functional as F

from .activations import QuantisedTokens
from .int8 import INT8
from .rotation import GROUP

MIN_CAPABILITY = (7, 5)  # the first CUDA compute capability with INT8 matrix units
ROWS = 4096  # multiplied at once by plain torch, whose INT32 sums take twice the memory of the result


@functools.cache
def device_refusal(device: torch.device) -> str | None:
    """Why a device cannot multiply INT8 matrices with comfy-kitchen's kernels, or None if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "INT8 matmul needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has no INT8 matmul (compute capability 7.5 or higher: GeForce RTX 20 and newer)"
    cuda = comfy_kitchen.list_backends()["cuda"]
    if not cuda["available"]:
        return f"comfy-kitchen has no CUDA kernels here ({cuda['unavailable_reason']})"
    if cuda["disabled"]:
        return "ComfyUI has turned comfy-kitchen's CUDA kernels off: they need PyTorch with CUDA 13 or newer"
    return None


def quantise(x: torch.Tensor, group: int = GROUP, into: QuantisedTokens | None = None) -> QuantisedTokens:
    """Activations to INT8.

    x: [..., K], float32, bfloat16 or float16. Rotated in groups of `group` channels (0: not rotated); the scale is
    amax/127 of each token. into: tokens of x's size that are no longer needed; their memory is reused if they are INT8.
    """
    values, scale = _quantise_rows(x.reshape(-1, x.shape[-1]), group)
    if into is not None and into.values.dtype == INT8:
        values = into.values.copy_(values)
    return QuantisedTokens(values, scale, tuple(x.shape), x.dtype, group)


def gelu_quantise(x: torch.Tensor, group: int = GROUP) -> QuantisedTokens:
    """`quantise` of GELU(x) in its tanh form. x: [..., K]."""
    values, scale = _gelu_quantise(x.reshape(-1, x.shape[-1]), group)
    return QuantisedTokens(values, scale, tuple(x.shape), x.dtype, group)


def int8_linear(
    x: torch.Tensor | QuantisedTokens,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group: int = GROUP,
) -> torch.Tensor:
    """x · (weight·scale)ᵀ + bias on INT8 matrix units.

    x: [..., K], as a tensor or already quantised. weight: int8 [N, K], rotated in groups of `group` channels (0: not
    rotated). scale: float32, [N, 1] or one for all. bias: [N] or None. Returns [..., N] in x's dtype.
    """
    if isinstance(x, QuantisedTokens) and (x.values.dtype, x.group) != (INT8, group):
        x = x.dequantise()
    if not isinstance(x, QuantisedTokens):
        x = quantise(x, group)
    y = _multiply(x.values, x.scale, weight, scale.float().reshape(-1), bias, x.dtype)
    return y.reshape(*x.shape[:-1], len(weight))


def _quantise_rows(rows: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    if rows.numel() == 0:  # the kernels need at least one row
        return rows.to(INT8), rows.new_ones(len(rows), 1, dtype=torch.float32)
    if group:  # the name says weight, but it serves activations too: the rotation is its own inverse
        return torch.ops.comfy_kitchen.quantize_int8_convrot_weight(rows.contiguous(), group)
    return torch.ops.comfy_kitchen.quantize_int8_rowwise(rows.contiguous())


# Custom operators, so that torch.compile does not trace what is inside them.


@torch.library.custom_op("worldstereo_fp8::int8_gelu_quantise", mutates_args=())
def _gelu_quantise(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    if x.is_cuda and x.numel() and _folds_gelu(x.device, x.dtype, x.shape[1], group):
        return _kitchen().quantize_int8_rowwise_convrot64(x.contiguous(), group, input_act="gelu_tanh")
    return _quantise_rows(F.gelu(x, approximate="tanh"), group)


@_gelu_quantise.register_fake
def _(x, group):
    return torch.empty_like(x, dtype=INT8), x.new_empty(len(x), 1, dtype=torch.float32)


@torch.library.custom_op("worldstereo_fp8::int8_multiply", mutates_args=())
def _multiply(
    values: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """values [M, K] with scale [M, 1] times weight [N, K] with weight_scale [N or 1]; bias [N]. Returns dtype [M,
    N]."""
    if values.is_cuda and values.numel():
        weight_scale = weight_scale.expand(len(weight)).contiguous()
        kernel = product_kernel(values.device, dtype)[1]
        y = kernel(values.contiguous(), scale, weight.contiguous(), weight_scale, bias)
        if y is not None:
            return y
    return _multiply_in_torch(values, scale, weight, weight_scale, bias, dtype)


@_multiply.register_fake
def _(values, scale, weight, weight_scale, bias, dtype):
    return values.new_empty(len(values), len(weight), dtype=dtype)


def _multiply_in_torch(values, scale, weight, weight_scale, bias, dtype) -> torch.Tensor:
    out = values.new_empty(len(values), len(weight), dtype=dtype)
    for start in range(0, len(values), ROWS):
        rows = slice(start, start + ROWS)
        y = comfy_kitchen.mm_int8(values[rows], weight.t()).float().mul_(scale[rows]).mul_(weight_scale)
        out[rows] = y if bias is None else y.add_(bias.float())
    return out


# comfy-kitchen's own kernels


Kernel = Callable[..., torch.Tensor | None]  # of values, scale, weight, weight_scale, bias; None where it cannot run


def _kitchen():
    from comfy_kitchen.backends import cuda

    return cuda


def _cutlass(dtype: torch.dtype, bias_dtype: torch.dtype) -> Kernel:
    """The tensor cores of Ampere and newer; the epilogue applies scales and bias. comfy-kitchen 0.2.26 takes the bias
    as float32, 0.2.40 in the result's dtype."""
    cuda = _kitchen()

    def multiply(values, scale, weight, weight_scale, bias):
        out = values.new_empty(len(values), len(weight), dtype=dtype)
        bias = values.new_empty(0, dtype=dtype) if bias is None else bias.to(bias_dtype).contiguous()
        tensors = (values, weight, scale, weight_scale, bias, out)
        done = cuda._C.cutlass_int8_dequant(
            *map(cuda._wrap_for_dlpack, tensors),
            cuda.DTYPE_TO_CODE[dtype],
            torch.cuda.current_stream(values.device).cuda_stream,
        )
        return out if done else None

    return multiply


def _turing(dtype: torch.dtype) -> Kernel:
    cuda = _kitchen()

    def multiply(values, scale, weight, weight_scale, bias):
        return cuda._int8_linear_turing_quantized(values, weight, scale, weight_scale, bias, dtype)

    return multiply


def _never(*_) -> None:
    return None


@functools.cache
def product_kernel(device: torch.device, dtype: torch.dtype) -> tuple[str, Kernel]:
    """The name and the kernel of the fastest one that multiplies correctly on this device; else "torch"."""
    if torch.cuda.get_device_capability(device) >= (8, 0):
        kernels = [functools.partial(_cutlass, dtype, d) for d in dict.fromkeys((dtype, torch.float32))]
    else:
        kernels = [functools.partial(_turing, dtype)]
    generator = torch.Generator("cpu").manual_seed(0)
    values, weight = (torch.randint(-127, 128, (n, 256), generator=generator, dtype=INT8) for n in (48, 64))
    scale, weight_scale = (0.03 * (0.5 + torch.rand(n, generator=generator)) for n in (48, 64))  # sums fit FP16
    # The bias is a slice of a longer tensor, so that a kernel which takes it for a wider dtype stays inside it.
    bias = 100 * torch.randn(1024, generator=generator).to(dtype)
    arguments = (values, scale[:, None], weight, weight_scale, bias[:64])
    expected = _multiply_in_torch(*arguments, torch.float32)
    on_device = (values.to(device), scale[:, None].to(device), weight.to(device), weight_scale.to(device))
    for kernel in kernels:
        try:
            multiply = kernel()
            out = multiply(*on_device, bias.to(device)[:64])
            right = out is not None and torch.allclose(out.float().cpu(), expected, rtol=2e-2, atol=1)
        except Exception as e:  # this comfy-kitchen has no such name, or another signature
            logging.debug(f"INT8 kernel of comfy-kitchen: {type(e).__name__}: {e}")
            right = False
        if right:
            return "kitchen", multiply
    return "torch", _never


@functools.cache
def _folds_gelu(device: torch.device, dtype: torch.dtype, width: int, group: int) -> bool:
    """Whether comfy-kitchen's quantiser can apply GELU in the same kernel at this width."""
    x = torch.randn(4, width, generator=torch.Generator("cpu").manual_seed(0)).to(device, dtype)
    try:
        values, scale = _kitchen().quantize_int8_rowwise_convrot64(x, group, input_act="gelu_tanh")
    except Exception as e:
        logging.debug(f"GELU in comfy-kitchen's quantiser: {type(e).__name__}: {e}")
        return False
    expected = _quantise_rows(F.gelu(x.float(), approximate="tanh"), group)
    difference = values.float() * scale - expected[0].float() * expected[1]
    return bool((difference.abs() <= 2.5 * expected[1]).all())
