"""Every form of checkpoint loads to the same model; everything else is a clear error."""

import json
import struct
import types
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_extras import nodes_model_merging
from toy import GOLDEN, comfy_style, cooked, golden_inputs, golden_weights, native, relative_error, run, save, source
from worldstereo_fp8 import loaders, remap
from worldstereo_fp8.fp8.recipe import quantise_weight, scale_name
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.loaders.checkpoint import describe
from worldstereo_fp8.worldstereo.attention import prefer_cudnn
from worldstereo_fp8.worldstereo.config import WorldStereoConfig, config_content, read_config
from worldstereo_fp8.worldstereo.shapes import native_shapes

CASE = "memory_dmd"
CONV = "controlnet.controlnet_mask_embedding.mask_proj.0.weight"
LINEAR = "blocks.0.attn1.to_q.weight"


def with_orphan_scales(tensors: dict) -> dict:
    return tensors | {
        scale_name(name): torch.tensor(0.5, dtype=torch.bfloat16)
        for name, value in tensors.items()
        if value.ndim == 5 and "mask_embedding" in name
    }


def renamed_scales(tensors: dict) -> dict:
    return {name.replace(".scale_weight", ".weight.scale_weight"): value for name, value in tensors.items()}


def prefixed(tensors: dict) -> dict:
    return {f"model.diffusion_model.{name}": value for name, value in tensors.items()}


FORMS = {
    "published": lambda case: cooked(case),
    "scale named after the weight": lambda case: renamed_scales(cooked(case)),
    "convs in BF16": lambda case: cooked(case, convs="bf16"),
    "convs in BF16 with an orphan scale": lambda case: with_orphan_scales(cooked(case, convs="bf16")),
    "native names": lambda case: native(cooked(case)),
    "ComfyUI's FP8": lambda case: comfy_style(cooked(case, convs="bf16")),
    "saved by ComfyUI": lambda case: prefixed(comfy_style(cooked(case, convs="bf16"))),
    "source": source,
    "source with native names": lambda case: native(source(case)),
}


@pytest.mark.parametrize("case", ["memory_dmd", "camera", "camera_maskds4"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(case, form, tmp_path):
    inputs, reference = golden_inputs(case)
    _, config = golden_weights(case)
    path = save(FORMS[form](case), tmp_path / "any name.safetensors", config)
    patcher = load_worldstereo(path)
    model = patcher.model.diffusion_model
    fp8 = sum(isinstance(m.weight, QuantizedTensor) for m in model.modules() if hasattr(m, "weight"))
    assert (fp8 > 0) == ("source" not in form)
    expected = set(native_shapes(model.config))
    assert {name for name in model.state_dict() if not name.endswith(("weight_scale", "comfy_quant"))} == expected
    error = relative_error(run(patcher, inputs), reference)
    assert error < (0.1 if fp8 else 0.01)
    if form not in ("published", "source") and "convs in" not in form and "Comfy" not in form:
        same = save(FORMS["published" if fp8 else "source"](case), tmp_path / "same.safetensors", config)
        assert torch.equal(run(load_worldstereo(same), inputs), run(patcher, inputs))


def test_sizes_and_settings_from_the_file_the_config_and_the_defaults(tmp_path, caplog):
    tensors, config = golden_weights(CASE)
    del config["num_attention_heads"], config["controlnet_cfg"]["num_heads"]
    config["controlnet_cfg"]["num_heads"] = 4
    config |= {"nframe": 9, "scale_map": [[32, 48]], "latent_cond_mode": "first_frame_only", "dmd_steps": 2}
    path = save(tensors, tmp_path / "m.safetensors", config)

    def loaded():
        return load_worldstereo(path).model.diffusion_model.config

    found = loaded()
    assert (found.num_heads, found.control_num_heads, found.nframe) == (2, 4, 9)
    assert (found.scale_map, found.latent_cond_mode, found.dmd_steps) == (((32, 48),), "first_frame_only", 2)
    assert (found.dim, found.ffn_dim, found.num_layers, found.control_num_layers) == (64, 128, 2, 2)

    beside = tmp_path / "config.json"
    beside.write_text(json.dumps(config | {"nframe": 5, "model_type": "worldstereo-memory"}))
    assert (loaded().nframe, loaded().model_type, loaded().shift) == (5, "worldstereo-memory", 3.0)
    assert "is used (worldstereo-memory), but m.safetensors says that it is worldstereo-memory-dmd" in caplog.text
    beside.write_text(json.dumps(config | {"model_type": "worldstereo-memory", "gen_shift": 7.0}))
    assert load_worldstereo(path).get_model_object("model_sampling").shift == 3.0  # gen_shift is the DMD's alone
    beside.write_text(json.dumps(config | {"gen_shift": 7.0}))
    assert load_worldstereo(path).get_model_object("model_sampling").shift == 7.0
    beside.write_text(json.dumps({"model_type": "flux"}))
    assert loaded().nframe == 9
    beside.write_bytes(json.dumps({"model_type": "flux"}).encode("utf-16"))
    assert loaded().nframe == 9
    beside.write_text('{"model_type": "worldstereo-memory",')
    with pytest.raises(ValueError, match="config.json is not JSON"):
        loaded()
    beside.write_text(json.dumps(config | {"model_type": "worldstereo-camera"}))  # another file's, by its tensors
    assert loaded().nframe == 9
    beside.unlink()

    caplog.clear()
    caplog.set_level("INFO")
    defaults = load_worldstereo(save(tensors, path, {"attention_head_dim": 32, "controlnet_cfg": {"num_heads": 2}}))
    assert defaults.model.diffusion_model.config.nframe == WorldStereoConfig.nframe
    assert defaults.model.diffusion_model.config.model_type == "worldstereo-memory-dmd"
    assumed = (
        "model_type worldstereo-memory-dmd, nframe 21, scale_map 13 sizes from 832×480 to 480×832, latent_cond_mode "
        "first_frame_only, update_ref true, gen_shift 5, dmd_steps 4, dmd_start_steps 250, dmd_end_steps 1000. The"
    )
    assert f"No config.json gives these settings of m.safetensors, so they are assumed: {assumed}" in caplog.text


@pytest.mark.parametrize(
    "bad",
    [
        {"nframe": 0},
        {"scale_map": [[480]]},
        {"scale_map": [[100, 768]]},
        {"gen_shift": "x"},
        {"latent_cond_mode": "other"},
        {"model_type": "worldstereo-camera"},
        {"controlnet_cfg": {"num_heads": 5}},
        {"controlnet_cfg": {"dim": 99}},
        {"attention_head_dim": 0},
        {"attention_head_dim": "32"},
    ],
)
def test_a_config_that_does_not_fit(bad, tmp_path):
    tensors, config = golden_weights(CASE)
    key = list(bad.get("controlnet_cfg", bad))[0]
    path = save(tensors, tmp_path / "m.safetensors", config | bad)
    with pytest.raises(ValueError, match=rf"m\.safetensors: its own config does not fit.*{key}"):
        load_worldstereo(path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of memory maps")
def test_weights_stay_memory_mapped(tmp_path):
    path = save(cooked(CASE), tmp_path / "m.safetensors", golden_weights(CASE)[1])
    model = load_worldstereo(path).model.diffusion_model
    starts = {p._qdata.data_ptr() if isinstance(p, QuantizedTensor) else p.data_ptr() for p in model.parameters()}
    maps = [line.split()[0].split("-") for line in open("/proc/self/maps") if str(path) in line]
    mapped = sum(any(int(low, 16) <= start < int(high, 16) for low, high in maps) for start in starts)
    dequantised_convs = 2
    assert mapped == len(starts) - dequantised_convs


class TestOverlay:
    def split(self):
        tensors, config = golden_weights(CASE)
        config.pop("model_type")
        overlay = {
            k: v for k, v in tensors.items() if k.startswith(("controlnet.", "camera_embedding.", "blocks.1.attn1."))
        }
        return tensors, overlay, config

    def test_needs_its_base(self, tmp_path):
        _, overlay, config = self.split()
        with pytest.raises(
            ValueError, match=r"o\.safetensors is an overlay: it lacks backbone tensors \(patch_embedding.*base_model"
        ):
            load_worldstereo(save(overlay, tmp_path / "o.safetensors", config))

    def test_a_few_missing_backbone_tensors_are_an_overlay_too(self, tmp_path):
        tensors, _, config = self.split()
        del tensors[LINEAR]
        with pytest.raises(ValueError, match=r"lacks backbone tensors \(blocks\.0\.self_attn\.q\.weight\)"):
            load_worldstereo(save(tensors, tmp_path / "o.safetensors", config))

    @pytest.mark.parametrize("naming", [lambda t: t, native])
    def test_with_its_base_is_the_whole_model(self, naming, tmp_path):
        tensors, overlay, config = self.split()
        base = naming({k: v for k, v in tensors.items() if not k.startswith(("controlnet.", "camera_embedding."))})
        name = naming({"blocks.1.attn1.to_q.weight": None}).popitem()[0]
        base[name] = torch.zeros_like(base[name])  # the overlay's own wins
        inputs, reference = golden_inputs(CASE)
        patcher = load_worldstereo(
            save(overlay, tmp_path / "o.safetensors", config), base=save(base, tmp_path / "b.safetensors")
        )
        assert relative_error(run(patcher, inputs), reference) < 1e-5

    def test_the_base_is_a_plain_wan(self, tmp_path):
        tensors, overlay, config = self.split()
        path = save(overlay, tmp_path / "o.safetensors", config)
        with pytest.raises(ValueError, match="base_model whole.safetensors is a WorldStereo checkpoint"):
            load_worldstereo(path, base=save(tensors, tmp_path / "whole.safetensors"))
        with pytest.raises(ValueError, match=r"base_model b\.safetensors lacks time_embedding"):
            load_worldstereo(
                path,
                base=save(
                    {k: v for k, v in tensors.items() if k.startswith(("blocks.", "patch_"))},
                    tmp_path / "b.safetensors",
                ),
            )


def change(name, value):
    return lambda tensors: tensors | {name: value}


def drop(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


SCALE = scale_name(LINEAR)


@pytest.mark.parametrize(
    "edit, message",
    [
        (change(SCALE, torch.tensor(float("nan"), dtype=torch.bfloat16)), rf"{SCALE} is nan"),
        (change(SCALE, torch.tensor(0.0, dtype=torch.bfloat16)), rf"{SCALE} is 0\.0"),
        (change(SCALE, torch.tensor(-1.0, dtype=torch.bfloat16)), rf"{SCALE} is -1\.0"),
        (change(SCALE, torch.ones(64, dtype=torch.bfloat16)), rf"{SCALE} is BF16 \[64\]"),
        (drop(SCALE), rf"{LINEAR} is FP8 but has no scale"),
        (change("blocks.0.attn1.to_q.weight.scale_weight", torch.tensor(1.0)), "two scales for blocks.0.self_attn.q"),
        (change("blocks.0.self_attn.q.weight", torch.ones(64, 64)), "blocks.0.self_attn.q.weight twice"),
        (drop("blocks.1.norm2.weight"), r"lacks backbone tensors \(blocks\.1\.norm3\.weight\)"),
        (drop("controlnet.proj_out.1.bias"), r"lacks 1 tensors: controlnet\.proj_out\.1\.bias"),
        (change("blocks.0.extra.weight", torch.ones(2)), "belong to no WorldStereo model: blocks.0.extra.weight"),
        (change("blocks.1.norm2.weight", torch.ones(63)), r"blocks\.1\.norm2\.weight is \[63\], expected \[64\]"),
        (change("blocks.1.norm2.weight", torch.ones(64, dtype=torch.int32)), r"blocks\.1\.norm2\.weight is I32"),
        (change("blocks.1.norm2.weight", quantise_weight(torch.ones(64))[0]), r"blocks\.1\.norm2\.weight is F8_E4M3"),
        (change(LINEAR, torch.ones(64, 64).to(torch.float8_e5m2)), rf"{LINEAR} is F8_E5M2"),
        (change(LINEAR, torch.ones(64, 64)), rf"{SCALE} scales {LINEAR}, which is F32"),
        (change("blocks.0.attn1.to_q.scale_bias", torch.ones(1)), "belong to no WorldStereo model"),
        (
            change("blocks.999999999.norm2.weight", torch.ones(64)),
            "belong to no WorldStereo model: blocks.999999999.norm2.weight",
        ),
    ],
)
def test_a_damaged_checkpoint(edit, message, tmp_path):
    path = save(edit(cooked(CASE)), tmp_path / "broken.safetensors", golden_weights(CASE)[1])
    with pytest.raises(ValueError, match=rf"broken\.safetensors.*{message}"):
        load_worldstereo(path)


@pytest.mark.parametrize(
    "quant, message", [(b"{", "is not JSON that can be read"), (b'{"format": "nvfp4"}', "format is nvfp4")]
)
def test_other_quantised_formats(quant, message, tmp_path):
    tensors = comfy_style(cooked(CASE, convs="bf16"))
    tensors["blocks.0.self_attn.q.comfy_quant"] = torch.tensor(list(quant), dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"blocks\.0\.self_attn\.q\.comfy_quant.*{message}"):
        load_worldstereo(save(tensors, tmp_path / "m.safetensors", golden_weights(CASE)[1]))


@pytest.mark.parametrize(
    "names, message",
    [
        (["blocks.0.self_attn.q.lora_A.weight"], "a LoRA"),
        (["decoder.middle.0.residual.0.gamma"], "a Wan VAE"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
        (["vision_model.encoder.layers.0.mlp.fc1.weight"], "a CLIP vision model"),
        (["double_blocks.0.img_attn.qkv.weight"], "a Flux"),
        (["something.else"], "an unknown kind of file"),
        (["blocks.0.self_attn.q.weight", "img_emb.proj.1.weight"], "no WorldStereo control branch"),
        (["blocks.0.self_attn.q.weight"], "no WorldStereo control branch"),
        ([], "not a WorldStereo checkpoint"),
    ],
)
def test_another_model(names, message, tmp_path):
    path = save({name: torch.ones(1) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"other\.safetensors.*{message}"):
        load_worldstereo(path)


class TestNotSafetensors:
    def write(self, tmp_path, content: bytes):
        path = tmp_path / "file.safetensors"
        path.write_bytes(content)
        return path

    def whole(self):
        return (GOLDEN / f"{CASE}.weights.safetensors").read_bytes()

    @pytest.mark.parametrize(
        "length, message",
        [(0, "header length"), (5, "header length"), (4000, "cut short"), (-1, "cut short"), (-100_000, "cut short")],
    )
    def test_truncated(self, length, message, tmp_path):
        with pytest.raises(ValueError, match=rf"file\.safetensors.*{message}"):
            load_worldstereo(self.write(tmp_path, self.whole()[:length]))

    def test_too_long(self, tmp_path):
        with pytest.raises(ValueError, match="damaged"):
            load_worldstereo(self.write(tmp_path, self.whole() + b"\0"))

    def test_pickle(self, tmp_path):
        torch.save({"weight": torch.ones(1)}, tmp_path / "file.safetensors")
        with pytest.raises(ValueError, match="is a pickle"):
            load_worldstereo(tmp_path / "file.safetensors")

    @pytest.mark.parametrize(
        "header, message",
        [
            (b"not json at all", "not JSON"),
            (b'{"\xff": 1}', "not JSON"),
            (b"[1, 2]", "broken safetensors header"),
            (b'{"a": {"dtype": "F32"}}', "broken safetensors header"),
            (b'{"a": 1, "a": 2}', "holds a twice"),
            (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "broken safetensors header"),
            (b'{"__metadata__": {"config": 1}}', "broken safetensors header"),
            (b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 0]}}', "broken safetensors header"),
            (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 0]}}', "the bytes of a are not as many"),
            (b'{"a": {"dtype": "BF16", "shape": [-1, 0], "data_offsets": [0, 0]}}', "a has the shape"),
            (b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 0]}}', "a has the dtype"),
            (b'{"a": {"dtype": "F4", "shape": [0], "data_offsets": [-4, 0]}}', "a has the data_offsets"),
        ],
    )
    def test_broken_header(self, header, message, tmp_path):
        with pytest.raises(ValueError, match=rf"file\.safetensors.*{message}"):
            load_worldstereo(self.write(tmp_path, struct.pack("<Q", len(header)) + header))

    def test_header_of_another_kind_of_file(self, tmp_path):
        for content, message in ((b"<!DOCTYPE html><html>" * 10, "is a web page"), (b"GGUF\x03" * 20, "header length")):
            with pytest.raises(ValueError, match=message):
                load_worldstereo(self.write(tmp_path, content))


def test_wans_own_models_are_recognised():
    names = ["blocks.0.self_attn.q.weight", "patch_embedding.weight"]
    assert describe(names).startswith("a plain Wan text-to-video model")
    assert describe([*names, "img_emb.proj.1.weight"]).startswith("a plain Wan2.1-I2V model without WorldStereo's")
    assert describe([*names, "controlnet.proj_in.weight"]).startswith("an unknown kind of file")


def test_a_description_of_another_format_than_the_weights(tmp_path):
    tensors = comfy_style(cooked(CASE, convs="bf16"))
    name = next(name for name in tensors if name.endswith("comfy_quant"))
    tensors[name] = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    with pytest.raises(ValueError, match="weight is F8_E4M3, but .*comfy_quant says int8_tensorwise"):
        load_worldstereo(save(tensors, tmp_path / "m.safetensors"))


@pytest.mark.parametrize("save_node", ["ModelSave", "CheckpointSave"])
@pytest.mark.parametrize("fp8", [True, False])
def test_what_core_saves_loads_again_as_what_it_was(save_node, fp8, tmp_path, monkeypatch):
    """Every setting, not only those of the shapes; and the same result. A checkpoint brings its VAE along."""
    tensors, config = golden_weights(CASE)
    config |= {
        "model_type": "worldstereo-memory", "nframe": 9, "scale_map": [[32, 48], [48, 32]], "gen_shift": 3.0,
        "latent_cond_mode": "first_frame_only", "negative_prompt": "ünscharf", "dmd_steps": 3, "eps": 2e-6,
    }  # fmt: skip
    config["controlnet_cfg"] |= {"num_heads": 4, "update_ref": False}
    loaded = load_worldstereo(save(cooked(CASE) if fp8 else tensors, tmp_path / "m.safetensors", config))
    node = getattr(nodes_model_merging, save_node)()
    node.output_dir = str(tmp_path / "output")
    (tmp_path / "output").mkdir()
    others = {}
    if save_node == "CheckpointSave":
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models: None)
        part = types.SimpleNamespace(
            get_sd=lambda: {"decoder.x": torch.ones(1)},
            load_model=lambda: None,
            state_dict_for_saving=lambda: {"text.x": torch.ones(1)},
        )
        others = {"vae": part, "clip": part}
    node.save(loaded, filename_prefix="saved", **others)
    saved = load_worldstereo(next((tmp_path / "output").iterdir()))
    assert saved.model.diffusion_model.config == loaded.model.diffusion_model.config
    assert saved.model.diffusion_model.config.negative_prompt == "ünscharf"
    inputs, _ = golden_inputs(CASE)
    assert torch.equal(run(saved, inputs), run(loaded, inputs))


@pytest.mark.parametrize("case", ["memory_dmd", "camera", "camera_maskds4"])
def test_a_configuration_written_out_is_read_as_itself(case):
    tensors, config = golden_weights(case)
    shapes = {remap.to_native(name): tuple(value.shape) for name, value in tensors.items()}
    found = read_config(shapes, config)
    assert read_config(shapes, json.loads(json.dumps(config_content(found)))) == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU does not have")
@pytest.mark.parametrize("form", [cooked, source])
def test_fp8_needs_a_device_that_has_it(form, tmp_path):
    path = save(form(CASE), tmp_path / "m.safetensors", golden_weights(CASE)[1])
    with pytest.raises(ValueError, match="compute is fp8, but cpu has no FP8 matmul.*Choose compute auto or bf16"):
        load_worldstereo(path, compute="fp8")
    with pytest.raises(ValueError, match="expected one of auto, fp8, bf16"):
        load_worldstereo(path, compute="int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU does not have")
def test_one_log_line_says_what_was_chosen_and_why(tmp_path, caplog):
    path = save(cooked(CASE), tmp_path / "m.safetensors", golden_weights(CASE)[1])
    with caplog.at_level("INFO"):
        load_worldstereo(path)
    lines = [record.message for record in caplog.records if record.message.startswith("m.safetensors")]
    assert len(lines) == 1
    assert "worldstereo-memory-dmd" in lines[0] and "upcast" in lines[0] and "cpu has no FP8 matmul" in lines[0]
    assert "activations float32" in lines[0]  # core's choice for a CPU
    assert "VRAM" not in caplog.text  # a CPU has none


@pytest.mark.parametrize("free, streamed", [(4e9, False), (4e9 - 1, True), (3e9, True)])
def test_the_memory_line_tells_of_streaming_only_where_less_is_free_than_needed(monkeypatch, free, streamed):
    class Model:
        def memory_required(self, latent, references):
            assert latent[0] == 1 and references["reference_latent"][0][2] == loaders.REFERENCES
            return 1e9

    monkeypatch.setattr(loaders, "resident_bytes", lambda model: 3e9)
    monkeypatch.setattr(loaders, "get_free_memory", lambda device: free)
    line = loaders._memory(Model(), WorldStereoConfig(), "cuda")
    assert "takes about 4.0 GB" in line and f"{free / 1e9:.1f} GB are free" in line
    assert ("will be streamed" in line) == streamed
    if free == 3e9:
        assert "About 1.0 GB" in line


def test_the_memory_line_names_references_only_where_the_model_takes_them(monkeypatch):
    monkeypatch.setattr(loaders, "resident_bytes", lambda model: 3e9)
    monkeypatch.setattr(loaders, "get_free_memory", lambda device: 4e9)
    model = types.SimpleNamespace(memory_required=lambda latent, references: 2e9 if references else 1e9)
    config = WorldStereoConfig(model_type="worldstereo-camera", camera_mlp_dim=0)
    assert loaders._memory(model, config, "cuda").startswith("At 832×480 a step takes about 4.0 GB")
    assert loaders._memory(model, WorldStereoConfig(), "cuda").startswith(
        "At 832×480 with 8 references a step takes about 5.0"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_have_the_dtype_asked_for(dtype, tmp_path):
    path = save(cooked(CASE), tmp_path / "m.safetensors", golden_weights(CASE)[1])
    assert load_worldstereo(path, dtype=dtype).model.get_dtype_inference() == dtype


@pytest.mark.parametrize("faster", [True, False])
def test_cudnns_attention_is_set_where_it_is_faster(faster, monkeypatch):
    monkeypatch.setattr(loaders, "cudnn_is_faster", lambda device: faster)
    options = load_worldstereo(GOLDEN / f"{CASE}.weights.safetensors").model_options["transformer_options"]
    assert options.get("optimized_attention_override") is (prefer_cudnn if faster else None)


def test_the_log_says_how_many_layers_multiply_and_with_what(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(loaders, "get_torch_device_name", lambda device: "card")
    monkeypatch.setattr(loaders, "product_kernel", lambda device, dtype: ("triton", ""))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    layers = [types.SimpleNamespace(upcast_reason=lambda device, reason=reason: reason) for reason in (None, "17 wide")]
    for reason, because in (("Triton is missing", " because Triton is missing"), ("", "")):
        monkeypatch.setattr(loaders, "backend", lambda device: ("kitchen", reason))
        assert loaders._multiplied("FP8", layers, cuda) == (
            f"FP8 matmul on 1 of 2 FP8 layers (card), activations quantised by kitchen{because}, upcast on 1 (17 wide)"
        )
    int8 = "INT8 matmul on 1 of 1 INT8 layers (card)"
    assert loaders._multiplied("INT8", layers[:1], cuda) == f"{int8}, products by triton"
    assert loaders._multiplied("INT8", layers[:1], cpu) == int8
