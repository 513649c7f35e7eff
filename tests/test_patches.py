"""What other packs do to the MODEL from outside: replaced forwards and blocks, attention overrides."""

import logging
import types

import comfy.ops
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.wan.model import MLPProj, WanModel
from comfy.model_management import get_torch_device
from test_comfyui import CASE, conditioning, load, sample
from toy import GOLDEN, cooked, golden_inputs, golden_weights, relative_error, run, save, source
from worldstereo_fp8 import loaders
from worldstereo_fp8.fp8 import activations, arithmetic
from worldstereo_fp8.fp8.recipe import dequantise
from worldstereo_fp8.worldstereo import blocks, object_patches


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("models"), golden_weights(CASE)[1]
    return {
        "fp8": save(cooked(CASE), folder / "fp8.safetensors", config),
        "bf16": save(source(CASE), folder / "bf16.safetensors", config),
    }


def guided_cross_attention(negative: torch.Tensor, scale: float):
    """Guidance by a negative prompt inside the cross-attention, with the signature KJNodes' WanVideoNAG has."""

    def cross_attention(self, x, context, context_img_len, transformer_options={}, **kwargs):
        def attend(k, v):
            return optimized_attention(q, k, v, heads=self.num_heads, transformer_options=transformer_options)

        image, text = context[:, :context_img_len], context[:, context_img_len:]
        q = self.norm_q(self.q(x))
        positive = attend(self.norm_k(self.k(text)), self.v(text))
        negative_text = negative.expand(len(x), -1, -1)
        away = attend(self.norm_k(self.k(negative_text)), self.v(negative_text))
        picture = attend(self.norm_k_img(self.k_img(image)), self.v_img(image))
        return self.o(scale * positive - (scale - 1) * away + picture)

    return cross_attention


def scaled_self_attention(self, x, freqs, transformer_options={}):
    return 1.5 * type(self).forward(self, x, freqs, transformer_options=transformer_options)


def feed_forward_in_chunks(self, x):
    return torch.cat([torch.nn.Sequential.forward(self, part) for part in x.chunk(2, dim=1)], dim=1) * 0.5


PARTS = ("cross_attn", "self_attn", "ffn")
NEGATIVE = torch.randn(1, 512, 48, generator=torch.Generator().manual_seed(5))


def replacement(part: str, model: WanModel):
    """A forward for that part of the blocks of ComfyUI's Wan or ours."""
    if part == "cross_attn":
        with torch.no_grad():
            return guided_cross_attention(model.text_embedding(NEGATIVE.to(get_torch_device())), scale=4.0)
    return {"self_attn": scaled_self_attention, "ffn": feed_forward_in_chunks}[part]


def patched(patcher, part: str):
    """The MODEL with that part of every block replaced as nodes do it."""
    clone = patcher.clone()
    diffusion_model = clone.get_model_object("diffusion_model")
    function = replacement(part, diffusion_model)
    for i, block in enumerate(diffusion_model.blocks):
        clone.add_object_patch(
            f"diffusion_model.blocks.{i}.{part}.forward", types.MethodType(function, getattr(block, part))
        )
    return clone


def core_model(patcher) -> WanModel:
    """ComfyUI's own Wan with the backbone's weights."""
    ours = patcher.model.diffusion_model
    config = ours.config
    operations = comfy.ops.disable_weight_init
    core = WanModel(
        model_type="i2v",
        in_dim=36,
        dim=config.dim,
        ffn_dim=config.ffn_dim,
        freq_dim=config.freq_dim,
        text_dim=config.text_dim,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        eps=config.eps,
        dtype=torch.float32,
        operations=operations,
    )
    settings = {"operations": operations, "device": None, "dtype": torch.float32}
    core.img_emb = MLPProj(config.image_dim, config.dim, operation_settings=settings)
    weights = {n: weight.float() for n, weight in ours.state_dict().items() if not n.startswith("controlnet.")}
    core.load_state_dict(weights)  # with dynamic VRAM its layers have no weights, and no names, before
    return core.to(patcher.load_device)


class TestReplacedForward:
    @pytest.mark.parametrize("part", [None, *PARTS])
    def test_equals_comfyui_with_the_same_patch(self, part):
        """Without the control branch, a batch of two prompts."""
        inputs, _ = golden_inputs("camera")
        inputs = {
            name: torch.cat([inputs[name], inputs[name].flip(1)])
            for name in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image")
        } | {"timestep": torch.tensor([900.0, 900.0])}
        file = GOLDEN / "camera.weights.safetensors"
        patcher = loaders.load_worldstereo(file, dtype=torch.float32, disable_dynamic=True)  # all weights for core's
        plain = run(patcher, inputs)
        core = core_model(patcher)
        if part:
            function = replacement(part, core)
            for block in core.blocks:
                module = getattr(block, part)
                module.forward = types.MethodType(function, module)
        hidden_states, timestep, text, image = (
            inputs[name].to(patcher.load_device)
            for name in ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
        )
        with torch.no_grad():
            expected = core(hidden_states, timestep, text, clip_fea=image).cpu()
        out = run(patched(patcher, part), inputs) if part else plain
        assert relative_error(out, expected) < 1e-5
        assert (relative_error(out, plain) > 1e-2) == bool(part)

    @pytest.mark.parametrize("kind", ["fp8", "bf16"])
    @pytest.mark.parametrize("part", PARTS)
    def test_comes_and_goes(self, part, kind, files):
        patcher = load(files[kind])
        changed = patched(patcher, part)
        plain, out, after, again = (
            sample(p, conditioning(0), conditioning(1), cfg=3.0) for p in (patcher, changed, patcher, changed)
        )
        assert relative_error(out, plain) > 1e-2
        assert torch.equal(after, plain) and torch.equal(again, out)

    def test_the_prompt_cache_stays_on(self, files, monkeypatch):
        calls = []
        original = blocks.CrossAttention.keys_values
        monkeypatch.setattr(
            blocks.CrossAttention, "keys_values", lambda self, *args: calls.append(self) or original(self, *args)
        )
        for part, expected in (("self_attn", 2), ("ffn", 2), ("cross_attn", 0)):
            calls.clear()
            changed = patched(load(files["bf16"]), part)
            sample(changed, conditioning(0), conditioning(1))
            assert len(calls) == expected  # of two blocks, for four steps; none where the patch has its own
            assert len(changed.model.diffusion_model.prompt_cache.prompts) == 1

    def test_cross_attention_with_keys_of_its_own_needs_their_weights_at_every_step(self, files):
        patcher = load(files["fp8"], disable_dynamic=True)
        plain, feed_forward, cross_attention = (
            loaders.patcher.resident_bytes(p.model, p.object_patches)
            for p in (patcher, patched(patcher, "ffn"), patched(patcher, "cross_attn"))
        )
        assert cross_attention > feed_forward == plain

    def test_gets_ordinary_tokens_where_layers_multiply_in_fp8(self, files, monkeypatch):
        def product(x, weight, scale, bias):
            x = x.dequantise() if isinstance(x, activations.QuantisedTokens) else x
            return torch.nn.functional.linear(x, dequantise(weight, scale, x.dtype), bias)

        patcher = load(files["fp8"], disable_dynamic=True)
        upcast = [sample(patched(patcher, part), conditioning(0), conditioning(1), steps=1) for part in PARTS]
        monkeypatch.setattr(arithmetic, "scaled_linear", product)  # which CPUs do not have with a scale for each token
        monkeypatch.setattr(type(patcher.model.diffusion_model.blocks[0].self_attn.q), "upcast_reason", lambda *_: None)
        for part, expected in zip(PARTS, upcast):
            out = sample(patched(patcher, part), conditioning(0), conditioning(1), steps=1)
            assert 1e-6 < relative_error(out, expected) < 0.05

    def test_what_cannot_be_honoured_is_said_once(self, files, caplog):
        patcher = load(files["fp8"])
        plain = sample(patcher, conditioning(0), conditioning(1), steps=1)
        changed = patched(patcher, "self_attn")
        for i in range(2):
            changed.add_object_patch(f"diffusion_model.blocks.{i}.norm1.forward", lambda x: 0 * x)
        with caplog.at_level(logging.WARNING):
            sample(changed, conditioning(0), conditioning(1), steps=2)
            sample(changed, conditioning(0), conditioning(1), steps=2)
        said = [record.getMessage() for record in caplog.records if "model patch" in record.getMessage()]
        assert len(said) == 2
        assert "blocks.N.norm1.forward (in 2 places)" in said[0] and "no effect" in said[0]
        assert "blocks.N.self_attn.forward" in said[1] and "reference views" in said[1]
        assert torch.equal(sample(patcher, conditioning(0), conditioning(1), steps=1), plain)


def test_which_replacements_are_remarked():
    """Those of layers that are computed together with others, and of self-attention over references; not the others."""
    memory, camera = (
        load(GOLDEN / f"{case}.weights.safetensors").model.diffusion_model for case in ("memory_dmd", "camera")
    )
    for model in (memory, camera):
        assert object_patches.remarks(model) == []
        model.blocks[0].ffn.forward = model.blocks[0].cross_attn.forward = lambda x: x
        assert object_patches.remarks(model) == []
        model.blocks[0].self_attn.forward = lambda x: x
    assert "reference views" in object_patches.remarks(memory)[0] and object_patches.remarks(camera) == []


def test_hooks_count_as_replacements():
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        layer = torch.nn.Linear(2, 2)
        assert not object_patches.forward_is_replaced(layer)
        getattr(layer, register)(lambda *_: None)
        assert object_patches.forward_is_replaced(layer)


def test_compiled_code_sees_what_is_replaced(files):
    """Neither more nor less: else compiled FP8 layers would do without FP8 tokens."""
    block = load(files["fp8"], disable_dynamic=True).model.diffusion_model.blocks[0]

    @torch.compile(backend="eager")
    def seen(x):
        modules = (block.self_attn, block.cross_attn, block.ffn)
        replaced = [object_patches.forward_is_replaced(module) for module in modules]
        return x + sum(2**i for i, value in enumerate([*replaced, block.ffn[0].is_wrapped()]) if value)

    assert seen(torch.zeros(1)) == 0
    for i, module in enumerate((block.self_attn, block.cross_attn, block.ffn, block.ffn[0])):
        module.forward = types.MethodType(lambda self, x: x, module)
        assert seen(torch.zeros(1)) == 2**i
        module.forward = types.MethodType(type(module).forward, module)
    assert seen(torch.zeros(1)) == 0


class TestBlockReplacement:
    @pytest.fixture
    def computed(self, monkeypatch):
        """Blocks whose keys and values were computed."""
        calls = []
        original = blocks.CrossAttention.keys_values
        monkeypatch.setattr(
            blocks.CrossAttention, "keys_values", lambda self, *args: calls.append(self) or original(self, *args)
        )
        return calls

    @pytest.mark.parametrize("cfg, expected", [(1.0, 2), (3.0, 4)])
    def test_keys_and_values_are_computed_once(self, cfg, expected, files, computed):
        """Two blocks, four steps."""
        patcher = load(files["fp8"])
        plain = sample(patcher, conditioning(0), conditioning(1), cfg=cfg)
        computed.clear()
        patcher.model.diffusion_model.prompt_cache.forget()
        replaced = patcher.clone()
        for i in range(2):
            replaced.set_model_patch_replace(
                lambda args, extra: extra["original_block"](args), "dit", "double_block", i
            )
        out = sample(replaced, conditioning(0), conditioning(1), cfg=cfg)
        assert len(computed) == expected and relative_error(out, plain) < 1e-6

    def test_another_text_has_keys_and_values_of_its_own(self, files, computed):
        patcher = load(files["fp8"])
        plain = sample(patcher, conditioning(0), conditioning(1), steps=2)
        computed.clear()
        replaced = patcher.clone()
        replaced.set_model_patch_replace(
            lambda args, extra: extra["original_block"](args | {"txt": args["txt"].flip(1)}), "dit", "double_block", 1
        )
        out = sample(replaced, conditioning(0), conditioning(1), steps=2)
        assert len(computed) == 2 and relative_error(out, plain) > 1e-3


class TestAttentionOverride:
    def calls(self, files, monkeypatch):
        """The attention calls of one step with another's override, spans shorter than the toy's tokens."""
        monkeypatch.setattr(blocks, "CHUNK", 16)
        monkeypatch.setattr(blocks, "UPCAST_QUERIES", 8)
        monkeypatch.setattr(
            blocks,
            "spans",
            lambda length, chunk, first=0: [slice(i, min(i + chunk, length)) for i in range(first, length, chunk)],
        )
        calls = []

        def override(function, q, k, *args, **kwargs):
            calls.append((q.shape[1], k.shape[1], kwargs.get("low_precision_attention", True)))
            return function(q, k, *args, **kwargs)

        patcher = load(files["fp8"])
        plain = sample(patcher, conditioning(0), conditioning(1), steps=1)
        changed = patcher.clone()
        changed.model_options["transformer_options"]["optimized_attention_override"] = override
        assert relative_error(sample(changed, conditioning(0), conditioning(1), steps=1), plain) < 1e-5
        return calls

    def test_gets_whole_tensors(self, files, monkeypatch):
        """60 tokens of references and keyframes, 36 of keyframes; in two blocks each and in two of the control branch."""
        queries = [(q, k) for q, k, _ in self.calls(files, monkeypatch)]
        assert sorted(queries) == sorted(2 * [(60, 60), (36, 36), (36, 512), (36, 257)])

    def test_attention_to_the_picture_asks_for_precision(self, files, monkeypatch):
        for _, keys, low_precision in self.calls(files, monkeypatch):
            assert low_precision == (keys != 257)


def test_without_an_override_too(files, monkeypatch):
    asked = []
    original = blocks.optimized_attention

    def attention(q, k, v, **kwargs):
        asked.append((k.shape[1], kwargs.get("low_precision_attention", True)))
        return original(q, k, v, **kwargs)

    monkeypatch.setattr(blocks, "optimized_attention", attention)
    inputs, _ = golden_inputs("memory_dmd")
    run(load(files["fp8"]), inputs)
    pictures = inputs["encoder_hidden_states_image"].shape[1]
    assert (pictures, False) in asked and all(low == (keys != pictures) for keys, low in asked)
