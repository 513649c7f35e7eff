"""Picture, render and cameras to conditioning; keyframes through the VAE; the schedule; sampling through ComfyUI."""

import copy
import itertools

import comfy.model_management
import comfy.ops
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.ldm.wan.vae import AttentionBlock, RMS_norm, WanVAE
from comfy.taesd.taehv import TAEHV
from comfy_extras.nodes_custom_sampler import BasicScheduler
from test_channels_last import Seen
from toy import GOLDEN, golden_weights, relative_error, save
from worldstereo_fp8.fp8 import channels_last
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.scene.cameras import Cameras, normalise
from worldstereo_fp8.scene.pictures import resize_pictures
from worldstereo_fp8.worldstereo import conditioning as conditioning_module
from worldstereo_fp8.worldstereo import keyframe_vae
from worldstereo_fp8.worldstereo.conditioning import References, condition, keyframe_size, remarks
from worldstereo_fp8.worldstereo.config import WorldStereoConfig
from worldstereo_fp8.worldstereo.keyframe_vae import BATCH, CALL, check_vae, decode_keyframes, encode_keyframes
from worldstereo_fp8.worldstereo.schedule import dmd_sigmas

SIZES = ((32, 48), (48, 32))
CONFIG = WorldStereoConfig(scale_map=SIZES, nframe=5)
ROUNDING = 0.02 if torch.cuda.is_available() else 1e-5  # of the VAE, in BF16 on a GPU


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    for name, parameter in model.named_parameters():  # ComfyUI's layers start unset
        torch.nn.init.ones_(parameter) if name.endswith("gamma") else torch.nn.init.normal_(parameter, std=0.05)
    return comfy.sd.VAE(sd=model.state_dict())


def path(count, width=64, height=40):
    w2c = torch.eye(4).repeat(count, 1, 1)
    w2c[:, 0, 3] = torch.linspace(0, 1, count)
    K = torch.tensor([[50.0, 0, width / 2], [0, 50, height / 2], [0, 0, 1]]).repeat(count, 1, 1)
    return Cameras(w2c, K, width, height)


def inputs(count=5):
    torch.manual_seed(1)
    return {
        "image": torch.rand(1, 40, 64, 3),
        "render": torch.rand(count, 40, 64, 3),
        "mask": torch.rand(count, 40, 64).round(),
        "cameras": path(count),
    }


@pytest.mark.parametrize(
    "height, width, size",
    [
        (480, 832, (480, 832)),
        (512, 768, (512, 784)),
        (768, 1024, (512, 720)),
        (1000, 1000, (640, 640)),
        (1920, 1080, (832, 480)),
    ],
)
def test_the_size_is_the_table_entry_of_the_nearest_ratio(height, width, size):
    assert keyframe_size(WorldStereoConfig(), height, width) == size


def test_what_the_conditioning_holds(vae):
    given = inputs()
    values, latent = condition(CONFIG, vae, **given)
    assert latent.shape == (1, 16, 5, 4, 6) and not latent.any()
    assert values["render_latent"].shape == (1, 16, 5, 4, 6) and values["reference_latent"].shape == (1, 16, 1, 4, 6)
    assert values["render_mask"].shape == (1, 1, 5, 32, 48)
    assert values["camera_qt"].shape == (1, 5, 7) and values["camera_qt_ref"].shape == (1, 1, 7)
    assert torch.equal(values["camera_qt_ref"][:, 0], values["camera_qt"][:, 0])  # the picture alone: camera 0
    assert values["ref_index"].tolist() == [[0]]
    assert values["concat_mask"][0, 0, :, 0, 0].tolist() == [0, 1, 1, 1, 1]
    assert set(values["render_mask"].unique().tolist()) == {0, 1}

    cameras = given["cameras"].scaled_to(48, 32)
    assert torch.equal(values["camera_w2c"][0], normalise(cameras.w2c))
    assert torch.equal(values["camera_K"][0], cameras.K)

    image = resize_pictures(given["image"], 32, 48)
    alone = vae.encode(image)
    first = values["render_latent"][:, :, :1]
    torch.testing.assert_close(first, alone, atol=ROUNDING, rtol=ROUNDING)  # the picture
    torch.testing.assert_close(values["reference_latent"], alone, atol=ROUNDING, rtol=ROUNDING)
    second = vae.encode(resize_pictures(given["render"][1:2], 32, 48, antialias=False))
    torch.testing.assert_close(values["render_latent"][:, :, 1:2], second, atol=ROUNDING, rtol=ROUNDING)


def test_what_may_be_no_intention_is_remarked():
    assert remarks(CONFIG, **inputs() | {"image": torch.rand(1, 32, 48, 3), "mask": torch.zeros(5, 32, 48)}) == [
        "render_video, cameras' picture 64×40 stretched to 48×32: 7% taller"
    ]
    fitting = {
        "image": torch.rand(1, 32, 48, 3),
        "render": torch.rand(5, 64, 96, 3),
        "mask": torch.zeros(5, 32, 48),
        "cameras": path(5, 48, 32),
    }
    assert remarks(CONFIG, **fitting) == []
    square = References(torch.rand(1, 20, 20, 3), path(9)[[3]], (0,))
    assert remarks(CONFIG, **fitting, references=square) == ["reference_images 20×20 stretched to 48×32: 50% wider"]
    inverted = remarks(CONFIG, **fitting | {"mask": torch.ones(5, 32, 48)})
    assert len(inverted) == 1 and inverted[0].startswith("render_mask has holes in 100% of frame 0")
    half = torch.zeros(5, 32, 48)
    half[0, :8] = 0.5
    assert remarks(CONFIG, **fitting | {"mask": half})[-1].startswith("render_mask has holes in 25% of frame 0")
    few = torch.zeros(5, 32, 48)
    few[0, 0, :15] = 1  # less than 1 % of the frame
    assert remarks(CONFIG, **fitting | {"mask": few}) == []
    few[0, 0, :16] = 1
    assert remarks(CONFIG, **fitting | {"mask": few})[-1].startswith("render_mask has holes in 1% of frame 0")
    colours = torch.rand(5, 32, 48)
    colours[0] = 0
    found = remarks(CONFIG, **fitting | {"mask": colours})
    assert len(found) == 1 and "render_mask is not a hole mask: 6" in found[0]


def test_frame_0_has_no_holes_whatever_comes_in(vae):
    values, _ = condition(CONFIG, vae, **(inputs() | {"mask": torch.ones(5, 40, 64)}))
    assert values["render_mask"][0, 0].mean((1, 2)).tolist() == [0, 1, 1, 1, 1]
    kernel = WorldStereoConfig(scale_map=SIZES, nframe=5, mask_downsample=4, camera_mlp_dim=0)
    values, _ = condition(kernel, vae, **(inputs(3) | {"mask": torch.ones(3, 40, 64)}))
    assert values["render_mask"][0, 0].mean((1, 2)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("mode", ["full_vae", "first_frame_only"])
def test_the_condition_latent(mode, vae):
    config = WorldStereoConfig(scale_map=SIZES, nframe=5, latent_cond_mode=mode)
    given = inputs()
    values, _ = condition(config, vae, **given)
    image = resize_pictures(given["image"], 32, 48)
    if mode == "full_vae":
        expected = vae.encode(torch.cat([image, torch.full((16, 32, 48, 3), 0.5)]))
    else:
        grey = vae.encode(torch.full((1, 32, 48, 3), 0.5))
        expected = torch.cat([vae.encode(image), grey, grey, grey, grey], dim=2)
    torch.testing.assert_close(values["concat_latent_image"], expected, atol=ROUNDING, rtol=ROUNDING)


def test_progress_counts_each_picture_that_is_encoded(vae, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, value):
            self.done += value

    for module in (conditioning_module, keyframe_vae):
        monkeypatch.setattr(module, "ProgressBar", Bar)
    condition(CONFIG, vae, **inputs())
    encode_keyframes(vae, torch.rand(3, 32, 48, 3))
    decode_keyframes(vae, torch.zeros(1, 16, 2, 4, 6))
    condition(CONFIG, vae, **inputs(), references=References(torch.rand(2, 8, 8, 3), path(2), (0, 2)))
    full = WorldStereoConfig(scale_map=SIZES, nframe=5, latent_cond_mode="full_vae")
    condition(full, vae, **inputs())
    # The render, whose first frame is the picture, and grey; pictures; latents; with references; and with a grey video.
    totals = [5 + 1, 3, 2, 5 + 2 + 1, 5 + 16]
    assert [(bar.total, bar.done) for bar in bars] == [(total, total) for total in totals]


def test_more_frames_than_keyframes_are_thinned(vae):
    given = inputs(81)
    values, latent = condition(CONFIG, vae, **given)
    assert latent.shape[2] == 5
    kept = [0, 20, 40, 60, 80]
    thinned, _ = condition(
        CONFIG, vae, given["image"], given["render"][kept], given["mask"][kept], given["cameras"][kept]
    )
    assert values.keys() == thinned.keys()
    assert all(torch.equal(values[name], thinned[name]) for name in values)


def test_a_mask_kernel_over_time_sees_every_frame(vae):
    config = WorldStereoConfig(scale_map=SIZES, nframe=5, mask_downsample=4, camera_mlp_dim=0)
    given = inputs(17)
    values, latent = condition(config, vae, **given)
    cameras = given["cameras"].scaled_to(48, 32)
    assert torch.equal(values["camera_w2c"][0], normalise(cameras.w2c))
    assert torch.equal(values["camera_K"][0], cameras.K)
    assert latent.shape[2] == values["render_latent"].shape[2] == 5
    assert values["render_mask"].shape[2] == 17
    assert "ref_index" not in values and "reference_latent" not in values

    few, latent = condition(config, vae, **inputs(3))  # keyframes alone: each stands for itself and those after it
    assert latent.shape[2] == 3 and few["render_mask"].shape[2] == 9
    plain, _ = condition(WorldStereoConfig(scale_map=SIZES, nframe=5), vae, **inputs(3))
    for i in range(9):
        assert torch.equal(few["render_mask"][:, :, i], plain["render_mask"][:, :, i // 4])
        for name in ("camera_w2c", "camera_K"):
            torch.testing.assert_close(few[name][:, i], plain[name][:, i // 4], msg=f"{name}, {i}")


def test_references(vae):
    references = References.of(torch.rand(4, 80, 80, 3), path(9)[[3, 7, 0, 1]], "1, 4, 2, 3")  # as many as there may be
    values, _ = condition(CONFIG, vae, **inputs(), references=references)
    assert values["ref_index"].tolist() == [[0, 3, 1, 2]]  # WorldStereo's: the matched keyframe less 1
    assert values["reference_latent"].shape == (1, 16, 4, 4, 6) and values["camera_qt_ref"].shape == (1, 4, 7)
    expected = encode_keyframes(vae, resize_pictures(references.images, 32, 48, antialias=False))
    assert relative_error(values["reference_latent"], expected) < 0.02
    assert References.of(None, None, "  ") is None
    assert References.of(None, None, "", references) is references  # what a scene has chosen
    with pytest.raises(ValueError, match="references and reference_index are both given"):
        References.of(None, None, "1", references)


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"image": torch.rand(2, 40, 64, 3)}, "image holds 2 pictures"),
        ({"image": torch.rand(1, 0, 64, 3)}, "image is empty"),
        ({"mask": torch.rand(5, 0, 0)}, "render_mask is empty"),
        ({"render": torch.rand(4, 40, 64, 3)}, "render_video 4, render_mask 5, cameras 5"),
        ({"cameras": path(6)}, "render_video 5, render_mask 5, cameras 6"),
        (
            {"references": References(torch.rand(2, 20, 20, 3), path(1), (0, 1))},
            "reference_images 2, reference_cameras 1",
        ),
        (
            {"references": References.of(torch.rand(1, 20, 20, 3), path(1), "5")},
            "reference_index 5 is not a keyframe.*1 to 4",
        ),
        (
            {"references": References.of(torch.rand(2, 20, 20, 3), path(2), "1, 0")},
            "reference_index 0 is not a keyframe.*keyframe 0 is the picture itself",
        ),
        ({"references": References(torch.rand(5, 20, 20, 3), path(5), (0, 1, 2, 3, 3))}, "5 views for 5 keyframes"),
    ],
)
def test_bad_inputs_are_named_before_anything_is_encoded(edit, message, vae, monkeypatch):
    monkeypatch.setattr(vae, "encode", lambda pixels: pytest.fail("encoded before the inputs were checked"))
    with pytest.raises(ValueError, match=message):
        condition(CONFIG, vae, **(inputs() | edit))


@pytest.mark.parametrize(
    "given, message",
    [
        ((torch.rand(1, 8, 8, 3), None, "0"), "reference_cameras missing"),
        ((torch.rand(1, 8, 8, 3), path(1), ""), "reference_index missing"),
        ((torch.rand(1, 8, 8, 3), path(1), "0, x"), "give keyframe numbers separated by commas"),
    ],
)
def test_references_are_given_whole(given, message):
    with pytest.raises(ValueError, match=message):
        References.of(*given)


def test_references_need_a_memory_model(vae):
    config = WorldStereoConfig(model_type="worldstereo-camera", camera_mlp_dim=0, scale_map=SIZES)
    with pytest.raises(ValueError, match="worldstereo-camera takes no reference views"):
        condition(config, vae, **inputs(), references=References(torch.rand(1, 8, 8, 3), path(1), (0,)))


def test_another_vae_is_refused(vae):
    class HunyuanLike:
        """Of the same latent shapes as Wan's."""

        latent_channels, latent_dim, first_stage_model = 16, 3, torch.nn.Identity()

    for use in (
        lambda other: condition(CONFIG, other, **inputs()),
        lambda other: encode_keyframes(other, torch.rand(1, 32, 48, 3)),
        lambda other: decode_keyframes(other, torch.rand(1, 16, 1, 4, 6)),
    ):
        with pytest.raises(ValueError, match="vae is Identity.*needs the Wan 2.1 VAE"):
            use(HunyuanLike())


def test_a_tiny_vae_of_another_model_is_refused():
    def tiny(dtype):
        return comfy.sd.VAE(sd={name: value.to(dtype) for name, value in TAEHV(16).state_dict().items()})

    check_vae(tiny(torch.float32))  # lighttaew2_1
    with pytest.raises(ValueError, match="takes for HunyuanVideo's.*choose wan_2.1_vae.safetensors"):
        check_vae(tiny(torch.float16))


@torch.inference_mode()
def test_keyframes_are_coded_alone_by_a_tiny_vae_too():
    torch.manual_seed(0)
    network = TAEHV(16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    tiny, pictures = comfy.sd.VAE(sd=network.state_dict()), torch.rand(3, 32, 48, 3)
    latent = encode_keyframes(tiny, pictures)
    alone = torch.cat([encode_keyframes(tiny, picture[None]) for picture in pictures], dim=2)
    assert latent.shape == (1, 16, 3, 4, 6) and relative_error(latent, alone) < ROUNDING
    latent = torch.randn(latent.shape)
    frames = decode_keyframes(tiny, latent)
    alone = torch.cat([decode_keyframes(tiny, latent[:, :, number : number + 1]) for number in range(3)])
    assert frames.shape == (3, 32, 48, 3) and relative_error(frames, alone) < ROUNDING
    assert relative_error(alone.roll(1, 0), alone) > 0.05


def test_pictures_in_half_precision():
    """As ComfyUI's --fp16-intermediates gives them."""
    pictures = torch.rand(2, 9, 12, 3)
    for size in ((6, 8), (9, 12)):
        assert (resize_pictures(pictures.half(), *size) - resize_pictures(pictures, *size)).abs().max() < 2e-3


def test_keyframes_are_coded_alone(vae):
    pictures = torch.rand(BATCH + 2, 32, 48, 3)
    latent = encode_keyframes(vae, pictures)
    alone = torch.cat([vae.encode(picture[None]) for picture in pictures], dim=2)
    assert latent.shape == alone.shape == (1, 16, BATCH + 2, 4, 6)
    assert relative_error(latent, alone) < ROUNDING and relative_error(alone.roll(1, 2), alone) > 0.5
    frames = decode_keyframes(vae, latent.repeat(2, 1, 1, 1, 1))
    assert frames.shape == (2 * BATCH + 4, 32, 48, 3)
    alone = torch.cat([vae.decode(latent[:, :, number : number + 1])[0] for number in range(BATCH + 2)])
    assert relative_error(frames, alone.repeat(2, 1, 1, 1)) < ROUNDING and relative_error(alone.roll(1, 0), alone) > 0.1
    assert not vae.not_video  # the VAE itself is as it was
    with pytest.raises(ValueError, match="The latent is"):
        decode_keyframes(vae, torch.rand(1, 16, 4, 6))


def test_few_keyframes_are_coded_at_a_time_and_the_model_is_prepared_rarely(vae, monkeypatch):
    coded, prepared = [], []
    for name in ("encode", "decode"):
        code = getattr(vae.first_stage_model, name)
        monkeypatch.setattr(
            vae.first_stage_model, name, lambda batch, code=code: (coded.append(len(batch)), code(batch))[1]
        )
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management, "load_models_gpu", lambda *a, **k: (prepared.append(len(coded)), load(*a, **k))[1]
    )
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: 1 << 50)
    pieces = [BATCH] * (CALL // BATCH) + [BATCH, 1]
    assert encode_keyframes(vae, torch.zeros(CALL + BATCH + 1, 16, 16, 3)).shape == (1, 16, CALL + BATCH + 1, 2, 2)
    assert coded == pieces and prepared == [0, CALL // BATCH]
    coded.clear(), prepared.clear()
    assert decode_keyframes(vae, torch.zeros(1, 16, CALL + BATCH + 1, 2, 2)).shape == (CALL + BATCH + 1, 16, 16, 3)
    assert coded == pieces and prepared == [0, CALL // BATCH]


@torch.inference_mode()  # as ComfyUI runs nodes
def test_a_picture_too_large_for_the_memory_is_coded_in_tiles(vae, monkeypatch):
    """As ComfyUI does for any VAE."""
    pictures = torch.rand(2, 272, 16, 3)
    latent = encode_keyframes(vae, pictures)
    frames = decode_keyframes(vae, latent)

    def with_little_memory(code, most):
        def coded(batch):
            if batch.shape[-2] > most:
                raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory.")
            return code(batch)

        return coded

    for name, most in (("encode", 256), ("decode", 32)):
        code = getattr(vae.first_stage_model, name)
        monkeypatch.setattr(vae.first_stage_model, name, with_little_memory(code, most))
    assert 1e-4 < relative_error(encode_keyframes(vae, pictures), latent) < 0.3
    assert 1e-4 < relative_error(decode_keyframes(vae, latent), frames) < 0.1


def test_convolutions_of_a_keyframe_are_two_dimensional(vae):
    with Seen() as seen:
        decode_keyframes(vae, encode_keyframes(vae, torch.rand(2, 32, 48, 3)))
    called = set(seen.functions)
    assert torch.conv2d in called and not called & {torch.conv3d, torch.cudnn_convolution}


def test_cores_way_around_a_bug_of_cudnn_is_two_dimensional_too(vae, monkeypatch):
    """With cuDNN 9.10 to 9.14, core calls cuDNN itself, which only a GPU has, and adds the bias afterwards."""
    half = comfy.sd.VAE(sd=vae.first_stage_model.state_dict(), dtype=torch.bfloat16)
    pictures = torch.rand(2, 32, 48, 3)
    expected = encode_keyframes(half, pictures)
    biases = []
    add_bias = channels_last.add_bias
    monkeypatch.setattr(channels_last, "add_bias", lambda x, bias: (biases.append(bias), add_bias(x, bias))[1])
    monkeypatch.setattr(comfy.ops, "NVIDIA_MEMORY_CONV_BUG_WORKAROUND", True)
    found = encode_keyframes(half, pictures)
    assert len(biases) == sum(isinstance(layer, torch.nn.Conv2d) for layer in half.first_stage_model.encoder.modules())
    assert relative_error(found, expected) < 0.04  # on a CPU it rounds before it adds the bias


def layers_of(network):
    """The VAE's norms that a SiLU follows, and those SiLUs."""
    return [
        pair
        for layers in network.modules()
        if isinstance(layers, torch.nn.Sequential)
        for pair in itertools.pairwise(layers)
        if isinstance(pair[0], RMS_norm)
    ]


@torch.inference_mode()
def test_a_norm_and_its_activation_are_one_operation(vae):
    """In half precision too, where ComfyUI's are rounded after each step."""
    network = copy.deepcopy(vae.first_stage_model)
    pairs = layers_of(network)
    norms = [layer for layer in network.modules() if isinstance(layer, RMS_norm)]
    attention = [layer.norm for layer in network.modules() if isinstance(layer, AttentionBlock)]
    assert {id(norm) for norm, _ in pairs} | {id(norm) for norm in attention} == {id(norm) for norm in norms}
    assert all(norm.channel_first and norm.bias is None for norm in norms)  # others would be computed wrongly
    for norm, silu in pairs:
        norm.gamma.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        x = torch.randn(2, len(norm.gamma), 1, 3, 4, generator=torch.Generator().manual_seed(1))
        x[:, :, :, 0, 0] = 0  # a pixel without a length
        for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 0.01)):
            exact, given = silu(norm(x)), x.to(dtype)
            with keyframe_vae.fused_norms(network):
                found = silu(norm(given))
                assert norm(given) is not given and silu(given) is given
            assert found.dtype == dtype and relative_error(found.float(), exact) < error
    assert not any("forward" in vars(layer) for layer in network.modules())


def test_a_replaced_layer_stays_as_it_is(vae):
    network = copy.deepcopy(vae.first_stage_model)
    (norm, silu), *_ = layers_of(network)
    replaced = norm.forward = lambda x: x
    with keyframe_vae.fused_norms(network):
        assert norm.forward is replaced and "forward" not in vars(silu)
    assert norm.forward is replaced


def test_an_error_leaves_the_vae_as_it_was(vae):
    with pytest.raises(ZeroDivisionError), keyframe_vae.fused_norms(vae.first_stage_model):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in vae.first_stage_model.modules())


SIGMAS = [1, 0.9375, 5 / 6, 0.625, 0]


def test_dmd_sigmas():
    torch.testing.assert_close(dmd_sigmas(WorldStereoConfig()), torch.tensor(SIGMAS), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="worldstereo-camera, which was not distilled"):
        dmd_sigmas(WorldStereoConfig(model_type="worldstereo-camera"))


@pytest.mark.parametrize("case", ["camera", "memory"])
def test_unipc_has_the_originals_sigmas(case, tmp_path):
    """BasicScheduler's simple schedule against diffusers' UniPC with flow sigmas, shift 3, in 40 steps."""
    tensors, config = golden_weights("memory_dmd" if case == "memory" else case)
    config |= {"model_type": f"worldstereo-{case}", "gen_shift": 5.0}
    model = load_worldstereo(save(tensors, tmp_path / "m.safetensors", config))
    sigmas = BasicScheduler.execute(model, "simple", 40, 1.0).result[0]
    t = 1 - torch.linspace(1, 1 / 1000, 41, dtype=torch.float64).flip(0)[:-1]
    expected = torch.cat([3 * t / (1 + 2 * t), torch.zeros(1)]).float()
    assert expected[39] == pytest.approx(0.0713, abs=1e-4)  # where KSampler's uni_pc stops at 0.173
    torch.testing.assert_close(sigmas, expected, atol=4e-4, rtol=0)


def test_a_plain_ksampler_takes_the_same_sigmas():
    model = load_worldstereo(GOLDEN / "memory_dmd.weights.safetensors")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    torch.testing.assert_close(sigmas, dmd_sigmas(WorldStereoConfig()), atol=1e-6, rtol=0)


def test_a_mask_of_exactly_one_half_is_a_hole(vae):
    given = inputs() | {"mask": torch.zeros(5, 40, 64)}
    given["mask"][1:], given["mask"][3:] = 0.5, 0.49
    values, _ = condition(CONFIG, vae, **given)
    assert values["render_mask"][0, 0].mean((1, 2)).tolist() == [0, 1, 1, 0, 0]
