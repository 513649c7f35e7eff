"""The FP8 Linear: upcast and native products, and when each is taken.

PyTorch has no row-scaled FP8 matmul on the CPU: the tests of that product itself need a GPU with FP8 units.
"""

import comfy.model_management
import pytest
import torch
from worldstereo_fp8.fp8.linear import operations
from worldstereo_fp8.fp8.matmul import quantise_tokens, scaled_linear, why_not_native
from worldstereo_fp8.fp8.recipe import FP8_MAX, quantise


def layer(in_features=64, out_features=48, bias=True, native=False, dtype=torch.bfloat16, quant=b'{"format": "float8_e4m3fn"}'):
    torch.manual_seed(0)
    weight, scale = quantise(torch.randn(out_features, in_features))
    linear = operations(dtype, native).Linear(in_features, out_features, bias=bias)
    state = {"weight": weight, "weight_scale": scale.float(), "comfy_quant": torch.tensor(list(quant), dtype=torch.uint8)}
    if bias:
        state["bias"] = torch.randn(out_features).to(dtype)
    linear.load_state_dict(state)
    return linear, weight, scale, state.get("bias")


SHAPES = [(5, 64), (2, 3, 64), (2, 1, 3, 64), (1, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_upcast_is_the_formula(dtype, shape, bias):
    linear, weight, scale, b = layer(bias=bias)
    x = torch.randn(shape, dtype=dtype)
    expected = torch.nn.functional.linear(x, weight.to(dtype) * scale.to(dtype), b.to(dtype) if bias else None)
    out = linear(x)
    assert out.dtype == dtype and out.shape == expected.shape
    assert torch.equal(out, expected)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_an_empty_batch(native, shape):
    linear, *_ = layer(native=native)
    assert linear(torch.empty(shape, dtype=torch.bfloat16)).shape == (*shape[:-1], 48)


def test_a_non_contiguous_input():
    linear, *_ = layer()
    x = torch.randn(64, 6, dtype=torch.bfloat16)
    assert torch.equal(linear(x.t()), linear(x.t().contiguous()))


@pytest.mark.parametrize("sizes, reason", [((7, 32), "in_features is 7"), ((32, 20), "out_features is 20")])
def test_odd_sizes_upcast(sizes, reason):
    assert reason in why_not_native(*sizes)
    linear, weight, scale, b = layer(*sizes, native=True)
    assert reason in linear.why_not_native()
    x = torch.randn(3, sizes[0])
    assert torch.allclose(linear(x), torch.nn.functional.linear(x, weight.float() * scale.float(), b.float()), atol=1e-5)


def test_which_layers_take_the_native_product():
    assert layer(native=True)[0].why_not_native() is None
    assert layer(native=False)[0].why_not_native() == "native FP8 matmul is off"
    full = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'
    assert layer(native=True, quant=full)[0].why_not_native() == "the file asks for full precision"
    plain = operations(torch.bfloat16, True).Linear(16, 16)
    plain.load_state_dict({"weight": torch.randn(16, 16), "bias": torch.randn(16)})
    assert plain.why_not_native() == "not an FP8 weight" and plain.weight.dtype == torch.float32


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3, 1e30])
def test_each_token_is_quantised_to_its_own_scale(magnitude):
    x = magnitude * torch.randn(7, 256, dtype=torch.float64).float()
    x[2] = 0
    x[:, ::97] *= 30
    x8, scale = quantise_tokens(x)
    assert x8.dtype == torch.float8_e4m3fn and scale.shape == (7, 1) and scale.dtype == torch.float32
    assert not x8[2].float().any() and scale[2] == 1
    rest = [0, 1, 3, 4, 5, 6]
    assert torch.allclose(scale[rest] * FP8_MAX, x[rest].abs().amax(1, keepdim=True))
    error = (x8.float() * scale - x).abs()
    # Half a step of 3 mantissa bits, or of the smallest subnormal, 2^-9.
    assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.001).all()


def seed_formula(x, weight, scale):
    """What a fixed activation scale of 1 gives: inputs clamped to ±448."""
    x8 = x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    return x8 @ (weight.float() * scale.float()).t()


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_native_is_no_less_accurate_than_a_fixed_scale(magnitude):
    """On the arithmetic of the native product: both factors in FP8, exact sums."""
    torch.manual_seed(1)
    exact = torch.randn(128, 512)
    weight, scale = quantise(exact)
    x = magnitude * torch.randn(64, 512)
    x[:, ::197] *= 30
    reference = x @ exact.t()
    x8, x_scale = quantise_tokens(x)
    ours = (x8.float() * x_scale) @ (weight.float() * scale.float()).t()

    def error(out):
        return (out - reference).norm() / reference.norm()

    assert error(ours) < 0.06
    assert error(ours) <= error(seed_formula(x, weight, scale)) * 1.02


def has_fp8_units() -> bool:
    return torch.cuda.is_available() and comfy.model_management.supports_fp8_compute(torch.device("cuda"))


@pytest.mark.skipif(not has_fp8_units(), reason="needs a CUDA GPU with FP8 units (compute capability 8.9)")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_native_product_on_a_gpu(shape, dtype):
    linear, weight, scale, b = layer(native=True)
    linear.to("cuda")
    x = torch.randn(shape, dtype=dtype)
    out = linear(x.cuda()).cpu()
    assert out.dtype == dtype and out.shape == (*shape[:-1], 48)
    x8, x_scale = quantise_tokens(x.reshape(-1, 64))
    expected = (x8.float() * x_scale) @ (weight.float() * scale.float()).t() + b.float()
    assert torch.allclose(out.float().reshape(-1, 48), expected, rtol=1e-2, atol=5e-2)
    upcast = layer(native=False)[0].to("cuda")(x.cuda()).cpu().float()
    assert (out.float() - upcast).norm() / upcast.norm() < 0.05


@pytest.mark.skipif(not has_fp8_units(), reason="needs a CUDA GPU with FP8 units (compute capability 8.9)")
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_native_accuracy_on_a_gpu(magnitude):
    torch.manual_seed(1)
    exact = torch.randn(1024, 2048)
    weight, scale = quantise(exact)
    x = (magnitude * torch.randn(256, 2048)).bfloat16()
    x[:, ::197] *= 30
    reference = x.float() @ exact.t()
    out = scaled_linear(x.cuda(), weight.cuda(), scale.float().cuda(), None).cpu().float()
    assert (out - reference).norm() / reference.norm() < 0.06
