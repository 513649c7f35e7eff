"""cuDNN's attention on GPUs where it is the fastest: on an H200 it takes 61 ms per layer at 41 760 tokens,
FlashAttention 2 101 ms (benchmarks/RESULTS.md)."""

from collections.abc import Callable

import torch

from ..core import attention_pytorch
from ..fp8.activations import add_keys_, backend

MIN_CAPABILITY = (9, 0)
# PyTorch's public function chooses a kernel by settings of the whole process, which threads (MultiGPU's) would change for
# each other, and does not return the logarithm of the sum of exponentials (LSE), which `add_keys_` needs.
cudnn_attention = torch.ops.aten._scaled_dot_product_cudnn_attention
TILE = 128  # keys; cuDNN's kernel takes 7 % longer where their number is not a multiple (H200, 45 240 keys)
SPLIT_KEYS = 8192  # from this many keys on, that is more than `add_keys_` takes for the rest


def cudnn_is_faster(device: torch.device) -> bool:
    """Whether cuDNN's attention is the fastest on this device: on Hopper and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def prefer_cudnn(
    function: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    *args,
    **kwargs,
) -> torch.Tensor:
    """An attention override for ComfyUI (`optimized_attention_override`): q [B, L, heads·d] and k, v [B, S, heads·d] to
    [B, L, heads·d].

    It replaces only PyTorch's own attention, so one that the user chose (sage, flash, xformers) stays.
    """
    plain = function is attention_pytorch.__wrapped__ and not args and kwargs.get("mask") is None
    if not plain or any(
        kwargs.get(option) for option in ("skip_reshape", "skip_output_reshape", "enable_gqa", "scale")
    ):
        return function(q, k, v, heads, *args, **kwargs)
    return _attend(q, k, v, heads)


@torch.library.custom_op("worldstereo_fp8::attend", mutates_args=())  # torch.compile cannot trace SDPAParams
def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    by_head = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    keys, rest = k.shape[1], k.shape[1] % TILE
    if not _cudnn_takes(*by_head):
        return torch.nn.functional.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)
    if rest and keys >= SPLIT_KEYS and backend(q.device)[0] == "triton":
        by_head[1:] = [t[:, :, :-rest] for t in by_head[1:]]
        out, lse = cudnn_attention(*by_head, None, True)[:2]
        out = out.transpose(1, 2).flatten(2)
        add_keys_(out, lse.view(len(q), heads, -1), q, k[:, -rest:], v[:, -rest:], heads)
        return out
    return cudnn_attention(*by_head, None, False)[0].transpose(1, 2).flatten(2)


def _cudnn_takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return q.is_cuda and torch.backends.cuda.can_use_cudnn_attention(params)


@_attend.register_fake
def _(q, k, v, heads):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def wants_whole_tensors(transformer_options: dict) -> bool:
    """Whether another attention override is set. It may need as many queries as keys, so queries must not be split."""
    return transformer_options.get("optimized_attention_override", prefer_cudnn) is not prefer_cudnn
