"""The name table, on every name of the published checkpoint."""

import pytest
import torch
from comfy.ldm.wan.model import WanModel
from comfy.ops import disable_weight_init
from diffusers import WanTransformer3DModel
from worldstereo_fp8 import remap
from worldstereo_fp8.worldstereo.config import WorldStereoConfig
from worldstereo_fp8.worldstereo.shapes import native_shapes, tensor_shapes

NAMES = list(tensor_shapes(WorldStereoConfig()))


def test_the_published_checkpoint_has_1799_tensors():
    assert len(NAMES) == len(set(NAMES)) == 1799


def test_round_trip_is_the_identity():
    native = [remap.to_native(name) for name in NAMES]
    assert len(set(native)) == len(NAMES)
    assert [remap.to_diffusers(name) for name in native] == NAMES
    assert set(native) == set(native_shapes(WorldStereoConfig()))


@pytest.mark.parametrize(
    "diffusers, native",
    [
        ("condition_embedder.time_proj.weight", "time_projection.1.weight"),
        ("condition_embedder.image_embedder.ff.net.2.bias", "img_emb.proj.3.bias"),
        ("blocks.39.attn1.to_out.0.weight", "blocks.39.self_attn.o.weight"),
        ("blocks.7.attn2.norm_added_k.weight", "blocks.7.cross_attn.norm_k_img.weight"),
        ("blocks.0.norm2.bias", "blocks.0.norm3.bias"),
        ("blocks.12.scale_shift_table", "blocks.12.modulation"),
        ("scale_shift_table", "head.modulation"),
        ("controlnet.controlnet_blocks.19.self_attn.to_q.weight", "controlnet.controlnet_blocks.19.self_attn.q.weight"),
    ],
)
def test_names_of_the_table(diffusers, native):
    assert remap.to_native(diffusers) == native
    assert remap.to_diffusers(native) == diffusers


@pytest.mark.parametrize(
    "suffix", ["scale_weight", "weight.scale_weight", "scale_input", "weight_scale", "comfy_quant"]
)
def test_scales_follow_their_layer(suffix):
    for name in NAMES:
        if name.endswith(".weight"):
            layer = name.removesuffix("weight")
            assert remap.to_native(layer + suffix) == remap.to_native(name).removesuffix("weight") + suffix
            assert remap.to_diffusers(remap.to_native(layer + suffix)) == layer + suffix


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn3.to_q.weight",
        "blocks.0.attn1.to_q.gamma",
        "blocks.x.attn1.to_q.weight",
        "attn1.to_q.weight",
        "controlnet.proj_out.weight",
        "scaled_fp8",
        "",
    ],
)
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(KeyError, match="not a diffusers name"):
        remap.to_native(name)
    with pytest.raises(KeyError, match="not a native name"):
        remap.to_diffusers(name)


def test_the_two_namings_are_told_apart():
    for name in NAMES:
        native = remap.to_native(name)
        assert remap.is_native(native) == remap.is_native(f"model.diffusion_model.{native}") == (name != native)
        assert not remap.is_native(name)


def test_diffusers_own_wan_and_comfyuis_agree_after_the_remap():
    """The same random weights through both implementations of the plain Wan I2V transformer."""
    dim, layers = 48, 2
    torch.manual_seed(0)
    diffusers = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=dim // 2,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=layers,
        image_dim=1280,
        added_kv_proj_dim=dim,
    ).eval()
    for parameter in diffusers.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    comfy = WanModel(
        model_type="i2v",
        in_dim=36,
        dim=dim,
        ffn_dim=64,
        freq_dim=64,
        text_dim=32,
        out_dim=16,
        num_heads=2,
        num_layers=layers,
        operations=disable_weight_init,
    )
    native = {remap.to_native(name): value for name, value in diffusers.state_dict().items()}
    comfy.load_state_dict(native, strict=True)

    latent, time, text, image = (
        torch.randn(1, 36, 3, 6, 8),
        torch.tensor([625.0]),
        torch.randn(1, 512, 32),
        torch.randn(1, 257, 1280),
    )
    with torch.no_grad():
        expected = diffusers(latent, time, text, image, return_dict=False)[0]
        out = comfy(latent, time, text, clip_fea=image)
    assert ((out - expected).norm() / expected.norm()).item() < 1e-5
