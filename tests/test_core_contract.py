"""What we rely on in ComfyUI beyond its node API: that the names are there, with the signatures and layouts we use."""

import ast
import importlib
import inspect
from pathlib import Path

import comfy.sd
import pytest
import torch
from test_comfyui import conditioning, sample
from test_rooms import imports_of
from toy import GOLDEN
from worldstereo_fp8 import core
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.loaders.patcher import WorldStereoPatcher, WorldStereoPatcherDynamic
from worldstereo_fp8.nodes import THEMES
from worldstereo_fp8.worldstereo import blocks, comfy_model, model, preview

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("files", "remap", "fp8", "scene", "worldstereo", "loaders", "comfy_nodes")
NODE_API = ("comfy_api", "folder_paths", "node_helpers", "comfy_kitchen")

# The parameters that we pass, by name or in this order.
SIGNATURES = {
    "cast_bias_weight": ("s", "input", "dtype", "device", "bias_dtype", "offloadable", "compute_dtype", "want_requant"),
    "uncast_bias_weight": ("s", "weight", "bias", "offload_stream"),
    "mixed_precision_ops": ("quant_config", "compute_dtype"),
    "run_every_op": (),
    "cast_to": ("weight", "dtype", "device"),
    "unet_manual_cast": ("weight_dtype", "inference_device", "supported_dtypes"),
    "convert_tensor": ("extra", "dtype", "device"),
    "optimized_attention": ("heads",),
    "attention_pytorch": ("heads", "mask"),
    "sinusoidal_embedding_1d": ("dim", "position"),
    "get_key_weight": ("model", "key"),
    "get_attr": ("obj", "attr"),
    "set_attr": ("obj", "attr", "value"),
    "set_attr_param": ("obj", "attr", "value"),
    "load_torch_file": ("ckpt",),
    "get_torch_device": (),
    "get_torch_device_name": ("device",),
    "free_memory": ("memory_required", "device"),
    "should_use_fp16": ("device",),
    "get_free_memory": ("dev",),
    "dtype_size": ("dtype",),
    "is_device_cpu": ("device",),
    "supports_fp8_compute": ("device",),
    "unet_offload_device": (),
    "pytorch_attention_flash_attention": (),
    "xformers_enabled": (),
    "throw_exception_if_processing_interrupted": (),
    "QuantizedTensor": ("qdata", "layout_cls", "params"),
    "EmbedND": ("dim", "theta", "axes_dim"),
    "MLPProj": ("in_dim", "out_dim", "operation_settings"),
    "WanSelfAttention": ("dim", "num_heads", "eps", "operation_settings"),
    "WanI2VCrossAttention": ("dim", "num_heads", "eps", "operation_settings"),
    "ModelPatcher": ("model", "load_device", "offload_device"),
    "ModelPatcherDynamic": ("model", "load_device", "offload_device"),
    "CoreModelPatcher": ("model", "load_device", "offload_device"),
    "CONDRegular": ("cond",),
    "WAN21": ("model_config", "model_type", "image_to_video", "device"),
    "WAN21_I2V": ("unet_config",),
    "Latent2RGBPreviewer": ("latent_rgb_factors", "latent_rgb_factors_bias", "latent_rgb_factors_reshape"),
    "ProgressBar": ("total",),
    "turbo": ("x",),
}
# The attributes that we read or call.
MEMBERS = {
    "CallbacksMP": ("ON_PRE_RUN", "ON_CLEANUP", "ON_DETACH"),
    "WrappersMP": ("OUTER_SAMPLE",),
    "ModelType": ("FLOW",),
    "LatentPreviewMethod": ("NoPreviews",),
    "args": ("preview_method",),
    "lora": ("model_lora_keys_unet",),
    "ModelPatcher": ("add_callback", "add_wrapper", "use_ejected"),
    "WanModel": ("rope_encode", "unpatchify"),
    "WAN21": ("process_latent_in", "get_dtype_inference"),
    "Latent2RGBPreviewer": ("decode_latent_to_preview_image",),
    "ProgressBar": ("update", "update_absolute"),
    "GraphBuilder": ("node", "finalize"),
    "PromptServer": ("send_progress_text",),
    "QuantizedTensor": ("dequantize",),
}
# What we override: a class of ours, the core class under it, and the methods.
OVERRIDES = [
    (WorldStereoPatcher, "ModelPatcher", ("_load_list", "load", "model_state_dict", "patch_weight_to_device",
     "patch_hook_weight_to_device", "patch_cached_hook_weights", "unpatch_hooks")),
    (WorldStereoPatcherDynamic, "ModelPatcherDynamic", ("_load_list", "clone", "model_state_dict",
     "patch_weight_to_device")),
    (comfy_model.WorldStereo, "WAN21", ("_apply_model", "extra_conds", "extra_conds_shapes", "memory_required",
     "resize_cond_for_context_window")),
    (comfy_model.OnDevice, "CONDRegular", ("concat",)),
    (comfy_model.OfReferences, "CONDRegular", ("concat", "_copy_with")),
    (comfy_model.WorldStereoModelConfig, "WAN21_I2V", ("get_model", "process_unet_state_dict_for_saving",
     "latent_format", "supported_inference_dtypes")),
    (model.WorldStereoModel, "WanModel", ("_forward",)),
    (blocks.Block, "WanAttentionBlock", ("forward",)),
    (blocks.SelfAttention, "WanSelfAttention", ()),
    (blocks.CrossAttention, "WanI2VCrossAttention", ()),
    (preview.KeyframeLatents, "Wan21", ("latent_rgb_factors_reshape",)),
]  # fmt: skip
# Those that one step of sampling with a LoRA and one save call; the others' tests: hook LoRAs in test_comfyui.py,
# context windows in test_context_windows.py, the preview in test_preview.py, dynamic VRAM in test_dynamic_vram.py.
CALLED = {
    WorldStereoPatcher: ("_load_list", "load", "model_state_dict", "patch_weight_to_device"),
    comfy_model.WorldStereo: ("_apply_model", "extra_conds", "extra_conds_shapes", "memory_required"),
    comfy_model.OnDevice: ("concat",),
    comfy_model.WorldStereoModelConfig: ("get_model", "process_unet_state_dict_for_saving"),
    model.WorldStereoModel: ("_forward",),
    blocks.Block: ("forward",),
}


@pytest.mark.parametrize("name", core.NAMES)
def test_every_declared_name_is_there_and_says_what_for(name):
    assert getattr(core, name) is not None
    assert len(core.NAMES[name][1]) > 10


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    function = getattr(core, name)
    parameters = inspect.signature(getattr(function, "__wrapped__", function)).parameters
    for wanted in SIGNATURES[name]:
        assert wanted in parameters, f"{name} takes {list(parameters)}"


@pytest.mark.parametrize("name", MEMBERS)
def test_members(name):
    for member in MEMBERS[name]:
        assert hasattr(getattr(core, name), member), f"core's {name} has no {member}"


@pytest.mark.parametrize("ours, name, methods", OVERRIDES, ids=[ours.__name__ for ours, _, _ in OVERRIDES])
def test_what_we_override_is_there_and_listed(ours, name, methods):
    base = getattr(core, name)
    assert issubclass(ours, base)
    for method in methods:
        assert hasattr(base, method), f"core's {name} has no {method}"
    of_pack = [cls for cls in ours.__mro__ if cls.__module__.startswith("worldstereo_fp8")]
    defined = {member for cls in of_pack for member in vars(cls) if not member.startswith("__")}
    assert {member for member in defined if hasattr(base, member)} == set(methods)


def test_core_calls_what_we_override(monkeypatch):
    called = set()

    def record(cls, name):
        method = getattr(cls, name)

        def wrapper(self, *args, **kwargs):
            called.add((cls, name))
            return method(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, wrapper)

    for cls, names in CALLED.items():
        for name in names:
            record(cls, name)
    patcher = load_worldstereo(GOLDEN / "memory_dmd.weights.safetensors", disable_dynamic=True).clone()
    key = "diffusion_model.blocks.0.ffn.0.weight"
    patcher.add_patches({key: ("diff", (torch.ones_like(patcher.model.diffusion_model.blocks[0].ffn[0].weight),))})
    sample(patcher, conditioning(1), conditioning(2), steps=1, cfg=2.0)
    patcher.get_key_patches()
    patcher.model.state_dict_for_saving(patcher.model.diffusion_model.state_dict())
    assert called == {(cls, name) for cls, names in CALLED.items() for name in names}


def test_layouts_of_what_core_returns():
    patcher = load_worldstereo(GOLDEN / "camera.weights.safetensors", disable_dynamic=True)
    layer = patcher.model.diffusion_model.blocks[0].ffn[0]
    weight, set_function, convert_function = core.get_key_weight(patcher.model, "diffusion_model.blocks.0.ffn.0.weight")
    assert weight is layer.weight and callable(set_function) and callable(convert_function)
    x = torch.zeros(1, 4)
    fetched, bias, stream = core.cast_bias_weight(layer, x, offloadable=True)
    assert fetched.shape == layer.weight.shape and bias.shape == layer.bias.shape
    core.uncast_bias_weight(layer, fetched, bias, stream)


def test_the_load_lists_layout_and_that_ours_is_asked():
    patcher = load_worldstereo(GOLDEN / "camera.weights.safetensors", disable_dynamic=True)
    for entry in patcher._load_list():
        offload_bytes, nbytes, name, module, parameters = entry
        assert isinstance(nbytes, int) and isinstance(name, str) and isinstance(module, torch.nn.Module)
        assert offload_bytes == -1 or (offload_bytes >= 0 and set(parameters) <= set(dict(module.named_parameters())))
    assert {entry[0] for entry in patcher._load_list() if entry[-3].endswith("cross_attn.k")} == {-1}
    ordered = patcher._load_list(for_dynamic=True)
    assert {entry[0] for entry in ordered if entry[-3].endswith("cross_attn.k")} == {2}
    assert {entry[0] for entry in ordered if entry[-3].endswith("self_attn.k")} <= {False, True}
    asked = []
    patcher._load_list = lambda *args, **kwargs: asked.append(args) or []
    patcher.load(torch.device("cpu"))
    assert asked


def test_no_other_file_reaches_into_comfyui():
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    modules = [node.module]
                for module in modules:
                    top = module.split(".")[0]
                    known = top in NODE_API or top not in ("comfy", "comfy_execution", "comfy_extras", "server", "nodes",
                                                           "execution", "latent_preview")  # fmt: skip
                    assert known, f"{file.relative_to(ROOT)} imports {module}: take it from core.py"


def test_every_declared_name_is_used():
    text = "\n".join(file.read_text("utf-8") for room in ROOMS for file in (ROOT / room).rglob("*.py"))
    for name in core.NAMES:
        assert name in text, f"{name} is declared and not used"


@pytest.mark.parametrize("name", core.NAMES)
def test_a_name_that_is_gone_is_reported(name, monkeypatch):
    module, reason = core.NAMES[name]
    monkeypatch.setitem(core.NAMES, name, (module, reason))
    monkeypatch.setitem(core.NAMES, "gone", (module, reason))
    with pytest.raises(
        core.MissingFromCore, match=rf"This ComfyUI \(.*\) has no {module}\.gone, which WorldStereo FP8"
    ):
        core.gone  # noqa: B018


ONE_BY_ONE = """
import asyncio, importlib, os, sys, types
server = types.ModuleType("server")
server.PromptServer = types.SimpleNamespace(instance=None)
sys.modules["server"] = server
import comfy_execution.graph_utils, latent_preview, folder_paths, node_helpers, comfy_api.latest
from worldstereo_fp8 import core, nodes  # and with it what the pack imports of others
nodes.available()
for name in core.NAMES:
    getattr(core, name)
for loaded in [m for m in sys.modules if m.startswith("worldstereo_fp8.") and m != "worldstereo_fp8.core"]:
    del sys.modules[loaded]
for name, (module, _) in core.NAMES.items():
    child = os.fork()
    if not child:
        found = importlib.import_module(module)
        if hasattr(found, name):
            delattr(found, name)
        sys.modules[f"{module}.{name}"] = None  # a submodule that cannot be imported either
        extension = importlib.import_module("worldstereo_fp8.nodes").WorldStereoExtension()
        nodes = asyncio.run(extension.get_node_list())
        print("RESULT", name, len(nodes), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_without_each_name_in_turn_the_other_nodes_load(forker):
    printed = forker.run(ONE_BY_ONE)
    counts = {line.split()[1]: int(line.split()[2]) for line in printed.splitlines() if line.startswith("RESULT")}
    assert set(counts) == set(core.NAMES), printed[-2000:]
    whole = len(_all_nodes())
    for name, count in counts.items():
        assert count < whole, f"nothing missed {name}"
        message = f"has no {core.NAMES[name][0]}.{name}, which WorldStereo FP8 needs for: {core.NAMES[name][1]}"
        assert message in printed, name
    needed = {theme: needs(f"comfy_nodes.{theme}") for theme in THEMES}
    for name, count in counts.items():
        themes = [theme for theme in THEMES if name not in needed[theme]]
        assert count == sum(len(nodes_of(theme)) for theme in themes), f"{name} should leave the nodes of {themes}"
    assert counts["GraphBuilder"] > whole / 2 and counts["turbo"] > 0


def test_the_attributes_of_a_vae():
    """Of those that are read, and not_video, which is set for a batch of pictures."""
    made, encode = inspect.getsource(comfy.sd.VAE.__init__), inspect.getsource(comfy.sd.VAE.encode)
    assert all(f"self.{name} = " in made for name in ("device", "first_stage_model", "latent_channels", "not_video"))
    assert "if not self.not_video:" in encode


def needs(module: str, seen: set | None = None) -> set[str]:
    """The names of core that a module of the pack and everything it imports need."""
    seen = set() if seen is None else seen
    if module in seen:
        return set()
    seen.add(module)
    file = ROOT.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    if not file.is_file():  # a folder without an __init__.py
        return set()
    package = file.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level and node.module and node.module.endswith("core"):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "core":
            names.add(node.attr)
    for other in imports_of(file):
        if other != "core":
            names |= needs(other, seen)
    return names | (needs(".".join(package), seen) if package and file.name != "__init__.py" else set())


def nodes_of(theme: str) -> list:
    return importlib.import_module(f"worldstereo_fp8.comfy_nodes.{theme}").NODES


def _all_nodes() -> list:
    from worldstereo_fp8.nodes import available

    return available()
