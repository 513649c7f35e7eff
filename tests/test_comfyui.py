"""The MODEL in ComfyUI's hands: sampling, CFG, LoRA, offload, model patches, interrupt."""

import comfy.hooks
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_torch_compile import TorchCompileModel
from safetensors.torch import load_file
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from toy import GOLDEN, cooked, forward, golden_inputs, golden_weights, relative_error, run, save, source
from worldstereo_fp8 import core, loaders, remap
from worldstereo_fp8.fp8.arithmetic import FP8_MATMUL
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.scene.cameras import normalise
from worldstereo_fp8.worldstereo import blocks, comfy_model, control, model
from worldstereo_fp8.worldstereo import prompt_cache as prompt_cache_module

CASE = "memory_dmd"


def load(path, **options):
    """In FP32 and with upcast weights, so that the same computation gives the same numbers on a GPU too."""
    return load_worldstereo(path, compute="bf16", dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = golden_weights(CASE)[1]
    return {
        "fp8": save(cooked(CASE), folder / "fp8.safetensors", config),
        "bf16": save(source(CASE), folder / "bf16.safetensors", config),
    }


def conditioning(seed: int, **changes):
    """A CONDITIONING with all that WorldStereo Conditioning puts there."""
    inputs, _ = golden_inputs(CASE)
    torch.manual_seed(seed)

    class Vision:
        penultimate_hidden_states = inputs["encoder_hidden_states_image"]

    values = {
        "concat_latent_image": torch.randn(1, 16, 3, 6, 8),
        "concat_mask": torch.ones(1, 1, 3, 6, 8),
        "clip_vision_output": Vision,
        "render_latent": torch.randn(1, 16, 3, 6, 8),
        "render_mask": inputs["render_mask"],
        "camera_embedding": inputs["camera_embedding"],
        "reference_latent": torch.randn(1, 16, 2, 6, 8),
        "ref_index": inputs["ref_index"][None],
        "camera_qt": inputs["camera_qt"],
        "camera_qt_ref": inputs["camera_qt_ref"],
    }
    values = {name: value for name, value in (values | changes).items() if value is not None}
    return [[torch.randn(1, 512, 48), values]]


def sample(patcher, positive, negative, cfg=1.0, batch=1, steps=4, **kwargs):
    latent = torch.zeros(batch, 16, 3, 6, 8)
    torch.manual_seed(7)
    noise = torch.randn(1, 16, 3, 6, 8).repeat(batch, 1, 1, 1, 1)
    return comfy.sample.sample(
        patcher, noise, steps, cfg, "euler", "simple", positive, negative, latent, seed=7, disable_pbar=True, **kwargs
    )


def by_hand(patcher, positive):
    """Four Euler steps written out: x += (sigma_next − sigma)·v, from noise at sigma 1."""
    model = patcher.model
    cond = positive[0][1]
    latents = {
        k: model.process_latent_in(cond[k]) for k in ("concat_latent_image", "render_latent", "reference_latent")
    }
    torch.manual_seed(7)
    x = torch.randn(1, 16, 3, 6, 8)
    mask = (1 - cond["concat_mask"]).repeat(1, 4, 1, 1, 1)
    reference = latents["reference_latent"]
    extra = {k: cond[k] for k in ("render_mask", "camera_embedding", "ref_index", "camera_qt", "camera_qt_ref")}
    sigmas = [1, 0.9375, 5 / 6, 0.625, 0]
    for sigma, following in zip(sigmas, sigmas[1:]):
        v = run(
            patcher,
            extra
            | {
                "hidden_states": torch.cat([x, mask, latents["concat_latent_image"]], dim=1),
                "timestep": torch.tensor([1000.0 * sigma]),
                "encoder_hidden_states": positive[0][0],
                "encoder_hidden_states_image": cond["clip_vision_output"].penultimate_hidden_states,
                "render_latent": latents["render_latent"],
                "reference_latent": torch.cat([reference, torch.ones_like(reference[:, :4]), reference], dim=1),
            },
        )
        x = x + (following - sigma) * v
    return model.process_latent_out(x)


def test_ksampler_takes_the_originals_steps(files):
    patcher = load(files["fp8"])
    positive = conditioning(0)
    assert relative_error(sample(patcher, positive, conditioning(1)), by_hand(patcher, positive)) < 1e-5


def test_cameras_take_the_place_of_the_rays_that_they_give(files, monkeypatch):
    """In the form that WorldStereo Conditioning gives them; the rays are made once for positive and negative."""
    golden, made = load_file(GOLDEN / f"{CASE}.io.safetensors"), []
    plucker = comfy_model.plucker
    monkeypatch.setattr(comfy_model, "plucker", lambda *given: (made.append(given), plucker(*given))[1])
    cameras = {"camera_w2c": normalise(golden["cam.w2c"])[None], "camera_K": golden["cam.K"][None]}
    patcher, positive = load(files["fp8"]), conditioning(0, camera_embedding=None, **cameras)
    negative = conditioning(1, camera_embedding=None, **cameras)
    assert relative_error(sample(patcher, positive, negative), by_hand(patcher, conditioning(0))) < 1e-5
    assert len(made) == 1


def test_cfg_is_the_two_conditionings_each_alone(files):
    assert_cfg(load(files["fp8"]), conditioning(0), conditioning(1))


def assert_cfg(patcher, positive, negative):
    alone = [sample(patcher, c, c, steps=1) for c in (positive, negative)]
    together = sample(patcher, positive, negative, cfg=5.0, steps=1)
    out = [patcher.model.process_latent_in(x) for x in (*alone, together)]
    assert relative_error(out[0], out[1]) > 1e-3
    assert relative_error(out[2], out[1] + 5 * (out[0] - out[1])) < 1e-4


def test_conditionings_of_different_kinds_go_together(files):
    """A negative without references and render is another shape of input; core runs it on its own."""
    patcher = load(files["fp8"])
    bare = conditioning(
        1,
        reference_latent=None,
        ref_index=None,
        camera_qt_ref=None,
        render_latent=None,
        render_mask=None,
        camera_embedding=None,
    )
    assert_cfg(patcher, conditioning(0), bare)


def test_a_batch_samples_what_each_alone_samples(files):
    patcher = load(files["fp8"])
    positive = conditioning(0)
    out = sample(patcher, positive, positive, batch=2)
    assert relative_error(out[:1], sample(patcher, positive, positive)) < 1e-5
    assert relative_error(out[1:], out[:1]) < 1e-5


def test_a_latent_of_another_size_is_an_error(files):
    patcher = load(files["fp8"])
    with pytest.raises(ValueError, match=r"latent to sample is \(3, 6, 8\).*conditioning was made for \(3, 4, 8\)"):
        sample(patcher, conditioning(0, render_latent=torch.randn(1, 16, 3, 4, 8)), conditioning(1))


class TestPromptCache:
    """What is kept of the prompt and the timesteps: computed once, and never the wrong one."""

    @pytest.fixture
    def computed(self, monkeypatch):
        """Counts how often a block's keys and values, and a control block's modulations, are computed."""
        counts = {"prompt": 0, "time": 0}

        def counted(cls, method, name):
            original = getattr(cls, method)

            def call(*args):
                counts[name] += 1
                return original(*args)

            monkeypatch.setattr(cls, method, call)

        counted(blocks.CrossAttention, "keys_values", "prompt")
        counted(control.ControlBlock, "modulation", "time")
        return counts

    def test_once_a_prompt_and_once_for_all_timesteps(self, files, computed):
        patcher = load(files["fp8"])
        first = sample(patcher, conditioning(0), conditioning(1))
        assert computed == {"prompt": 2, "time": 2}  # of 2 blocks each, for 4 steps
        assert torch.equal(sample(patcher, conditioning(0), conditioning(1)), first)
        assert torch.equal(sample(patcher.clone(), conditioning(0), conditioning(1)), first)
        assert computed == {"prompt": 2, "time": 2}
        sample(patcher, conditioning(2), conditioning(1), steps=3)
        assert computed == {"prompt": 4, "time": 4}

    @pytest.mark.parametrize("cfg, batch", [(1.0, 1), (5.0, 1), (5.0, 2)])
    def test_the_same_without(self, cfg, batch, files, computed):
        outputs = []
        for prompt_cache in (True, False):
            patcher = load(files["fp8"], prompt_cache=prompt_cache)
            several = conditioning(0) + conditioning(2)  # two prompts at once, as Conditioning (Combine) makes
            outputs += [sample(patcher, c, conditioning(1), cfg=cfg, batch=batch) for c in (conditioning(0), several)]
        assert relative_error(outputs[0], outputs[2]) < 1e-6 and relative_error(outputs[1], outputs[3]) < 1e-6
        assert relative_error(outputs[0], outputs[1]) > 1e-3

    def test_another_picture_is_another_prompt(self, files):
        class Vision:
            penultimate_hidden_states = torch.randn(1, 257, 32)

        patcher = load(files["fp8"])
        outputs = [
            sample(patcher, conditioning(0, clip_vision_output=vision), conditioning(1))
            for vision in (conditioning(0)[0][1]["clip_vision_output"], Vision, None)
        ]
        assert all(relative_error(a, b) > 1e-3 for a, b in zip(outputs, outputs[1:] + outputs[:1]))

    def test_a_lora_on_keys_and_values_comes_and_goes(self, files):
        file, _ = lora(
            "native",
            (
                "blocks.0.cross_attn.k",
                "blocks.1.cross_attn.v_img",
                "text_embedding.2",
                "controlnet.controlnet_blocks.0.norm1.linear",
            ),
        )
        outputs = {}
        for prompt_cache in (True, False):
            patcher = load(files["bf16"], prompt_cache=prompt_cache)
            patched, _ = comfy.sd.load_lora_for_models(patcher, None, file, 1.0, 1.0)
            stronger, _ = comfy.sd.load_lora_for_models(patcher, None, file, 2.0, 2.0)
            outputs[prompt_cache] = [
                sample(p, conditioning(0), conditioning(1)) for p in (patcher, patched, stronger, patcher, patched)
            ]
        for with_cache, without in zip(outputs[True], outputs[False]):
            assert relative_error(with_cache, without) < 1e-6
        plain, once, twice, *_ = outputs[True]
        assert relative_error(once, plain) > 1e-3 and relative_error(twice, once) > 1e-3

    def test_freed_with_the_model(self, files, computed):
        patcher = load(files["fp8"])
        first = sample(patcher, conditioning(0), conditioning(1))
        comfy.model_management.unload_all_models()
        kept = patcher.model.diffusion_model.prompt_cache
        assert not kept.prompts and not kept.times
        assert torch.equal(sample(patcher, conditioning(0), conditioning(1)), first)
        assert computed == {"prompt": 4, "time": 4}

    def test_a_bypass_lora_comes_and_goes(self, files):
        """Core's bypass LoRAs change no weight: they stand in for the layers' `forward`."""
        layers = (
            "blocks.0.self_attn.q",
            "blocks.1.ffn.2",
            "blocks.0.cross_attn.k",
            "text_embedding.2",
            "controlnet.proj_out.0",
        )
        file, _ = lora("native", layers)
        patcher = load(files["bf16"])
        bypass, _ = comfy.sd.load_bypass_lora_for_models(patcher, None, file, 1.0, 1.0)
        ordinary, _ = comfy.sd.load_lora_for_models(patcher, None, file, 1.0, 1.0)
        outputs = [sample(p, conditioning(0), conditioning(1)) for p in (patcher, bypass, patcher, ordinary, bypass)]
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[4])
        assert relative_error(outputs[1], outputs[0]) > 0.1 and relative_error(outputs[1], outputs[3]) < 0.02

    def test_nothing_is_kept_of_a_patched_module(self, files):
        patcher = load(files["bf16"])
        plain = sample(patcher, conditioning(0), conditioning(1))

        class Squashed(torch.nn.Sequential):  # the layers keep their names, which core's dynamic VRAM wants
            def forward(self, text):
                return super().forward(text).tanh()

        patched = patcher.clone()
        patched.add_object_patch(
            "diffusion_model.text_embedding", Squashed(*patcher.model.diffusion_model.text_embedding)
        )
        assert relative_error(sample(patched, conditioning(0), conditioning(1)), plain) > 1e-3
        assert torch.equal(sample(patcher, conditioning(0), conditioning(1)), plain)

    def test_between_runs_prompts_wait_on_the_offload_device(self, files, monkeypatch):
        moved = []
        monkeypatch.setattr(prompt_cache_module.Prompt, "to", lambda self, device: moved.append(device) or self)
        patcher = load(files["fp8"])
        sample(patcher, conditioning(0), conditioning(1), cfg=5.0, steps=2)
        assert moved == 2 * [patcher.offload_device]
        sample(patcher, conditioning(0), conditioning(1), cfg=5.0, steps=2)
        assert len(moved) == 2  # the copies that were made are still there

    def test_more_timesteps_than_are_kept(self, files, monkeypatch, computed):
        monkeypatch.setattr(prompt_cache_module, "KEPT_TIMESTEPS", 3)
        patcher = load(files["fp8"])
        first = sample(patcher, conditioning(0), conditioning(1), steps=5)
        assert computed["time"] == 2 * 5 and len(patcher.model.diffusion_model.prompt_cache.times) == 1
        monkeypatch.setattr(prompt_cache_module, "KEPT_TIMESTEPS", 5)
        assert relative_error(sample(patcher, conditioning(0), conditioning(1), steps=5), first) < 1e-6

    def test_a_prompt_no_longer_used_is_forgotten(self, files):
        patcher = load(files["fp8"])
        for seed in range(4):
            sample(patcher, conditioning(seed), conditioning(9), steps=1)
            assert len(patcher.model.diffusion_model.prompt_cache.prompts) == 1  # this run's

    def test_a_prompt_of_the_same_call_is_not_computed_again(self, files, computed):
        """CFG: the negative stays while another positive comes; core gives both in one batch."""
        patcher = load(files["fp8"])
        for positive, expected in ((0, 4), (2, 6), (0, 8)):
            sample(patcher, conditioning(positive), conditioning(1), cfg=5.0, steps=2)
            assert computed["prompt"] == expected

    def test_nothing_is_kept_of_a_call_from_outside(self, files):
        patcher = load(files["fp8"])
        run(patcher, golden_inputs(CASE)[0])
        assert not patcher.model.diffusion_model.prompt_cache.prompts


LAYERS = ("blocks.0.self_attn.q", "blocks.1.ffn.2", "blocks.0.cross_attn.k_img", "controlnet.proj_out.0")


def lora(naming: str, layers=LAYERS) -> tuple[dict, dict]:
    """A LoRA file of rank 4 in one of the usual namings, and the difference it makes to each layer."""
    file, differences = {}, {}
    torch.manual_seed(3)
    for layer in layers:
        shape = golden_weights(CASE)[0][remap.to_diffusers(f"{layer}.weight")].shape
        down, up = 0.3 * torch.randn(4, shape[1]), 0.3 * torch.randn(shape[0], 4)
        differences[f"{layer}.weight"] = up @ down
        diffusers = remap.to_diffusers(f"{layer}.weight").removesuffix(".weight")
        name, ends = {
            "kohya": ("lora_unet_" + layer.replace(".", "_"), ("lora_down", "lora_up")),
            "kohya, diffusers layers": ("lora_unet_" + diffusers.replace(".", "_"), ("lora_down", "lora_up")),
            "lycoris": ("lycoris_" + diffusers.replace(".", "_"), ("lora_down", "lora_up")),
            "native": (f"diffusion_model.{layer}", ("lora_A", "lora_B")),
            "diffusers": (f"transformer.{diffusers}", ("lora_A", "lora_B")),
        }[naming]
        file |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
    return file, differences


def test_a_lora_on_a_model_with_modules_of_others(files):
    """Names that are no WorldStereo's, such as those of a compiled block, are no LoRA's either."""
    patcher = load(files["bf16"])
    patcher.model.diffusion_model.extra = torch.nn.Linear(4, 4)
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora("diffusers")[0], 1.0, 1.0)
    assert len(patched.patches) == len(LAYERS)


@pytest.mark.parametrize("naming", ["kohya", "kohya, diffusers layers", "lycoris", "native", "diffusers"])
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_lora(naming, kind, files, tmp_path):
    """Against the same differences added to the file's weights."""
    file, differences = lora(naming)
    patcher = load(files[kind])
    plain = sample(patcher, conditioning(0), conditioning(1))
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, file, 1.0, 1.0)
    assert set(patched.patches) == {f"diffusion_model.{name}" for name in differences}
    out = sample(patched, conditioning(0), conditioning(1))

    merged = {name: value.float() for name, value in source(CASE).items()}
    for name, difference in differences.items():
        merged[remap.to_diffusers(name)] += difference
    path = save(merged, tmp_path / "merged.safetensors", golden_weights(CASE)[1])
    expected = sample(load(path), conditioning(0), conditioning(1))
    assert relative_error(plain, expected) > 0.2
    assert relative_error(out, expected) < (0.06 if kind == "fp8" else 0.02)

    comfy.model_management.unload_all_models()
    assert torch.equal(sample(patcher, conditioning(0), conditioning(1)), plain)  # and it comes off again


def test_partly_offloaded_with_a_lora_is_the_same(files):
    """Weights left in RAM get their LoRA while they are streamed; that path must not differ from the resident one."""
    file, _ = lora("kohya")
    patched, _ = comfy.sd.load_lora_for_models(load(files["fp8"], disable_dynamic=True), None, file, 1.0, 1.0)
    comfy.model_management.unload_all_models()
    patched.load(patched.load_device, lowvram_model_memory=1)  # all but one byte stays offloaded
    assert patched.model.model_lowvram
    try:
        inputs, _ = golden_inputs(CASE)
        streamed = forward(patched, inputs)
        patched.unpatch_model(torch.device("cpu"))
        patched.load(patched.load_device, full_load=True)
        assert not patched.model.model_lowvram
        assert relative_error(streamed, forward(patched, inputs)) < 0.05  # one rounding of the LoRA's layers to FP8
    finally:
        patched.unpatch_model(torch.device("cpu"))


def test_where_not_all_fits_what_the_prompt_cache_replaces_stays_in_ram(files, monkeypatch):
    """Their layers, and no others, when there is room for the others; and no more is loaded than that."""
    monkeypatch.setattr(loaders.patcher, "ROOM_TO_STREAM", 20_000)  # in proportion to the toy's layers
    patcher = load(files["fp8"], disable_dynamic=True)
    resident = loaders.patcher.resident_bytes(patcher.model)
    assert resident < 0.8 * patcher.model_size()
    patcher.load(patcher.load_device, lowvram_model_memory=patcher.model_size() - 1)
    try:
        assert patcher.model.model_lowvram
        offloaded = {
            name
            for name, module in patcher.model.named_modules()
            if hasattr(module, "prev_comfy_cast_weights") and module.weight is not None
        }
        cached = {
            name
            for name, module in patcher.model.named_modules()
            if name.endswith(loaders.patcher.CACHED) and hasattr(module, "comfy_cast_weights")
        }
        assert offloaded <= cached and len(offloaded) > 0.8 * len(cached)
        assert patcher.loaded_size() <= resident + 20_000
    finally:
        patcher.unpatch_model(torch.device("cpu"))


def test_without_the_prompt_cache_every_weight_counts(files):
    patcher = load(files["fp8"], prompt_cache=False, disable_dynamic=True)
    assert loaders.patcher.resident_bytes(patcher.model) == sum(p.nbytes for p in patcher.model.parameters())
    names = [entry[-3] for entry in sorted(patcher._load_list(), key=lambda entry: entry[:2], reverse=True)]
    assert not names[-1].endswith(loaders.patcher.CACHED)


def test_model_patches_see_the_tokens(files):
    patcher = load(files["fp8"])
    plain = sample(patcher, conditioning(0), conditioning(1), steps=1)
    seen = []

    def after_block(args):
        seen.append((args["block_index"], args["img"].shape[1], args["img_offset"]))
        return args

    def replace(args, extra):
        out = extra["original_block"](args)
        return {"img": out["img"] * 1.0}

    patched = patcher.clone()
    patched.set_model_patch(after_block, "double_block")
    patched.set_model_patch_replace(replace, "dit", "double_block", 1)
    assert relative_error(sample(patched, conditioning(0), conditioning(1), steps=1), plain) < 1e-6
    assert seen == [(0, 60, 24), (1, 60, 24)]  # 2 references and 3 frames of 3×4 tokens

    skipping = patcher.clone()
    skipping.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", 1)
    assert relative_error(sample(skipping, conditioning(0), conditioning(1), steps=1), plain) > 1e-3


def test_what_a_patch_keeps_is_not_overwritten(files):
    patcher = load(files["fp8"])
    kept = []

    def keep(name):
        def patch(args):
            kept.append((args[name], args[name].clone()))
            return args if name == "img" else args[name]

        return patch

    patched = patcher.clone()
    patched.set_model_patch(keep("img"), "double_block")
    patched.set_model_patch(keep("x"), "attn2_patch")
    patched.set_model_patch(keep("x"), "attn1_patch")
    out = sample(patched, conditioning(0), conditioning(1), steps=1)
    assert relative_error(out, sample(patcher, conditioning(0), conditioning(1), steps=1)) < 1e-6
    assert len(kept) == 6 and all(torch.equal(seen, then) for seen, then in kept)


def test_an_attention_override_serves_backbone_and_control_branch(files):
    patcher = load(files["fp8"])
    plain = sample(patcher, conditioning(0), conditioning(1), steps=1)
    calls = []

    def override(function, *args, **kwargs):
        assert kwargs["transformer_options"]["block_index"] in (0, 1)
        calls.append(args[0].shape[1])
        return function(*args, **kwargs)

    patched = patcher.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert relative_error(sample(patched, conditioning(0), conditioning(1), steps=1), plain) < 1e-6
    assert calls.count(60) == 2 and calls.count(36) == 6  # self-attention; text, picture and control branch


def test_hook_loras_on_the_bf16_source(files):
    file, _ = lora("native", ("blocks.0.cross_attn.k", "text_embedding.2", "blocks.0.self_attn.q"))
    hooked = comfy.hooks.set_hooks_for_conditioning(conditioning(0), comfy.hooks.create_hook_lora(file, 1.0, 1.0))
    patcher = load(files["bf16"])
    patched, _ = comfy.sd.load_lora_for_models(load(files["bf16"]), None, file, 1.0, 1.0)
    before, out, after = (sample(patcher, c, conditioning(1)) for c in (conditioning(0), hooked, conditioning(0)))
    assert relative_error(out, before) > 1e-2 and torch.equal(after, before)
    rounding = 1e-3 if torch.cuda.is_available() else 1e-5  # a BF16 weight with a LoRA is rounded differently there
    assert relative_error(out, sample(patched, conditioning(0), conditioning(1))) < rounding


def test_interrupt(files):
    patcher = load(files["fp8"])
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patcher, conditioning(0), conditioning(1))
    assert sample(patcher, conditioning(0), conditioning(1)).isfinite().all()  # and the next run works


def test_model_sampling_sd3_changes_the_shift(files):
    patched = ModelSamplingSD3().patch(load(files["fp8"]), shift=3.0)[0]
    sigmas = comfy.samplers.calculate_sigmas(patched.get_model_object("model_sampling"), "simple", 4)
    torch.testing.assert_close(sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]), atol=1e-6, rtol=1e-5)


def test_torch_compile(files, monkeypatch):
    """With the backend that only traces: what is held here is that the graph can be captured, and that there is one for
    all blocks of a kind, not its speed."""
    patcher = load(files["fp8"], disable_dynamic=True)  # as the node has it
    monkeypatch.setattr(blocks, "optimized_attention", attention_pytorch)  # core's for CPUs cannot be traced
    plain = sample(patcher, conditioning(0), conditioning(1), steps=2)
    torch._dynamo.reset()
    compiled = TorchCompileModel.execute(patcher, "eager").result[0]
    assert relative_error(sample(compiled, conditioning(0), conditioning(1), steps=2), plain) < 1e-5
    diffusion_model = patcher.model.diffusion_model
    assert len(diffusion_model.blocks) > 1 and len(diffusion_model.controlnet.controlnet_blocks) > 1
    for function in (blocks.Block.forward, control.add_control):
        assert len(_debug_get_cache_entry_list(function.__code__)) == 1


@pytest.mark.parametrize("kind", ["patch", "override"])
def test_torch_compile_with_what_looks_at_the_blocks_number(kind, files, monkeypatch):
    monkeypatch.setattr(blocks, "optimized_attention", attention_pytorch)
    patcher = load(files["fp8"], disable_dynamic=True)

    def strength(transformer_options):
        return 3.0 if transformer_options["block_index"] == 1 else 1.0

    changed = patcher.clone()
    if kind == "patch":
        changed.set_model_patch(lambda values: values["x"] * strength(values["transformer_options"]), "attn1_patch")
    else:
        changed.model_options["transformer_options"]["optimized_attention_override"] = (
            lambda function, *args, **kwargs: function(*args, **kwargs) * strength(kwargs["transformer_options"])
        )
    torch._dynamo.reset()
    compiled, compiled_plain = (TorchCompileModel.execute(p, "eager").result[0] for p in (changed, patcher))
    plain, eager, out_plain, out = (
        sample(p, conditioning(0), conditioning(1), steps=1) for p in (patcher, changed, compiled_plain, compiled)
    )
    assert relative_error(eager, plain) > 1e-2
    assert relative_error(out_plain, plain) < 1e-5 and relative_error(out, eager) < 1e-5


def test_saved_by_core_it_loads_again(files, tmp_path):
    patcher = load(files["fp8"], disable_dynamic=True)
    plain = sample(patcher, conditioning(0), conditioning(1))
    config = golden_weights(CASE)[1]
    state = patcher.model.state_dict_for_saving(patcher.model.diffusion_model.state_dict())
    again = load(save(state, tmp_path / "saved.safetensors", config), disable_dynamic=True)
    assert relative_error(sample(again, conditioning(0), conditioning(1)), plain) < 1e-6


def test_the_memory_estimate(files, monkeypatch):
    """What it counts, at the toy's sizes; what it should come to is measured on a GPU."""
    monkeypatch.setattr(comfy_model, "pytorch_attention_flash_attention", lambda: True)
    patcher = load(files["fp8"])
    required, shape = patcher.model.memory_required, (1, 16, 3, 6, 8)
    alone, references = required(shape), {"reference_latent": [(1, 16, 2, 6, 8)]}
    assert required(shape, references) > alone and required((2, *shape[1:])) > alone
    shape, references = (1, 16, 21, 60, 96), {"reference_latent": [(1, 16, 8, 60, 96)]}
    upcast = required(shape, references)
    monkeypatch.setattr(type(patcher.model.diffusion_model.blocks[0].self_attn.q), "arithmetic", lambda *_: FP8_MATMUL)
    assert required(shape, references) < upcast  # tokens in FP8 take less


@pytest.mark.parametrize("model_type, whole", [("worldstereo-memory", True), ("worldstereo-memory-dmd", False)])
@pytest.mark.parametrize("prompt_cache", [True, False])
def test_what_is_not_distilled_is_sampled_at_whole_timesteps(model_type, whole, prompt_cache, tmp_path, monkeypatch):
    weights, config = golden_weights(CASE)
    patcher = load(
        save(weights, tmp_path / "m.safetensors", config | {"model_type": model_type}), prompt_cache=prompt_cache
    )
    seen = []
    embedding = model.sinusoidal_embedding_1d
    monkeypatch.setattr(model, "sinusoidal_embedding_1d", lambda dim, t: seen.extend(t.tolist()) or embedding(dim, t))
    sample(patcher, conditioning(0), conditioning(1))
    assert len(set(seen)) == 4
    assert all(t == int(t) for t in seen) == whole


def test_the_memory_estimate_term_by_term(files, monkeypatch):
    """Bytes in FP32 with upcast weights, from the toy's sizes: 3 frames of 3x4 tokens, 2 references, a second sample."""
    monkeypatch.setattr(comfy_model, "pytorch_attention_flash_attention", lambda: True)
    model = load(files["fp8"]).model
    monkeypatch.setattr(type(model.diffusion_model.blocks[0].self_attn.q), "arithmetic", lambda *_: comfy_model.UPCAST)
    monkeypatch.setattr(type(model), "get_dtype_inference", lambda *_: torch.float32)
    config, shape = model.diffusion_model.config, (1, 16, 3, 6, 8)
    dim, control, layers = config.dim, config.control_dim, config.num_layers
    rope = 8 * (dim // config.num_heads + control // config.control_num_heads)
    alone, second = model.memory_required(shape), model.memory_required((2, *shape[1:]))
    pixels = comfy_model.MASK_CAM_CHANNELS * 3 * config.mask_downsample * 64 * 6 * 8
    prompt = 2 * layers * (512 + 257) * dim
    assert second - alone == 4 * (36 * dim + 36 * control + pixels + prompt)
    references = {"reference_latent": [(1, 16, 1, 6, 8), (1, 16, 2, 6, 8)]}  # the most that a sample has
    assert model.memory_required(shape, references) - alone == 24 * (3 * dim * 4 + rope) + 24 * dim * 4
    fixed = comfy_model.WORKSPACE + (2 * comfy_model.UPCAST_QUERIES * dim + dim**2) * 4
    assert alone == fixed + 36 * (3 * dim * 4 + rope) + (second - alone)


def test_lora_names_are_registered_once():
    wrapped = core.lora.model_lora_keys_unet
    loaders.lora.register()
    assert core.lora.model_lora_keys_unet is wrapped


def test_a_kept_prompt_moves_as_a_whole():
    keys = prompt_cache_module.KeysValues(torch.ones(1, 2, 4), torch.ones(1, 2, 4), None, None)
    moved = prompt_cache_module.Prompt(torch.ones(1, 2, 4), [keys, None]).to(torch.device("meta"))
    assert moved.context.device.type == moved.blocks[0].k.device.type == moved.blocks[0].v.device.type == "meta"
    assert moved.blocks[0].k_img is None and moved.blocks[1] is None


def test_a_condition_alone_in_its_batch_is_not_copied():
    condition = comfy_model.OnDevice(torch.randn(1, 3))
    assert condition.concat([]) is condition.cond
    assert condition.concat([comfy_model.OnDevice(torch.ones(1, 3))]).shape == (2, 3)
