"""The recipes against a few lines written from the format's description."""

import pytest
import torch
from worldstereo_fp8.fp8 import recipe

WORDS = "norm, bias, time_in, time_, patch_embedding, img_emb, modulation, text_embedding, adapter, add, ref_conv, audio_proj"


def published(weight):
    scale = weight.float().abs().max() / 448
    values = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scale.to(torch.bfloat16)


def errors(weight, values, scale):
    error = (weight.double() - values.double() * scale.double()).abs()
    return error.max().item(), error.square().mean().sqrt().item()


def hard_weights():
    """Weights on which some way of rounding the scale does badly: every scale between two BF16 numbers, values on the
    grid of the exact scale, constants, one outlier, tiny and huge magnitudes."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()]
    for i in range(64):
        weight = torch.randn(64, 96, generator=generator) * 0.02
        weight[0, 0] = 0.125 * (1 + i / 64)
        yield weight.to(torch.bfloat16)
        yield grid * (1 + i / 64) * 1e-3
        yield torch.full((8, 8), 0.3 + i / 64)
        yield torch.rand(32, 32, generator=generator) * 10.0 ** (i - 32)
    outlier = torch.randn(256, 256, generator=generator) * 1e-3
    outlier[3, 5] = 7.03
    yield outlier


def test_which_tensors():
    assert ", ".join(recipe.EXCLUDED) == WORDS
    assert recipe.is_quantised("blocks.0.attn1.to_q.weight", (8, 8))
    assert recipe.is_quantised("controlnet.controlnet_mask_embedding.mask_zero_proj.weight", (8, 8, 1, 2, 2))
    assert not recipe.is_quantised(
        "controlnet.controlnet_mask_embedding.mask_zero_proj.weight", (8, 8, 1, 2, 2), "bf16"
    )
    for name in (
        "blocks.0.attn1.to_q.bias",
        "blocks.0.attn2.add_k_proj.weight",
        "blocks.0.scale_shift_table",
        "condition_embedder.time_proj.weight",
        "controlnet.blocks.0.norm1.linear.weight",
        "patch_embedding.weight",
    ):
        assert not recipe.is_quantised(name, (8, 8)), name
    assert not recipe.is_quantised("controlnet.controlnet_mask_embedding.mask_proj.1.weight", (8,))


def test_published_bit_for_bit():
    for weight in hard_weights():
        values, scale = recipe.quantise_weight(weight, "published")
        expected, expected_scale = published(weight)
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        assert scale.dtype == torch.bfloat16 and scale.shape == () and torch.equal(scale, expected_scale)


def test_default_is_never_worse_and_never_clips():
    ups = 0
    for weight in hard_weights():
        worst, rms = errors(weight, *published(weight))
        values, scale = recipe.quantise_weight(weight, "default")
        default_worst, default_rms = errors(weight, values, scale)
        assert default_worst <= worst and default_rms <= rms
        assert weight.abs().max().double() / scale.double() < 464  # above this the nearest e4m3 number would not be 448
        ups += bool(scale.double() * 448 >= weight.abs().max().double())
    assert ups > 128  # rounding up is the rule


def test_rounding_up_alone_would_lose():
    weight = torch.full((8, 8), 0.3)
    up = torch.nextafter(published(weight)[1], torch.tensor(torch.inf, dtype=torch.bfloat16))
    rounded_up = (weight / up.float()).to(torch.float8_e4m3fn), up
    assert (
        errors(weight, *rounded_up)
        > errors(weight, *published(weight))
        >= errors(weight, *recipe.quantise_weight(weight))
    )


def test_counted_values_choose_as_the_weight_does():
    for weight in hard_weights():
        values, counts = weight.float().unique(return_counts=True)
        by_counts = recipe.find_scale(weight.float().abs().max(), [(values, counts)], "default")
        by_halves = recipe.find_scale(
            weight.float().abs().max(), [(half.float(), 1) for half in weight.chunk(2)], "default"
        )
        assert by_counts == by_halves == (recipe.quantise_weight(weight)[1].float(), recipe.quantise_weight(weight)[1])


@pytest.mark.parametrize("name", recipe.RECIPES)
def test_all_zero_weight_has_scale_one(name):
    values, scale = recipe.quantise_weight(torch.zeros(4, 4, dtype=torch.bfloat16), name)
    assert scale == 1 and not values.float().any()


def test_dequantise_multiplies_in_fp32():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    values, scale = recipe.quantise_weight(weight)
    expected = values.double() * scale.double()
    assert torch.equal(recipe.dequantise(values, scale, torch.float32).double(), expected)
    assert torch.equal(recipe.dequantise(values, scale, torch.bfloat16), expected.to(torch.bfloat16))
