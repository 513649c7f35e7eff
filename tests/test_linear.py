"""The FP8 Linear: upcast and FP8 products, and when each is taken.

PyTorch has no row-scaled FP8 matmul on the CPU: the tests of that product itself need a GPU with FP8 units.
"""

import comfy.model_management
import pytest
import torch
from worldstereo_fp8.fp8 import activations
from worldstereo_fp8.fp8 import linear as linear_module
from worldstereo_fp8.fp8.activations import BACKENDS, QuantisedTokens, row_scales_refusal
from worldstereo_fp8.fp8.activations import quantise as quantise_tokens
from worldstereo_fp8.fp8.arithmetic import FP8_MATMUL, UPCAST
from worldstereo_fp8.fp8.linear import matmul_refusal, operations
from worldstereo_fp8.fp8.matmul import scaled_linear, size_refusal
from worldstereo_fp8.fp8.recipe import FP8, FP8_MAX, quantise_weight

CPU = torch.device("cpu")
FULL_PRECISION = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'


def refusal(fp8: bool):
    return lambda dtype, device: None if fp8 else "FP8 matmul is off"


def layer(
    in_features=64, out_features=48, bias=True, fp8=False, dtype=torch.bfloat16, quant=b'{"format": "float8_e4m3fn"}'
):
    torch.manual_seed(0)
    weight, scale = quantise_weight(torch.randn(out_features, in_features))
    linear = operations(dtype, refusal(fp8)).Linear(in_features, out_features, bias=bias)
    state = {
        "weight": weight,
        "weight_scale": scale.float(),
        "comfy_quant": torch.tensor(list(quant), dtype=torch.uint8),
    }
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


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_an_empty_batch(fp8, shape):
    linear, *_ = layer(fp8=fp8)
    assert linear(torch.empty(shape, dtype=torch.bfloat16)).shape == (*shape[:-1], 48)


def test_a_non_contiguous_input():
    linear, *_ = layer()
    x = torch.randn(64, 6, dtype=torch.bfloat16)
    assert torch.equal(linear(x.t()), linear(x.t().contiguous()))


@pytest.mark.parametrize("sizes, reason", [((7, 32), "in_features is 7"), ((32, 20), "out_features is 20")])
def test_odd_sizes_upcast(sizes, reason):
    assert reason in size_refusal(*sizes)
    linear, weight, scale, b = layer(*sizes, fp8=True)
    assert reason in linear.upcast_reason(CPU)
    x = torch.randn(3, sizes[0])
    expected = torch.nn.functional.linear(x, weight.float() * scale.float(), b.float())
    torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-5)


def test_which_layers_take_the_fp8_product():
    assert layer(fp8=True)[0].upcast_reason(CPU) is None
    assert layer(fp8=False)[0].upcast_reason(CPU) == "FP8 matmul is off"
    assert layer(fp8=True, quant=FULL_PRECISION)[0].upcast_reason(CPU) == "the file asks for full precision"
    plain = operations(torch.bfloat16, refusal(True)).Linear(16, 16)
    plain.load_state_dict({"weight": torch.randn(16, 16), "bias": torch.randn(16)})
    assert plain.upcast_reason(CPU) == "not a quantised weight" and plain.weight.dtype == torch.float32


def seed_formula(x, weight, scale):
    """What a fixed activation scale of 1 gives: inputs clamped to ±448."""
    x8 = x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    return x8 @ (weight.float() * scale.float()).t()


def test_fp8_is_refused_without_a_product_for_it(monkeypatch):
    """A device with FP8 units whose PyTorch takes no scale a token, and no backend with one scale for the tensor."""
    cpu = torch.device("cpu")
    matmul_refusal.cache_clear()
    assert "no FP8 matmul with a scale for each token" in row_scales_refusal(cpu)  # so it is with PyTorch's CPU
    monkeypatch.setattr(linear_module, "supports_fp8_compute", lambda device: True)
    monkeypatch.setattr(activations, "forced", "eager")
    assert matmul_refusal("auto", FP8, cpu) == row_scales_refusal(cpu)
    assert matmul_refusal("bf16", FP8, cpu) == "compute is bf16"
    with pytest.raises(
        ValueError, match="compute is fp8, but this PyTorch has no FP8 matmul with a scale for each token"
    ):
        matmul_refusal("fp8", FP8, cpu)
    matmul_refusal.cache_clear()


def test_a_compute_dtype_that_was_chosen_for_the_model_wins():
    linear, *_ = layer(fp8=True)
    linear.comfy_force_cast_weights = True  # core's Model Compute Dtype
    assert "compute dtype" in linear.upcast_reason(CPU)


@pytest.mark.parametrize("fp8", [False, True])
def test_what_stands_in_for_forward_is_called(fp8):
    """Core's bypass LoRAs replace `forward` and call the original one, and leave that in its place when they go."""
    linear, weight, scale, b = layer(fp8=fp8)
    x = torch.randn(3, 64)
    expected = torch.nn.functional.linear(x, weight.float() * scale.float(), b.float())
    original = linear.forward
    linear.forward = lambda x: 1 + torch.nn.functional.linear(x, weight.float() * scale.float(), b.float())
    assert linear.arithmetic(CPU) is UPCAST
    with linear.fetched(CPU, torch.float32) as product:
        torch.testing.assert_close(product(x), 1 + expected, atol=1e-5, rtol=1e-5)
    linear.forward = original
    assert (linear.arithmetic(CPU) is FP8_MATMUL) == fp8
    hook = linear.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert linear.arithmetic(CPU) is UPCAST
    if not fp8:
        with linear.fetched(CPU, torch.float32) as product:
            assert not product(x).any()
    hook.remove()


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_fp8_is_no_less_accurate_than_a_fixed_scale(magnitude):
    """On the arithmetic of the FP8 product: both factors in FP8, exact sums."""
    torch.manual_seed(1)
    exact = torch.randn(128, 512)
    weight, scale = quantise_weight(exact)
    x = magnitude * torch.randn(64, 512)
    x[:, ::197] *= 30
    reference = x @ exact.t()
    ours = quantise_tokens(x).dequantise() @ (weight.float() * scale.float()).t()

    def error(out):
        return (out - reference).norm() / reference.norm()

    assert error(ours) < 0.06
    assert error(ours) <= error(seed_formula(x, weight, scale)) * 1.02


def test_one_scale_for_the_tensor():
    """What the kitchen backend makes of activations; PyTorch has this product on the CPU too."""
    x = torch.randn(2, 3, 64)
    scale = x.abs().max().reshape(1, 1) / FP8_MAX
    x8 = QuantisedTokens((x.reshape(6, 64) / scale).to(torch.float8_e4m3fn), scale, (2, 3, 64), torch.float32)
    _, weight, weight_scale, bias = layer()
    out = scaled_linear(x8, weight, weight_scale.float(), bias)
    expected = torch.nn.functional.linear(x8.dequantise(), weight.float() * weight_scale.float(), bias.float())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=2**-8, atol=1e-3)


def has_fp8_units() -> bool:
    return torch.cuda.is_available() and comfy.model_management.supports_fp8_compute(torch.device("cuda"))


def test_the_fp8_product_is_compiled_whole():
    """Tensors without values: on the CPU the product can be traced, but not computed."""
    x = torch.empty(256, 64, device="meta", dtype=torch.bfloat16)
    weight, scale = torch.empty(48, 64, device="meta", dtype=FP8), torch.ones((), device="meta")

    def product(x):
        return scaled_linear(quantise_tokens(x).rows(128, 256), weight, scale, None)

    torch._dynamo.reset()
    assert torch.compile(product, backend="eager", fullgraph=True)(x).shape == (128, 48)


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8_units(), reason="needs a CUDA GPU with FP8 units (compute capability 8.9)")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_fp8_product_on_a_gpu(shape, dtype):
    linear, weight, scale, b = layer(fp8=True)
    linear.to("cuda")
    x = torch.randn(shape, dtype=dtype)
    out = linear(x.cuda()).cpu()
    assert out.dtype == dtype and out.shape == (*shape[:-1], 48)
    x8 = quantise_tokens(x.cuda())
    expected = (x8.values.float() * x8.scale).cpu() @ (weight.float() * scale.float()).t() + b.float()
    torch.testing.assert_close(out.float().reshape(-1, 48), expected, rtol=1e-2, atol=5e-2)
    upcast = layer(fp8=False)[0].to("cuda")(x.cuda()).cpu().float()
    assert (out.float() - upcast).norm() / upcast.norm() < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8_units(), reason="needs a CUDA GPU with FP8 units (compute capability 8.9)")
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_accuracy_on_a_gpu(monkeypatch, backend, magnitude):
    if BACKENDS[backend].refusal(torch.device("cuda")) is not None:
        pytest.skip(BACKENDS[backend].refusal(torch.device("cuda")))
    monkeypatch.setattr(activations, "forced", backend)
    torch.manual_seed(1)
    exact = torch.randn(1024, 2048)
    weight, scale = (t.cuda() for t in quantise_weight(exact))
    x = (magnitude * torch.randn(256, 2048)).bfloat16()
    x[:, ::197] *= 30
    reference = x.float() @ exact.t()
    x = x.cuda()
    out = scaled_linear(x, weight, scale.float(), None)
    assert (out.cpu().float() - reference).norm() / reference.norm() < 0.06
    assert torch.equal(scaled_linear(quantise_tokens(x), weight, scale.float(), None), out)
    assert torch.equal(
        scaled_linear(quantise_tokens(x.reshape(4, 64, 2048)), weight, scale.float(), None), out.reshape(4, 64, 1024)
    )
    # A part of the tokens, its scales anywhere in memory.
    part = scaled_linear(quantise_tokens(x).rows(3, 101), weight, scale.float(), None).float()
    assert (part - out[3:101].float()).norm() / out[
        3:101
    ].float().norm() < 2**-8  # BF16's, and another order of summation
