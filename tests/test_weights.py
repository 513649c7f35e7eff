"""Core's nodes that work on weights, on a scaled-FP8 file: hook LoRAs, merges, LoRA extraction."""

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras import nodes_lora_extract
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeSimple, ModelSubtract
from safetensors.torch import load_file
from test_comfyui import CASE, conditioning, load, lora, sample
from toy import cooked, golden_weights, relative_error, save

LAYERS = ("blocks.0.self_attn.q", "blocks.1.ffn.2", "blocks.0.cross_attn.k", "controlnet.proj_out.0")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save(cooked(CASE), tmp_path_factory.mktemp("models") / "fp8.safetensors", golden_weights(CASE)[1])


def weights(patcher) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([t.flatten().float() for t in (p._qdata, p._params.scale)])
        if hasattr(p, "_qdata")
        else p.clone()
        for name, p in patcher.model.named_parameters()
    }


def assert_same_weights(patcher, before):
    after = weights(patcher)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def lora_with_biases(layers=LAYERS):
    """Biases are no quantised weights: core's hooks handle them in its own way."""
    file, differences = lora("native", layers)
    return file | {
        f"diffusion_model.{name.removesuffix('.weight')}.diff_b": difference[:, 0]
        for name, difference in differences.items()
    }


def with_lora(patcher, strength=1.0):
    return comfy.sd.load_lora_for_models(patcher, None, lora_with_biases(), strength, strength)[0]


def hooked(seed: int, strength: float, layers=LAYERS):
    hooks = comfy.hooks.create_hook_lora(lora_with_biases(layers), strength, strength)
    return comfy.hooks.set_hooks_for_conditioning(conditioning(seed), hooks)


class TestHookLoras:
    def test_equals_the_lora_and_leaves_the_weights_as_they_were(self, file):
        patcher = load(file, disable_dynamic=True)
        plain, before = sample(patcher, conditioning(0), conditioning(1)), weights(patcher)
        out = sample(patcher, hooked(0, 1.0), conditioning(1))
        assert_same_weights(patcher, before)
        assert torch.equal(sample(patcher, conditioning(0), conditioning(1)), plain)
        expected = sample(with_lora(load(file, disable_dynamic=True)), conditioning(0), conditioning(1))
        assert relative_error(out, plain) > 1e-2
        assert relative_error(out, expected) < 0.05  # both round the patched layers to FP8, with other dice

    @pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode))
    def test_two_prompts_with_hooks_of_their_own(self, mode, file):
        """At every step the weights change from one to the other and back, kept (MaxSpeed) or made anew."""
        patcher = load(file, disable_dynamic=True)
        patcher.set_hook_mode(mode)
        sample(patcher, conditioning(0), conditioning(1), steps=1)
        before = weights(patcher)
        together = sample(patcher, hooked(0, 1.0), hooked(1, -1.0), cfg=3.0, steps=3)
        assert_same_weights(patcher, before)
        positive, negative = with_lora(load(file), 1.0), with_lora(load(file), -1.0)

        assert together.isfinite().all()
        same = sample(patcher, hooked(0, 1.0), hooked(1, -1.0), cfg=3.0, steps=3)
        assert relative_error(same, together) < 1e-5
        one_step = sample(patcher, hooked(0, 1.0), hooked(1, -1.0), cfg=3.0, steps=1)
        alone = [
            p.model.process_latent_in(sample(p, conditioning(seed), conditioning(seed), steps=1))
            for p, seed in ((positive, 0), (negative, 1))
        ]
        expected = alone[1] + 3 * (alone[0] - alone[1])
        assert relative_error(patcher.model.process_latent_in(one_step), expected) < 0.1
        assert_same_weights(patcher, before)

    def test_weights_that_only_the_other_prompts_hooks_change(self, file):
        """Kept weights are put back without them, as are weights made anew."""
        results = []
        for mode in comfy.hooks.EnumHookMode:
            patcher = load(file, disable_dynamic=True)
            patcher.set_hook_mode(mode)
            results.append(sample(patcher, hooked(0, 1.0, LAYERS[:2]), hooked(1, -1.0, LAYERS[1:]), cfg=3.0, steps=2))
        assert relative_error(*results) < 1e-5


def test_merges(file):
    patcher = load(file, disable_dynamic=True)
    other = with_lora(load(file, disable_dynamic=True))
    before = weights(patcher)
    plain, full = (sample(p, conditioning(0), conditioning(1)) for p in (patcher, other))
    (half,) = ModelMergeSimple().merge(patcher, other, 0.5)
    expected = sample(with_lora(load(file, disable_dynamic=True), 0.5), conditioning(0), conditioning(1))
    out = sample(half, conditioning(0), conditioning(1))
    assert relative_error(expected, plain) > 1e-2 and relative_error(out, expected) < 0.05
    (difference,) = ModelSubtract().merge(other, patcher, 1.0)
    (again,) = ModelAdd().merge(patcher, difference)
    assert relative_error(sample(again, conditioning(0), conditioning(1)), full) < 0.05
    comfy.model_management.unload_all_models()
    assert_same_weights(patcher, before)


@pytest.mark.parametrize("kind", ["standard", "full_diff"])
@pytest.mark.parametrize("streamed", [False, True])
def test_lora_extraction(kind, streamed, file, tmp_path, monkeypatch):
    """From the difference of two FP8 models back to the LoRA that makes it."""
    monkeypatch.setattr(nodes_lora_extract, "CLAMP_QUANTILE", 1.0)  # core clamps outliers, which a toy has too few for
    (difference,) = ModelSubtract().merge(with_lora(load(file, disable_dynamic=True)), load(file), 1.0)
    if streamed:
        difference.load(difference.load_device, lowvram_model_memory=1000)
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models: None)
    prefix = "diffusion_model."
    extracted = nodes_lora_extract.calc_lora_model(
        difference, 4, prefix, prefix, {}, nodes_lora_extract.LORA_TYPES[kind]
    )
    path = tmp_path / "lora.safetensors"
    comfy.utils.save_torch_file(extracted, path)
    tensors, expected = load_file(path), lora("native", LAYERS)[1]
    for layer in LAYERS:
        if kind == "standard":
            up, down = (tensors[f"{prefix}{layer}.lora_{end}.weight"].float() for end in ("up", "down"))
            found = up @ down
        else:
            found = tensors[f"{prefix}{layer}.diff"].float()
        assert relative_error(found, expected[f"{layer}.weight"]) < 0.1  # FP8's rounding
