"""Convolutions with the channels last in memory, held to PyTorch's own."""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from worldstereo_fp8.fp8.channels_last import ChannelsLast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16  # PyTorch's convolutions in FP16 need a GPU


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """TF32 rounds the inputs of what is to be compared."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Seen(TorchFunctionMode):
    """Keeps which functions of PyTorch were called."""

    def __init__(self):
        self.functions = []

    def __torch_function__(self, function, types, arguments=(), named=None):
        self.functions.append(function)
        return function(*arguments, **(named or {}))


def rand(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def channels_are_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


def close(found, expected, dtype=torch.float32):
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found, expected, **tolerance)


LAYERS = [
    torch.nn.Conv2d(4, 6, 3, padding=1),
    torch.nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), groups=2, bias=False),
    torch.nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
    torch.nn.ConvTranspose2d(4, 6, 2, stride=2),
    torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers(layer, dtype):
    layer, x = layer.to(DEVICE, dtype), rand(2, 4, 9, 8, dtype=dtype)
    with torch.inference_mode():
        expected = layer(x)
        with ChannelsLast():
            found = layer(x)
            again = layer(x.contiguous(memory_format=torch.channels_last))
    assert channels_are_last(found) and found.dtype == dtype
    close(found, expected, dtype)
    close(again, expected, dtype)


@pytest.mark.parametrize("core", [False, True], ids=["conv3d", "core's way around cuDNN's bug"])
def test_a_convolution_of_one_frame_is_one_in_2d(core):
    if core and DEVICE.type != "cuda":
        pytest.skip("cuDNN needs a GPU: GPU machine")
    conv = torch.nn.Conv3d(4, 6, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 0), dilation=(1, 1, 2), groups=2).to(
        DEVICE
    )
    x = rand(2, 4, 1, 6, 7)
    weight, bias, settings = conv.weight, conv.bias[:, None, None, None], (conv.padding, conv.stride, conv.dilation, 2)

    def convolve():
        if not core:
            return conv(x)
        return (
            torch.cudnn_convolution(x, weight, *settings, benchmark=False, deterministic=False, allow_tf32=False) + bias
        )

    with torch.inference_mode():
        expected = convolve()
        with Seen() as seen, ChannelsLast():
            close(convolve(), expected)
    assert not {torch.conv3d, torch.cudnn_convolution} & set(seen.functions)


@pytest.mark.parametrize(
    "frames, kernel, padding", [(1, (1, 3, 3), (1, 1, 1)), (1, (3, 3, 3), (1, 1, 1)), (2, (1, 3, 3), (0, 1, 1))]
)
def test_other_convolutions_in_3d_stay_as_they_are(frames, kernel, padding):
    conv, x = torch.nn.Conv3d(4, 5, kernel, padding=padding).to(DEVICE), rand(2, 4, frames, 6, 7)
    expected = conv(x)
    with ChannelsLast():
        assert torch.equal(conv(x), expected)


def test_under_autocast():
    """The result has autocast's dtype, whatever those of the pictures, the weight and the bias are."""
    conv, x = torch.nn.Conv2d(4, 6, 3).to(DEVICE), rand(2, 4, 9, 8)
    with torch.inference_mode(), torch.autocast(DEVICE.type, HALF):
        expected = conv(x)
        with ChannelsLast():
            found = conv(x)
    assert found.dtype == expected.dtype == HALF
    close(found, expected, HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [8, 3, 1], ids=["whole words", "no whole words", "one channel"])
@pytest.mark.parametrize("pad", [(1, 1, 1, 1), (2, 0, 1, 3), (0, 0, 0, 0)])
def test_replicated_borders(pad, channels, dtype):
    x = rand(2, channels, 5, 4, dtype=dtype)
    larger = rand(3, channels, 6, 4, dtype=dtype)
    last = larger.contiguous(memory_format=torch.channels_last)
    odd = rand(1 + channels * 4, dtype=dtype)[1:].view(1, 2, 2, channels).movedim(-1, 1)  # does not begin with a word
    for given in (x, last, last[1:], last[1:, :, 1:], larger[1:, :, 1:], x[:, :, :1, :1], x[:0], odd):
        expected = F.pad(given, pad, mode="replicate")
        with ChannelsLast():
            found = F.pad(given, pad, mode="replicate")
        assert torch.equal(found, expected) and channels_are_last(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [8, 3])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_twice_the_size(mode, channels, dtype):
    x, layer = rand(2, channels, 5, 4, dtype=dtype), torch.nn.Upsample(scale_factor=(2.0, 2.0), mode=mode)
    for given in (x, x[:, :, :1, :1]):
        expected = layer(given)
        with ChannelsLast():
            found = layer(given)
        assert torch.equal(found, expected) and channels_are_last(found)


def test_a_wrong_setting_is_still_an_error():
    with ChannelsLast(), pytest.raises(ValueError, match="align_corners"):
        F.interpolate(rand(1, 2, 3, 4), scale_factor=2, mode="nearest", align_corners=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.pad(x, (1, 2, 3, 4)),
        lambda x: F.pad(x, (1, -1, 0, 0), mode="replicate"),
        lambda x: F.pad(x[0], (1, 1, 1, 1), mode="replicate"),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=3, mode="nearest"),
        lambda x: F.interpolate(x, (7, 5), mode="nearest-exact"),
        lambda x: F.interpolate(x[0], scale_factor=2, mode="nearest"),
        lambda x: F.conv3d(x[:, :, None], torch.ones(2, 8, 1, 3, 3, device=DEVICE), padding=0),
        lambda x: F.conv3d(x[:, :, None], torch.ones(2, 8, 1, 3, 3, device=DEVICE), None, 1, "same"),
        lambda x: F.conv2d(x[0], torch.ones(2, 8, 3, 3, device=DEVICE), torch.ones(2, device=DEVICE)),
    ],
)
def test_what_is_left_to_pytorch(function):
    x = rand(2, 8, 5, 4)
    expected = function(x)
    with ChannelsLast():
        assert torch.equal(function(x), expected)
