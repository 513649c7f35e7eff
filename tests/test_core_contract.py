"""What we rely on in ComfyUI beyond its node API: that the names are there, with the signatures and layouts we use."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import GOLDEN
from worldstereo_fp8 import core
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.loaders.patcher import WorldStereoPatcher, WorldStereoPatcherDynamic
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
    "load_torch_file": ("ckpt",),
}
# What we override: a class of ours, the core class under it, and the methods.
OVERRIDES = [
    (WorldStereoPatcher, "ModelPatcher", ("_load_list", "load", "clone", "model_state_dict", "patch_weight_to_device",
     "patch_hook_weight_to_device", "patch_cached_hook_weights", "unpatch_hooks")),
    (WorldStereoPatcherDynamic, "ModelPatcherDynamic", ("_load_list", "clone")),
    (comfy_model.WorldStereo, "WAN21", ("_apply_model", "extra_conds", "extra_conds_shapes", "memory_required")),
    (comfy_model.OnDevice, "CONDRegular", ("concat",)),
    (comfy_model.WorldStereoModelConfig, "WAN21_I2V", ("get_model",)),
    (model.WorldStereoModel, "WanModel", ("_forward", "rope_encode", "unpatchify")),
    (blocks.Block, "WanAttentionBlock", ("forward",)),
    (preview.KeyframeLatents, "Wan21", ("latent_rgb_factors_reshape",)),
]  # fmt: skip


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


@pytest.mark.parametrize("ours, name, methods", OVERRIDES, ids=[ours.__name__ for ours, _, _ in OVERRIDES])
def test_what_we_override_is_there(ours, name, methods):
    base = getattr(core, name)
    assert issubclass(ours, base)
    for method in methods:
        assert hasattr(base, method), f"core's {name} has no {method}"


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
def test_a_name_that_is_gone_is_told(name, monkeypatch):
    module, reason = core.NAMES[name]
    monkeypatch.setitem(core.NAMES, name, (module, reason))
    monkeypatch.setitem(core.NAMES, "gone", (module, reason))
    with pytest.raises(
        core.MissingFromCore, match=rf"This ComfyUI \(.*\) has no {module}\.gone, which WorldStereo FP8"
    ):
        core.gone  # noqa: B018


ONE_BY_ONE = """
import asyncio, importlib, os, sys
sys.path.insert(0, {tests!r})
import conftest
import types
server = types.ModuleType("server")
server.PromptServer = types.SimpleNamespace(instance=None)
sys.modules["server"] = server
import comfy_execution.graph_utils, latent_preview, folder_paths, node_helpers, comfy_api.latest
from worldstereo_fp8 import core
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
        sys.modules[f"{{module}}.{{name}}"] = None  # a submodule that cannot be imported either
        extension = importlib.import_module("worldstereo_fp8.nodes").WorldStereoExtension()
        nodes = asyncio.run(extension.get_node_list())
        print("RESULT", name, len(nodes), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Forks a process for each name, which this system cannot.")
def test_without_each_name_in_turn_the_other_nodes_load():
    code = ONE_BY_ONE.format(tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    counts = {line.split()[1]: int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("RESULT")}
    assert set(counts) == set(core.NAMES), done.stderr[-2000:]
    whole = len(_all_nodes())
    for name, count in counts.items():
        assert count < whole, f"nothing missed {name}"
        message = f"has no {core.NAMES[name][0]}.{name}, which WorldStereo FP8 needs for: {core.NAMES[name][1]}"
        assert message in done.stderr, name
    assert counts["GraphBuilder"] > whole / 2 and counts["turbo"] > 0


def _all_nodes() -> list:
    from worldstereo_fp8.nodes import available

    return available()
