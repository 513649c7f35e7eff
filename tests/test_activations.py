"""Activations between FP8 matmuls: every backend that this machine has, held to the formula in float64.

Where there is no GPU the Triton kernels run in Triton's interpreter: this file once more, in a process of its own.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import comfy.ldm.flux.math
import pytest
import torch
from torch.nn import functional as F
from worldstereo_fp8.fp8 import activations
from worldstereo_fp8.fp8.activations import (
    BACKENDS,
    QuantisedTokens,
    add_bias,
    add_keys_,
    backend,
    gated_add_,
    gelu_quantise,
    layer_norm_modulate,
    layer_norm_quantise,
    quantise,
    rms_rope,
    rms_silu,
)
from worldstereo_fp8.fp8.recipe import FP8_MAX

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = [name for name, implementation in BACKENDS.items() if implementation.refusal(DEVICE) is None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAGNITUDES = [1e-3, 1.0, 1e3]
EPS = 1e-6
WIDTH = 21 if INTERPRETED else 333  # the interpreter adds up a LayerNorm's row number by number

if INTERPRETED:
    # Triton 3.6's interpreter loses the carry of a value that is rounded up to a power of two, and makes NaN a number.
    import triton.language as tl
    import triton.runtime.interpreter

    convert = triton.runtime.interpreter._convert_float
    by_torch = {tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8), tl.bfloat16: (torch.bfloat16, torch.uint16)}

    def convert_by_torch(values, source, target, rounding_mode):
        if source != tl.float32 or target not in by_torch:
            return convert(values, source, target, rounding_mode)
        dtype, bits = by_torch[target]
        return torch.from_numpy(values.copy()).to(dtype).view(bits).numpy()

    triton.runtime.interpreter._convert_float = convert_by_torch


def combined(*values):
    """All combinations of three parameters' values; in the slow interpreter a part that has every pair of two of them."""
    numbered = itertools.product(*map(enumerate, values))
    return [[value for _, value in case] for case in numbered if not (INTERPRETED and sum(i for i, _ in case) % 3)]


@pytest.fixture(params=HERE, autouse=True)
def name(request, monkeypatch):
    monkeypatch.setattr(activations, "forced", request.param)
    return request.param


def tokens(*shape, dtype=torch.float32, magnitude=1.0):
    """Activations with outlier channels, ×30 on every 197th, and one token of zeros."""
    x = magnitude * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., ::197] *= 30
    x[..., 1, :] = 0
    return x.clamp(-6e4, 6e4).to(device=DEVICE, dtype=dtype) if dtype == torch.float16 else x.to(DEVICE, dtype)


def assert_quantised(q: QuantisedTokens, exact: torch.Tensor, error: torch.Tensor | float = 0.0):
    """q is `exact` (float64) to half a step of 3 mantissa bits or of the smallest subnormal, 2^-9, plus `error`."""
    exact, error = exact.reshape(q.values.shape), torch.as_tensor(error, device=DEVICE).expand(exact.shape)
    error = error.reshape(q.values.shape)
    assert q.values.dtype == torch.float8_e4m3fn and q.scale.dtype == torch.float32
    amax = exact.abs().amax(dim=1, keepdim=True) if q.scale.shape == (len(exact), 1) else exact.abs().max()
    scale = q.scale.double()
    assert ((scale * FP8_MAX - amax).abs() <= error.max() + 1e-6 * amax)[amax.expand_as(scale) > 0].all()
    assert (scale[amax.expand_as(scale) == 0] == 1).all()
    step = torch.maximum(exact.abs() / 16, scale * 2**-10)
    assert ((q.values.double() * scale - exact).abs() <= 1.001 * step + error).all()


@pytest.mark.parametrize(
    "shape, dtype, magnitude", combined([(7, 256), (2, 3, 333), (2, 2, 2, 16), (3, 5120)], DTYPES, MAGNITUDES)
)
def test_quantise(shape, dtype, magnitude):
    x = tokens(*shape, dtype=dtype, magnitude=magnitude)
    q = quantise(x)
    assert_quantised(q, x.double())
    out = q.dequantise()
    assert out.shape == x.shape and out.dtype == dtype
    assert torch.equal(out.reshape(q.values.shape), (q.values.float() * q.scale).to(dtype))


@pytest.mark.parametrize("magnitude", [1e30, 1e-30, 1e-42])
def test_quantise_at_the_ends_of_float32(magnitude):
    """Where amax/448 is subnormal the values are zero."""
    x = tokens(4, 64, magnitude=magnitude)
    q = quantise(x)
    assert torch.isfinite(q.scale).all()
    assert_quantised(q, x.double() if magnitude > 1e-38 else torch.zeros_like(x).double(), error=1e-40)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    x = tokens(4, 64)
    x[2, 5] = bad
    for q in (quantise(x), gelu_quantise(x), layer_norm_quantise(x[None], x[None, :1], x[None, :1], EPS)):
        assert not torch.isfinite(q.dequantise().reshape(q.values.shape)[2]).all()


def test_the_kernel_gives_the_bytes_of_the_reference(name):
    if name == "kitchen":
        pytest.skip("has one scale for the tensor")
    x = tokens(9, 1000, dtype=torch.bfloat16)
    reference = BACKENDS["eager"].quantise(x)
    q = quantise(x)
    assert torch.equal(q.scale, reference.scale)
    assert torch.equal(q.values.view(torch.uint8), reference.values.view(torch.uint8))


def test_gelu_quantise(dtype=torch.bfloat16):
    x = tokens(2, 5, 333, dtype=dtype)
    exact = F.gelu(x.double(), approximate="tanh")
    assert_quantised(gelu_quantise(x), exact, error=rounding(dtype) * exact.abs())


def rounding(dtype: torch.dtype, steps: int = 1) -> float:
    """The relative error of rounding to `dtype`; the kernels round once, at the end."""
    return steps * torch.finfo(dtype).eps / 2 + 1e-6


def modulation(*shape, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2)]


@pytest.mark.parametrize(
    "size, dtypes, magnitude",
    combined(
        [(1, 1), (2, 1), (2, 6), (1, 6)],
        [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32)],
        MAGNITUDES,
    ),
)
def test_layer_norm(name, size, dtypes, magnitude):
    (batch, rows), (dtype, scale_dtype) = size, dtypes
    x = tokens(2, 6, WIDTH, dtype=dtype, magnitude=magnitude)
    shift, scale = modulation(batch, rows, WIDTH, dtype=dtype)
    scale = scale.to(scale_dtype)
    normal = F.layer_norm(x.double(), (WIDTH,), eps=EPS)
    exact = shift.double() + normal * (1 + scale.double())
    out = layer_norm_modulate(x, shift, scale, EPS)
    assert out.shape == x.shape and out.dtype == dtype
    # The kernels round once; eager rounds the norm and 1 + scale as well.
    size = (normal * (1 + scale.double())).abs() + normal.abs()
    between = 1e-6 * size if name != "eager" else rounding(dtype, 2) * size
    assert ((out.double() - exact).abs() <= between + rounding(dtype) * exact.abs() + 1e-5).all()

    q = layer_norm_quantise(x, shift, scale, EPS)
    assert q.shape == x.shape and q.dtype == dtype
    assert_quantised(q, exact, error=1e-5 if name == "triton" else between + rounding(dtype) * exact.abs() + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, heads, head_dim", [(1, 3, 12), (2, 4, 64), (2, 5, 128)])
def test_rms_rope(name, dtype, batch, heads, head_dim):
    x = tokens(batch, 6, heads * head_dim, dtype=dtype)
    weight = 1 + modulation(heads * head_dim, dtype=dtype)[0] / 8
    positions = torch.arange(batch * 6, dtype=torch.float32, device=DEVICE).reshape(batch, 6)
    for freqs in (
        comfy.ldm.flux.math.rope(positions, head_dim, 10000)[:, :, None],
        comfy.ldm.flux.math.rope(positions[:1], head_dim, 10000)[:, :, None],
    ):
        normal = F.rms_norm(x.double(), weight.shape, weight.double(), EPS)
        pairs = normal.unflatten(-1, (heads, -1, 1, 2))
        exact = (freqs.double() * pairs).sum(-1).reshape(x.shape)
        out = rms_rope(x.clone(), weight, freqs, heads, EPS)
        assert out.shape == x.shape and out.dtype == dtype
        size = (freqs.double().abs() * pairs.abs()).sum(-1).reshape(x.shape)
        between = 1e-6 * size if name == "triton" else rounding(dtype, 2) * size  # the norm, rounded
        assert ((out.double() - exact).abs() <= between + rounding(dtype) * exact.abs() + 1e-6).all()


@pytest.mark.parametrize(
    "shape, dtype, magnitude", combined([(7, 96), (2, 3, 5, 21), (3, 384), (300, 16)], DTYPES, MAGNITUDES)
)
def test_rms_silu(name, shape, dtype, magnitude):
    x, weight = tokens(*shape, dtype=dtype, magnitude=magnitude), modulation(shape[-1], dtype=dtype)[0]
    normal = F.rms_norm(x.double(), weight.shape, weight.double(), EPS)
    out = rms_silu(x, weight, EPS)
    assert out.shape == x.shape and out.dtype == dtype
    between = 1e-6 if name == "triton" else 1.1 * rounding(dtype, 2)  # eager rounds the norm; SiLU's slope is up to 1.1
    assert ((out.double() - F.silu(normal)).abs() <= (between + rounding(dtype)) * normal.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype, bias_dtype", [(dtype, dtype) for dtype in DTYPES] + [(torch.float16, torch.float32)])
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 5, 21), (300, 21)])  # the last takes two programs
def test_add_bias(shape, dtype, bias_dtype):
    x, bias = tokens(*shape, dtype=dtype), modulation(shape[-1], dtype=bias_dtype)[0]
    exact = x.double() + bias.double()
    size = x.double().abs() + bias.double().abs()
    view = x.transpose(0, 1).clone().transpose(0, 1)
    for given in (view, x):
        out = add_bias(given, bias)
        assert out.shape == x.shape and out.dtype == dtype
        of_bias = rounding(dtype) if bias_dtype != dtype else 1e-6  # the kernel rounds the bias to x's dtype
        assert ((out.double() - exact).abs() <= rounding(dtype) * exact.abs() + of_bias * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_add(name, dtype):
    room = tokens(2, 9, 333, dtype=dtype)
    x, y, gate = room[:, 2:], tokens(2, 7, 333, dtype=dtype), modulation(2, 1, 333, dtype=dtype)[0]
    before, exact = room.clone(), x.double() + y.double() * gate.double()
    gated_add_(x, y, gate)
    size = x.double().abs() + (y.double() * gate.double()).abs()
    assert ((x.double() - exact).abs() <= rounding(dtype) * exact.abs() + 1e-6 * size).all()
    assert torch.equal(room[:, :2], before[:, :2])


def test_rms_rope_is_that_of_comfyui():
    x, weight = tokens(2, 6, 96), modulation(96, dtype=torch.float32)[0]
    freqs = comfy.ldm.flux.math.rope(torch.arange(6.0, device=DEVICE)[None], 24, 10000)[:, :, None]
    expected = comfy.ldm.flux.math.apply_rope1(F.rms_norm(x, (96,), weight, EPS).unflatten(-1, (4, 24)), freqs).flatten(
        2
    )
    torch.testing.assert_close(rms_rope(x, weight, freqs, 4, EPS), expected, rtol=1e-5, atol=1e-6)


def test_views_give_what_their_copies_give():
    def same(function, x, *args):
        a, b = function(x, *args), function(x.clone(memory_format=torch.contiguous_format), *args)
        if isinstance(a, QuantisedTokens):
            a, b = a.dequantise(), b.dequantise()
        assert torch.equal(a, b)

    x = tokens(2, 5, 120)
    views = (x[:, 3:], x.transpose(0, 1), x[:, :, :48], x[:, :, ::5])
    for view in views:
        same(quantise, view)
        same(gelu_quantise, view)
        same(rms_silu, view, torch.rand(view.shape[2], device=DEVICE), EPS)
        six = (
            torch.randn(2, 1, 6, view.shape[2], device=DEVICE)
            if len(view) == 2
            else torch.randn(1, 1, 6, view.shape[2], device=DEVICE)
        )
        shift, scale = six.unbind(2)[1:3]
        same(layer_norm_modulate, view, shift, scale, EPS)
        same(layer_norm_quantise, view, shift, scale, EPS)
        positions = torch.arange(float(view.shape[1]), device=DEVICE)[None]
        freqs = comfy.ldm.flux.math.rope(positions, 24, 10000)[:, :, None]
        copy = view.clone(memory_format=torch.contiguous_format)
        weight = torch.randn(view.shape[2], device=DEVICE)
        assert torch.equal(
            rms_rope(copy, weight, freqs, view.shape[2] // 24, EPS),
            rms_rope(view, weight, freqs, view.shape[2] // 24, EPS),
        )


def test_no_tokens():
    x, one = torch.empty(1, 0, 64, device=DEVICE), torch.ones(1, 1, 64, device=DEVICE)
    for q in (quantise(x), gelu_quantise(x), layer_norm_quantise(x, one, one, EPS)):
        assert q.values.shape == (0, 64) and q.dequantise().shape == x.shape
    assert layer_norm_modulate(x, one, one, EPS).shape == x.shape
    assert rms_silu(x, one[0, 0], EPS).shape == add_bias(x, one[0, 0]).shape == x.shape
    assert rms_rope(x, one[0, 0], torch.empty(1, 0, 1, 16, 2, 2, device=DEVICE), 2, EPS).shape == x.shape


def test_rows():
    q = quantise(tokens(2, 3, 64))
    part = q.rows(2, 5)
    assert part.shape == (3, 64)
    assert torch.equal(part.dequantise(), q.dequantise().flatten(0, 1)[2:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries, keys, heads, head_dim", [(5, 3, 2, 6), (130, 40, 3, 16)])
def test_keys_added_to_a_finished_attention(queries, keys, heads, head_dim, dtype):
    """Also for a query that only the new keys suit, for one that they do not suit at all, and in part of a tensor."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16's bits as integers")
    batch, before = 2, 20
    q, k, v = (
        torch.randn(batch, length, heads * head_dim, generator=torch.Generator().manual_seed(length)).to(DEVICE, dtype)
        for length in (queries, before + keys, before + keys)
    )
    k[:, before] = 30 * q[:, 0]
    k[:, 0] = 30 * q[:, 1]
    exact = [t.double().unflatten(-1, (heads, head_dim)).transpose(1, 2) for t in (q, k, v)]
    scores = exact[0] @ exact[1].mT / head_dim**0.5
    expected = (scores.softmax(-1) @ exact[2]).transpose(1, 2).flatten(2)
    first = scores[..., :before]
    out = (first.softmax(-1) @ exact[2][:, :, :before]).transpose(1, 2).flatten(2).to(dtype)
    add_keys_(out, first.logsumexp(-1).float(), q, k[:, before:], v[:, before:], heads)
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}[dtype]


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace the interpreter")
def test_compiled_without_graph_breaks():
    def step(x, shift, scale, weight, freqs):
        x = x + layer_norm_quantise(x, shift, scale, EPS).dequantise()
        x = layer_norm_modulate(x, shift, scale, EPS) + gelu_quantise(x).dequantise() + quantise(x).dequantise()
        x = rms_silu(x, weight, EPS)
        return rms_rope(x, weight, freqs, 2, EPS)

    # In FP32: the compiler keeps BF16's intermediates in FP32, and would be right to differ.
    x, (shift, scale) = tokens(2, 8, 64, dtype=torch.float32), modulation(2, 1, 64, dtype=torch.float32)
    freqs = comfy.ldm.flux.math.rope(torch.arange(8.0, device=DEVICE)[None], 32, 10000)[:, :, None]
    arguments = x, shift, scale, torch.ones(64, device=DEVICE), freqs
    torch._dynamo.reset()  # which else takes up what it compiled for the backend before
    compiled = torch.compile(step, backend="inductor" if DEVICE.type == "cuda" else "eager", fullgraph=True)
    expected = step(*arguments)
    # Fused operations round differently, and a value may then fall on the next FP8 number.
    assert (compiled(*arguments) - expected).norm() / expected.norm() < 1e-3


@pytest.mark.skipif(INTERPRETED, reason="is the process that this starts")
@pytest.mark.skipif(activations.kernels is None, reason="Triton is not installed")
def test_the_kernels_in_tritons_interpreter(name):
    if name != "eager":
        pytest.skip("once is enough")
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "triton"],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout + run.stderr


def test_which_backend(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(activations, "forced", None)
    monkeypatch.setattr(activations, "kernels", None)
    monkeypatch.setattr(activations, "KERNELS_MISSING", "Triton cannot be imported (no)", raising=False)
    activations._choose.cache_clear()
    assert backend(cpu) == ("eager", "Triton cannot be imported (no); comfy-kitchen's kernels need a CUDA device")
    activations._choose.cache_clear()


@pytest.mark.parametrize(
    "forced, reason",
    [
        ("fast", "expected one of triton, kitchen, eager"),
        ("kitchen", "WORLDSTEREO_FP8_BACKEND is kitchen, but comfy-kitchen's kernels need a CUDA device"),
    ],
)
def test_a_backend_that_cannot_be_had(monkeypatch, forced, reason):
    monkeypatch.setattr(activations, "forced", forced)
    with pytest.raises(ValueError, match=reason):
        backend(torch.device("cpu"))
