"""The INT8 Linear: its product against the dequantised factors, files of other tools, and the golden model."""

import functools
import json
import logging

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy_kitchen
import pytest
import torch
from safetensors.torch import load_file
from toy import cooked_int8, forward, golden_inputs, golden_weights, native, relative_error, run, save
from worldstereo_fp8 import remap
from worldstereo_fp8.fp8 import activations, arithmetic, int8, int8_matmul, linear
from worldstereo_fp8.fp8.activations import QuantisedTokens
from worldstereo_fp8.fp8.arithmetic import FP8_MATMUL, UPCAST, INT8Matmul
from worldstereo_fp8.fp8.cook import Options, cook
from worldstereo_fp8.fp8.int8_matmul import gelu_quantise, int8_linear, product_kernel, quantise
from worldstereo_fp8.fp8.linear import matmul_refusal, operations
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.worldstereo import blocks

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASE = "memory_dmd"
load_worldstereo = functools.partial(load_worldstereo, disable_dynamic=True)


def has_int8_units() -> bool:
    return torch.cuda.is_available() and int8_matmul.device_refusal(torch.device("cuda")) is None


def layer(in_features=64, out_features=48, group=16, matmul=False, dtype=torch.bfloat16, bias=True):
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features)
    values, scale = int8.quantise_weight(weight, group)
    linear = operations(dtype, lambda *_: None if matmul else "INT8 is off").Linear(
        in_features, out_features, bias=bias
    )
    quant = torch.tensor(list(int8.description(group)), dtype=torch.uint8)
    state = {"weight": values, "weight_scale": scale, "comfy_quant": quant}
    if bias:
        state["bias"] = torch.randn(out_features).to(dtype)
    linear.load_state_dict(state)
    return linear, int8.dequantise(values, scale, torch.float32, group), state.get("bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (1, 64), (0, 64)])
@pytest.mark.parametrize("group", [0, 16, 64])
def test_upcast_is_the_dequantised_weight(dtype, shape, group):
    linear, weight, bias = layer(group=group)
    x = torch.randn(shape).to(dtype)
    out = linear(x)
    expected = torch.nn.functional.linear(x.float(), weight, bias.float())
    assert out.dtype == dtype and out.shape == expected.shape
    torch.testing.assert_close(out.float(), expected, atol={torch.float32: 1e-4}.get(dtype, 0.15), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (1, 64), (0, 64)])
@pytest.mark.parametrize("group", [0, 16, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_the_product_of_both_factors(dtype, shape, group, bias):
    linear, weight, b = layer(group=group, matmul=True, bias=bias)
    assert linear.arithmetic(CPU) == INT8Matmul(group) and linear.upcast_reason(CPU) is None
    x = torch.randn(shape).to(dtype)
    q = quantise(x, group)
    assert q.values.dtype == torch.int8 and q.group == group and q.scale.shape == (x[..., 0].numel(), 1)
    out = linear(x)
    expected = torch.nn.functional.linear(q.dequantise().float(), weight, b.float() if bias else None)
    assert out.dtype == dtype and out.shape == expected.shape
    torch.testing.assert_close(out.float(), expected, atol={torch.float32: 1e-3}.get(dtype, 0.2), rtol=1e-5)
    with linear.fetched(CPU, dtype) as product:
        assert torch.equal(product(q), out)


def test_it_is_kitchens_own_linear():
    linear, _, bias = layer(matmul=True, dtype=torch.float32)
    x = torch.randn(7, 64)
    weight = linear.weight
    theirs = comfy_kitchen.int8_linear(
        x, weight._qdata, weight._params.scale, bias, torch.float32, convrot=True, convrot_groupsize=16
    )
    torch.testing.assert_close(linear(x), theirs, atol=1e-5, rtol=1e-5)


def test_tokens_of_another_format_are_restored():
    linear, *_ = layer(matmul=True, dtype=torch.float32)
    x = torch.randn(5, 64)
    for tokens in (activations.quantise(x), quantise(x, 64), quantise(x, 0)):
        with linear.fetched(CPU, torch.float32) as product:
            assert torch.equal(product(tokens), linear(tokens.dequantise()))
    fp8 = FP8_MATMUL
    seen = []
    original, arithmetic.scaled_linear = arithmetic.scaled_linear, lambda x, *_: seen.append(x)
    try:
        fp8.product(quantise(x, 16), None, None, None)
    finally:
        arithmetic.scaled_linear = original
    assert torch.equal(seen[0], quantise(x, 16).dequantise())


@pytest.mark.parametrize("group", [0, 16])
def test_parts_and_what_is_written_over(group):
    x = torch.randn(2, 4, 64)
    q = quantise(x, group)
    part = q.rows(2, 5)
    assert part.group == group and torch.equal(part.dequantise(), q.dequantise().flatten(0, 1)[2:5])
    again = quantise(2 * x, group, into=q)
    assert again.values.data_ptr() == q.values.data_ptr()
    assert torch.equal(again.dequantise(), quantise(2 * x, group).dequantise())
    assert relative_error(gelu_quantise(x, group).dequantise(), torch.nn.functional.gelu(x, approximate="tanh")) < 0.02


def test_the_int8_product_is_compiled_whole():
    values, scale = int8.quantise_weight(torch.randn(48, 64), 16)

    def product(x):
        y = int8_linear(quantise(x, 16).rows(0, 4), values, scale, None, 16)
        return y, int8_linear(gelu_quantise(x, 16), values, scale, None, 16)

    x = torch.randn(8, 64)
    torch._dynamo.reset()
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(x), product(x)))


def test_why_it_upcasts():
    linear.matmul_refusal.cache_clear()
    assert "NVIDIA GPU" in matmul_refusal("auto", torch.int8, CPU)
    assert matmul_refusal("bf16", torch.int8, CPU) == "compute is bf16"
    with pytest.raises(ValueError, match="compute is fp8, but INT8 matmul needs an NVIDIA GPU"):
        matmul_refusal("fp8", torch.int8, CPU)
    assert layer()[0].upcast_reason(CPU) == "INT8 is off" and layer()[0].arithmetic(CPU) is UPCAST


@pytest.mark.parametrize(
    "capability, available, disabled, reason",
    [
        ((7, 5), True, False, None),
        ((9, 0), True, False, None),
        ((7, 0), True, False, "no INT8 matmul (compute capability 7.5"),
        ((8, 6), False, False, "comfy-kitchen has no CUDA kernels here (none built)"),
        ((8, 6), True, True, "turned comfy-kitchen's CUDA kernels off"),
    ],
)
def test_which_devices_multiply(monkeypatch, capability, available, disabled, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    state = {"cuda": {"available": available, "disabled": disabled, "unavailable_reason": "none built"}}
    monkeypatch.setattr(comfy_kitchen, "list_backends", lambda: state)
    found = int8_matmul.device_refusal.__wrapped__(torch.device("cuda"))
    assert found is None if reason is None else reason in found


# Files


def write(tmp_path, tensors, name="model.safetensors"):
    return save(tensors, tmp_path / name, golden_weights(CASE)[1])


def dequantised(tensors: dict, group: int) -> dict:
    out = {}
    for name, value in tensors.items():
        layer = name.removesuffix(".weight")
        if value.dtype == torch.int8:
            value = int8.dequantise(value, tensors[f"{layer}.weight_scale"], torch.float32, group)
        elif value.dtype == torch.float8_e4m3fn:
            value = value.float() * tensors[f"{layer}.scale_weight"].float()
        if not name.endswith(("weight_scale", "comfy_quant", "scale_weight")):
            out[name] = value
    return out


@pytest.mark.parametrize("group, every", [(0, 1), (16, 1), (16, 2)])
@pytest.mark.parametrize("names", ["diffusers", "native"])
def test_upcast_the_golden_model_is_its_dequantised_weights(tmp_path, group, every, names):
    inputs, reference = golden_inputs(CASE)
    tensors = cooked_int8(CASE, group, every)
    plain = run(load_worldstereo(write(tmp_path, dequantised(tensors, group), "plain.safetensors")), inputs)
    path = write(tmp_path, native(tensors) if names == "native" else tensors)
    patcher = load_worldstereo(path, "bf16", dtype=torch.float32)
    dtypes = {p._qdata.dtype for p in patcher.model.parameters() if hasattr(p, "_qdata")}
    assert dtypes == ({torch.int8} if every == 1 else {torch.int8, torch.float8_e4m3fn})
    out = run(patcher, inputs)
    assert relative_error(out, plain) < 1e-5
    assert 1e-4 < relative_error(out, reference) < (0.02 if every == 1 else 0.06)


@pytest.fixture
def int8_path(monkeypatch):
    """INT8 multiplied as on a GPU, by plain torch."""
    monkeypatch.setattr(int8_matmul, "device_refusal", lambda device: None)
    monkeypatch.setattr(linear, "supports_fp8_compute", lambda device: False)
    linear.matmul_refusal.cache_clear()
    yield
    linear.matmul_refusal.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 2])
def test_int8_the_golden_model_is_within_its_bound(int8_path, tmp_path, dtype, every, caplog):
    """Tokens and weights in INT8: within 3 % of the original, where FP8 weights alone are within 10 %."""
    inputs, reference = golden_inputs(CASE)
    with caplog.at_level(logging.INFO):
        patcher = load_worldstereo(write(tmp_path, cooked_int8(CASE, every=every)), dtype=dtype)
    matrices = sum(value.dtype == torch.int8 for value in cooked_int8(CASE, every=every).values())
    assert f"INT8 matmul on {matrices} of {matrices} INT8 layers" in caplog.text
    assert ("FP8 layers upcast" in caplog.text) == (every == 2)
    error = relative_error(run(patcher, inputs, dtype), reference)
    assert 1e-3 < error < (0.03 if every == 1 else 0.06)


@pytest.mark.parametrize("chunk", [blocks.CHUNK, 128])
def test_q_k_v_share_one_quantisation(int8_path, tmp_path, monkeypatch, chunk):
    """Of a block's self-attention input, in spans or whole."""
    patcher = load_worldstereo(write(tmp_path, cooked_int8(CASE)), dtype=torch.float32)
    monkeypatch.setattr(blocks, "CHUNK", chunk)
    calls = []
    quantise_rows = int8_matmul._quantise_rows
    monkeypatch.setattr(int8_matmul, "_quantise_rows", lambda *a: (calls.append(len(a[0])), quantise_rows(*a))[1])
    block = patcher.model.diffusion_model.blocks[0].self_attn
    comfy.model_management.load_models_gpu([patcher])
    x = torch.randn(1, 300, 64)
    h = blocks.normed(x, torch.zeros(1, 1, 64), torch.zeros(1, 1, 64), 1e-6, block.q)
    assert calls == [300]
    freqs = torch.eye(2).expand(1, 300, 1, block.head_dim // 2, 2, 2).contiguous()
    with torch.no_grad():
        block.add_to(x, h, torch.ones(1, 1, 64), freqs, {})
    assert sum(calls) == 600 and calls[0] == 300  # and the attended tokens, for the output


def test_lora_merge_and_saving(int8_path, tmp_path):
    """As core has them: a LoRA is requantised in the same form; what core saves loads again."""
    inputs, _ = golden_inputs(CASE)
    patcher = load_worldstereo(write(tmp_path, cooked_int8(CASE)), dtype=torch.float32)
    plain = run(patcher, inputs)
    name = "blocks.1.ffn.2"
    torch.manual_seed(0)
    up, down = torch.randn(64, 4) * 0.3, torch.randn(4, 128) * 0.3
    lora = {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 1.0)
    out = run(patched, inputs)
    weights = {key: value.clone() for key, value in golden_weights(CASE)[0].items()}
    weights[remap.to_diffusers(f"{name}.weight")] += up @ down
    merged = run(load_worldstereo(write(tmp_path, weights, "merged.safetensors")), inputs)
    assert relative_error(plain, merged) > 2 * relative_error(out, merged)
    assert relative_error(out, merged) < 0.05
    assert torch.equal(run(patcher, inputs), plain)

    state = patcher.model.state_dict_for_saving(patcher.model.diffusion_model.state_dict())
    again = load_worldstereo(write(tmp_path, state, "saved.safetensors"), dtype=torch.float32)
    assert relative_error(run(again, inputs), plain) < 1e-6


def test_cooked_by_us_it_loads_in_cores_own_linear(tmp_path):
    source = save({f"l{i}.weight": torch.randn(32, 512).bfloat16() for i in range(2)}, tmp_path / "source.safetensors")
    cook(source, tmp_path / "cooked.safetensors", Options("int8"))
    tensors, weights = load_file(tmp_path / "cooked.safetensors"), load_file(source)
    linear = comfy.ops.mixed_precision_ops({}, torch.float32).Linear(512, 32, bias=False)
    linear.load_state_dict({key.removeprefix("l0."): value for key, value in tensors.items() if key.startswith("l0.")})
    assert linear.weight._params.convrot and linear.weight._params.convrot_groupsize == 256
    x = torch.randn(4, 512)
    assert relative_error(linear(x), x @ weights["l0.weight"].float().t()) < 0.02
    assert relative_error(linear.weight.dequantize(), weights["l0.weight"].float()) < 0.01


LAYER = "blocks.0.attn1.to_q"


def nested(tensors):
    quant = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}}
    tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(json.dumps(quant).encode()), dtype=torch.uint8)


def one_scale(tensors):
    tensors[f"{LAYER}.weight"], _ = int8.quantise_weight(torch.randn(64, 64), 16)
    tensors[f"{LAYER}.weight_scale"] = torch.tensor(0.01)


def flat_scale(tensors):
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"].flatten()


@pytest.mark.parametrize("change", [nested, one_scale, flat_scale])
def test_as_other_tools_write_them(tmp_path, change):
    tensors = cooked_int8(CASE)
    change(tensors)
    inputs, _ = golden_inputs(CASE)
    plain = {k: v.reshape(-1, 1) if k.endswith("weight_scale") and v.numel() > 1 else v for k, v in tensors.items()}
    expected = run(load_worldstereo(write(tmp_path, dequantised(plain, 16), "plain.safetensors")), inputs)
    patcher = load_worldstereo(write(tmp_path, tensors), "bf16", dtype=torch.float32)
    assert relative_error(run(patcher, inputs), expected) < 1e-5


def quant_of(**entries):
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("comfy_quant", quant_of(format="nvfp4"), f"{LAYER}.comfy_quant says the format is nvfp4"),
        ("comfy_quant", quant_of(format="convrot_w4a4"), "says the format is convrot_w4a4"),
        ("comfy_quant", quant_of(format="float8_e4m3fn"), "weight is I8, but|is I8. Only matrices can be INT8"),
        ("comfy_quant", quant_of(form=1), "is not a description of a quantised layer"),
        ("comfy_quant", torch.tensor(list(b"{]"), dtype=torch.uint8), "comfy_quant is not JSON"),
        (
            "comfy_quant",
            quant_of(format="int8_tensorwise", convrot=True, convrot_groupsize=8),
            "groups of 8: that is a group of 8 channels, which is not a power of 4",
        ),
        ("comfy_quant", quant_of(format="int8_tensorwise", convrot=True), "64 channels, not a multiple of 256"),
        ("comfy_quant", None, f"{LAYER}.weight is I8. Only matrices can be INT8, and they need"),
        ("weight_scale", None, f"{LAYER}.weight is I8. Only matrices can be INT8, and they need"),
        ("weight_scale", torch.ones(63, 1), r"weight_scale is F32 \[63, 1\]; an INT8 weight has one scale, or one for"),
        ("weight_scale", torch.zeros(64, 1), "weight_scale is 0.0; a scale must be a positive number"),
        ("weight_scale", torch.full((64, 1), torch.nan), "weight_scale is nan; a scale must be a positive number"),
    ],
)
def test_files_that_are_refused(tmp_path, name, value, message):
    tensors = cooked_int8(CASE)
    tensors.pop(f"{LAYER}.{name}")
    if value is not None:
        tensors[f"{LAYER}.{name}"] = value
    with pytest.raises(ValueError, match=message) as error:
        load_worldstereo(write(tmp_path, tensors))
    assert "model.safetensors" in str(error.value)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not has_int8_units(), reason="needs a CUDA GPU with INT8 units (compute capability 7.5)")
def test_kitchens_kernel_is_taken():
    for dtype in (torch.bfloat16, torch.float16):
        assert product_kernel(DEVICE, dtype)[0] == "kitchen"
    assert int8_matmul._folds_gelu(DEVICE, torch.bfloat16, 13824, 256)


@pytest.mark.gpu
@pytest.mark.skipif(not has_int8_units(), reason="needs a CUDA GPU with INT8 units (compute capability 7.5)")
@pytest.mark.parametrize("tokens", [1, 2, 5, 300, 5000])
@pytest.mark.parametrize("sizes", [(256, 64), (5120, 5120), (512, 1000), (64, 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_product_on_a_gpu(tokens, sizes, dtype):
    group = 256 if sizes[0] % 256 == 0 else 16
    linear, weight, bias = layer(*sizes, group=group, matmul=True)
    linear, weight, bias = linear.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)
    x = torch.randn(tokens, sizes[0], device=DEVICE).to(dtype)
    q = quantise(x, group)
    assert relative_error(q.dequantise().float(), x.float()) < 0.02
    expected = q.values.float() * q.scale
    expected = (
        QuantisedTokens(q.values, q.scale, q.shape, torch.float32, group).dequantise() @ weight.t() + bias.float()
    )
    out = linear(x)
    assert out.dtype == dtype and relative_error(out.float(), expected) < (1e-4 if dtype == torch.float32 else 5e-3)
    hidden = gelu_quantise(x, group)
    exact = torch.nn.functional.gelu(x.float(), approximate="tanh")
    assert relative_error(hidden.dequantise().float(), exact) < 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not has_int8_units(), reason="needs a CUDA GPU with INT8 units (compute capability 7.5)")
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_golden_model_on_a_gpu(tmp_path, dynamic):
    inputs, reference = golden_inputs(CASE)
    path = write(tmp_path, cooked_int8(CASE))
    patcher = load_worldstereo.func(path, dtype=torch.bfloat16, disable_dynamic=not dynamic)
    comfy.model_management.load_models_gpu([patcher])
    assert relative_error(forward(patcher, inputs, torch.bfloat16), reference) < 0.04
    upcast = load_worldstereo.func(path, "bf16", dtype=torch.bfloat16, disable_dynamic=not dynamic)
    assert relative_error(run(upcast, inputs, torch.bfloat16), reference) < 0.03
