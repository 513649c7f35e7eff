"""The forward pass against outputs of the original model at toy size, and what may be left out of its inputs."""

import functools

import comfy.model_management
import pytest
import torch
from toy import GOLDEN, cooked, forward, golden_inputs, golden_weights, relative_error, run, save
from worldstereo_fp8.fp8 import activations, arithmetic, int8_matmul, linear
from worldstereo_fp8.fp8.recipe import FP8, dequantise, scale_name
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.worldstereo import blocks

# Without dynamic VRAM, also on a GPU: it maps the weights read-only, and rounds FP8 layers as small as these anew.
load_worldstereo = functools.partial(load_worldstereo, disable_dynamic=True)

CASES = ["memory_dmd", "camera", "camera_maskds4"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_the_original(case, dtype, bound):
    inputs, reference = golden_inputs(case)
    patcher = load_worldstereo(GOLDEN / f"{case}.weights.safetensors", dtype=dtype)
    assert relative_error(run(patcher, inputs, dtype), reference) <= bound


def test_references_as_they_were_before_the_first_block(tmp_path):
    """update_ref false: each block sees the first references. Its first block is the same either way, so a model of
    one block tells no difference and one of two does."""
    inputs, reference = golden_inputs("memory_dmd")
    weights, config = golden_weights("memory_dmd")
    config["controlnet_cfg"]["update_ref"] = False
    two_blocks = run(load_worldstereo(save(weights, tmp_path / "fixed.safetensors", config)), inputs)
    assert relative_error(two_blocks, reference) > 1e-3

    one_block = {name: value for name, value in weights.items() if not name.startswith("blocks.1.")}
    outputs = []
    for update_ref in (True, False):
        config["controlnet_cfg"]["update_ref"] = update_ref
        path = save(one_block, tmp_path / f"{update_ref}.safetensors", config)
        outputs.append(run(load_worldstereo(path), inputs))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("case", CASES)
def test_a_cooked_model_equals_its_dequantised_weights(case, tmp_path):
    inputs, reference = golden_inputs(case)
    _, config = golden_weights(case)
    fp8 = cooked(case)
    plain = {
        name: dequantise(value, fp8[scale_name(name)], torch.float32) if scale_name(name) in fp8 else value
        for name, value in fp8.items()
        if not name.endswith("scale_weight") and name != "scaled_fp8"
    }
    paths = save(fp8, tmp_path / "cooked.safetensors", config), save(plain, tmp_path / "plain.safetensors", config)
    outputs = [run(load_worldstereo(path, compute="bf16", dtype=torch.float32), inputs) for path in paths]
    assert relative_error(*outputs) <= 1e-5
    assert 1e-4 < relative_error(outputs[0], reference) < 0.1


@pytest.fixture(scope="module")
def memory():
    return load_worldstereo(GOLDEN / "memory_dmd.weights.safetensors")


REFERENCES = ("reference_latent", "ref_index", "camera_qt_ref")
CONTROL = ("render_latent", "render_mask", "camera_embedding")


def test_a_batch_gives_what_each_alone_gives(memory):
    first, _ = golden_inputs("memory_dmd")
    torch.manual_seed(0)
    second = {
        k: v + 0.3 * torch.randn_like(v) if v.is_floating_point() and k not in ("timestep", "render_mask") else v
        for k, v in first.items()
    }
    second["timestep"] = torch.tensor([625.0])
    second["ref_index"] = torch.tensor([2, 0])
    both = {k: torch.stack([v, second[k]]) if k == "ref_index" else torch.cat([v, second[k]]) for k, v in first.items()}
    out = run(memory, both)
    for i, alone in enumerate((first, second)):
        assert relative_error(out[i : i + 1], run(memory, alone)) < 1e-5


def test_without_references_it_is_the_camera_model(memory, tmp_path):
    inputs, _ = golden_inputs("memory_dmd")
    inputs = {k: v for k, v in inputs.items() if k not in (*REFERENCES, "camera_qt")}
    weights, config = golden_weights("memory_dmd")
    config["model_type"] = "worldstereo-camera"
    config["controlnet_cfg"]["main_camera_embedding"] = False
    weights = {k: v for k, v in weights.items() if not k.startswith("camera_embedding.")}
    path = save(weights, tmp_path / "camera.safetensors", config)
    assert torch.equal(run(memory, inputs), run(load_worldstereo(path), inputs))


def test_without_control_the_branch_adds_nothing(memory):
    inputs, reference = golden_inputs("memory_dmd")
    without = {k: v for k, v in inputs.items() if k not in CONTROL}
    out = run(memory, without)
    assert relative_error(out, reference) > 1e-3

    branch = memory.model.diffusion_model.controlnet
    zeroed = [(p, p.detach().clone()) for layer in branch.proj_out for p in layer.parameters()]
    for parameter, _ in zeroed:
        parameter.data.zero_()
    try:
        assert torch.equal(run(memory, inputs), out)
    finally:
        for parameter, value in zeroed:
            parameter.data.copy_(value)


def test_without_clip_vision_only_the_text_is_attended_to(memory):
    inputs, reference = golden_inputs("memory_dmd")
    without = {k: v for k, v in inputs.items() if k != "encoder_hidden_states_image"}
    out = run(memory, without)
    assert relative_error(out, reference) > 1e-3

    attentions = [block.cross_attn.v_img for block in memory.model.diffusion_model.blocks]
    kept = [(p, p.detach().clone()) for layer in attentions for p in layer.parameters()]
    for parameter, _ in kept:
        parameter.data.zero_()
    try:
        assert relative_error(run(memory, inputs), out) < 1e-6
    finally:
        for parameter, value in kept:
            parameter.data.copy_(value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"render_mask": None}, "render_mask missing"),
        ({"ref_index": None}, "ref_index missing"),
        ({"camera_qt_ref": None}, "camera_qt and camera_qt_ref"),
        ({"render_latent": lambda v: v[:, :, :2]}, "render_latent is"),
        ({"render_mask": lambda v: v[..., :0]}, "render_mask is"),
        ({"ref_index": lambda v: v[:1]}, "2 references but 1 in ref_index"),
        ({"reference_latent": lambda v: v.repeat(1, 1, 2, 1, 1)}, "4 references for 3 frames"),
        ({"hidden_states": lambda v: v[..., :7]}, "both must be even"),
        ({"camera_qt_ref": lambda v: v[:, :1]}, "camera_qt_ref is"),
        ({"reference_latent": lambda v: v[..., :4]}, "reference_latent is"),
    ],
)
def test_inputs_that_do_not_fit(memory, change, message):
    inputs, _ = golden_inputs("memory_dmd")
    for name, value in change.items():
        if value is None:
            del inputs[name]
        else:
            inputs[name] = value(inputs[name])
    with pytest.raises(ValueError, match=message):
        run(memory, inputs)


def test_a_camera_model_takes_no_references():
    inputs, _ = golden_inputs("camera")
    references, _ = golden_inputs("memory_dmd")
    with pytest.raises(ValueError, match="worldstereo-camera takes no references"):
        run(load_worldstereo(GOLDEN / "camera.weights.safetensors"), inputs | {k: references[k] for k in REFERENCES})


def larger(inputs: dict) -> dict:
    """The golden inputs at 16×24 latents: 96 tokens a frame."""
    torch.manual_seed(0)
    sizes = {"hidden_states": 1, "render_latent": 1, "reference_latent": 1, "render_mask": 8, "camera_embedding": 8}
    return {
        name: torch.randn(*value.shape[:-2], 16 * sizes[name], 24 * sizes[name]) if name in sizes else value
        for name, value in inputs.items()
    }


@pytest.fixture
def quantised(monkeypatch):
    """The path of quantised products on the CPU: tokens are quantised as on a GPU, and the product is that of what they stand for."""

    def product(x, weight, scale, bias):
        x = x if isinstance(x, activations.QuantisedTokens) else activations.quantise(x)
        assert x.values.dtype == FP8
        return torch.nn.functional.linear(x.dequantise(), dequantise(weight, scale, x.dtype), bias)

    monkeypatch.setattr(linear, "supports_fp8_compute", lambda device: True)
    monkeypatch.setattr(linear, "row_scales_refusal", lambda device: None)
    monkeypatch.setattr(arithmetic, "scaled_linear", product)
    monkeypatch.setattr(int8_matmul, "device_refusal", lambda device: None)
    linear.matmul_refusal.cache_clear()
    yield
    linear.matmul_refusal.cache_clear()


def test_quantised_and_upcast_agree_but_for_the_tokens_rounding(quantised, tmp_path):
    inputs, config = larger(golden_inputs("memory_dmd")[0]), golden_weights("memory_dmd")[1]
    path = save(cooked("memory_dmd"), tmp_path / "m.safetensors", config)
    upcast = run(load_worldstereo(path, compute="bf16", dtype=torch.float32), inputs)
    error = relative_error(run(load_worldstereo(path, compute="fp8", dtype=torch.float32), inputs), upcast)
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_tokens_in_parts_give_what_all_at_once_give(compute, quantised, monkeypatch, tmp_path):
    inputs, config = larger(golden_inputs("memory_dmd")[0]), golden_weights("memory_dmd")[1]
    patcher = load_worldstereo(save(cooked("memory_dmd"), tmp_path / "m.safetensors", config), compute, torch.float32)
    whole = run(patcher, inputs)
    monkeypatch.setattr(blocks, "CHUNK", 128)
    monkeypatch.setattr(blocks, "UPCAST_QUERIES", 128)
    assert len(blocks.spans(480, 128)) == 4 and len(blocks.spans(288, 128)) == 3
    # In FP8 a last bit of difference in one layer may round a token of the next to the neighbouring number.
    assert relative_error(run(patcher, inputs), whole) < (1e-5 if compute == "bf16" else 1e-2)


@pytest.mark.parametrize("chunk", [blocks.CHUNK, 128])
def test_the_last_block_leaves_the_references(memory, monkeypatch, chunk):
    """Nothing reads them afterwards: the same picture with less work, and all of it where a patch may look."""
    inputs, _ = golden_inputs("memory_dmd")
    inputs = larger(inputs)
    monkeypatch.setattr(blocks, "CHUNK", chunk)
    monkeypatch.setattr(blocks, "UPCAST_QUERIES", chunk)
    seen = []
    feed_forward = blocks.add_feed_forward
    monkeypatch.setattr(
        blocks, "add_feed_forward", lambda ffn, x, *a: (seen.append(x.shape[1]), feed_forward(ffn, x, *a))
    )
    comfy.model_management.load_models_gpu([memory])
    less = forward(memory, inputs)
    assert seen == [480, 288]  # five frames' tokens of 96, then the three targets'
    patch = {"patches": {"double_block": [lambda args: args]}}
    model = memory.model.diffusion_model
    monkeypatch.setattr(model, "forward", functools.partial(model.forward, transformer_options=patch))
    assert relative_error(less, forward(memory, inputs)) < 1e-5
    assert seen[2:] == [480, 480]
