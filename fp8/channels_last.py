"""Convolutions of pictures with the channels last in memory, which is how cuDNN computes them. ComfyUI's networks have the
channels first. On an H200 that costs a fifth of MoGe's time and a third of the VAE's, for converting, padding, enlarging
and adding biases."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .activations import add_bias

WORD = torch.int64  # numbers of a smaller dtype are copied several together, as one of these


class ChannelsLast(TorchFunctionMode):
    """While it is entered, these are computed with the channels last in memory. Results differ by rounding only.

    - 2-D convolutions, transposed ones too, and 3-D convolutions of one frame, which become 2-D;
    - replicated borders, and enlarging to twice the size by repeating pixels.

    For inference: gradients are lost. For networks that do not `view` a convolution's result, which is not contiguous.
    """

    def __torch_function__(self, function, types, arguments=(), named=None):
        ours, named = OURS.get(function), named or {}
        found = ours(*arguments, **named) if ours else None
        return function(*arguments, **named) if found is None else found


# Each takes the arguments of PyTorch's function as PyTorch's layers give them, and returns None for what it leaves to
# PyTorch.


def _conv2d(x, weight, bias=None, *settings, function=F.conv2d, **named):
    if x.ndim != 4:
        return None
    out = function(x.contiguous(memory_format=torch.channels_last), weight, None, *settings, **named)
    return out if bias is None else add_bias(out.movedim(1, -1), bias).movedim(-1, 1)


def _conv_transpose2d(*arguments, **named):
    return _conv2d(*arguments, function=F.conv_transpose2d, **named)


def _conv3d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    settings = stride, padding, dilation
    if not all(isinstance(setting, tuple) for setting in settings):  # as `torch.nn.Conv3d` gives them
        return None
    if not (x.ndim == 5 and x.shape[2] == weight.shape[2] == 1 and padding[0] == 0):
        return None
    x, weight = x.squeeze(2), weight.squeeze(2)
    return _conv2d(x, weight, bias, *(setting[1:] for setting in settings), groups).unsqueeze(2)


def _cudnn_convolution(x, weight, padding, stride, dilation, groups, **_):
    """ComfyUI calls cuDNN itself where a version of it has a bug, and adds the bias afterwards."""
    return _conv3d(x, weight, None, stride, padding, dilation, groups)


def _pad(x, pad, mode="constant", value=None):
    if not (mode == "replicate" and x.ndim == 4 and len(pad) == 4 and min(pad) >= 0):
        return None
    left, right, top, bottom = pad
    x, dtype = _words(x), x.dtype
    count, height, width, channels = x.shape
    out = x.new_empty(count, top + height + bottom, left + width + right, channels)
    rows = out[:, top : top + height]
    rows[:, :, left : left + width] = x
    rows[:, :, :left], rows[:, :, left + width :] = x[:, :, :1], x[:, :, -1:]
    out[:, :top], out[:, top + height :] = rows[:, :1], rows[:, -1:]
    return out.view(dtype).movedim(-1, 1)


def _interpolate(x, size=None, scale_factor=None, mode="nearest", *others, **named):
    if any(others) or any(named.values()) or size is not None or x.ndim != 4:
        return None
    if mode not in ("nearest", "nearest-exact") or scale_factor not in (2, (2, 2), [2, 2]):
        return None
    x, dtype = _words(x), x.dtype
    count, height, width, channels = x.shape
    out = x[:, :, None, :, None].expand(count, height, 2, width, 2, channels).contiguous()
    return out.view(count, 2 * height, 2 * width, channels).view(dtype).movedim(-1, 1)


def _words(x):
    """x [N, C, H, W] as [N, H, W, C], with as many channels in one number as WORD holds: PyTorch copies numbers one by
    one."""
    x = x.movedim(1, -1).contiguous()
    channels, left = divmod(x.shape[-1] * x.element_size(), WORD.itemsize)
    if left or x.storage_offset() * x.element_size() % WORD.itemsize:
        return x
    return x.flatten().view(WORD).view(*x.shape[:-1], channels)


OURS: dict[Callable, Callable[..., torch.Tensor | None]] = {
    torch.conv2d: _conv2d,
    torch.conv_transpose2d: _conv_transpose2d,
    torch.conv3d: _conv3d,
    torch.cudnn_convolution: _cudnn_convolution,
    F.pad: _pad,
    F.interpolate: _interpolate,
}
