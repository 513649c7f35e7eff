"""Cook FP8 on a real ComfyUI server: what it writes, where, and how it is cancelled; the workflow in the web page."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import save_file
from toy import golden_weights, source
from worldstereo_fp8.comfy_nodes.files import file_name
from worldstereo_fp8.demo import server
from worldstereo_fp8.fp8.cook import verify

WORKFLOW = Path(server.__file__).parents[1] / "example_workflows" / "cook_fp8.json"
CASE = "memory_dmd"


def prepare(base):
    models = base / "models" / "diffusion_models"
    weights, config = source(CASE), golden_weights(CASE)[1]
    folder = models / "worldstereo-memory-dmd"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "taken.safetensors").touch()
    shards = models / "sharded"
    shards.mkdir(exist_ok=True)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for shard in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == shard}, shards / shard)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def workflow(comfyui, **changes):
    """The example workflow in API form, with other inputs of its Cook FP8."""
    prompt = server.to_api(json.loads(WORKFLOW.read_text("utf-8")), comfyui.object_info())
    next(node for node in prompt.values() if node["class_type"] == "CookFP8")["inputs"] |= changes
    return prompt


def test_what_each_node_offers(comfyui):
    """The cook takes a model in shards by its index; the loader takes no shards."""
    info = comfyui.object_info()
    sources = info["CookFP8"]["input"]["required"]["source"][1]["options"]
    models = info["LoadWorldStereoFP8"]["input"]["required"]["model_name"][1]["options"]
    index = str(Path("sharded") / "model.safetensors.index.json")
    assert index in sources and not any("-of-" in name for name in sources + models)
    assert str(Path("worldstereo-memory-dmd") / "model.safetensors") in models


def load(name: str) -> dict:
    return {
        "load": {"class_type": "LoadWorldStereoFP8", "inputs": {"model_name": name, "compute": "auto"}},
        "sigmas": {"class_type": "WorldStereoDMDSigmas", "inputs": {"model": ["load", 0]}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["sigmas", 0]}},
    }


def test_cook_and_load(comfyui):
    outputs = comfyui.run(workflow(comfyui, result="cooked"))
    folder = comfyui.base / "models" / "diffusion_models" / "worldstereo-memory-dmd"
    assert verify(folder / "cooked.safetensors", folder / "model.safetensors") == []
    text = next(output["text"][0] for output in outputs.values() if "text" in output)
    assert "43 of them FP8" in text and "larger in 0 of 43 weights" in text
    picture = next(output["images"][0] for output in outputs.values() if "images" in output)
    pixels = np.asarray(Image.open(comfyui.base / "temp" / picture["filename"]))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    comfyui.run(load("worldstereo-memory-dmd/cooked.safetensors"))


def test_shards_by_their_index(comfyui):
    sources = comfyui.object_info()["CookFP8"]["input"]["required"]["source"][1]["options"]
    assert "sharded/model.safetensors.index.json" in sources and not any("-of-0000" in name for name in sources)
    comfyui.run(
        workflow(
            comfyui, source="sharded/model.safetensors.index.json", result="cooked.safetensors", recipe="published"
        )
    )
    folder = comfyui.base / "models" / "diffusion_models" / "sharded"
    assert verify(folder / "cooked.safetensors", folder / "model.safetensors.index.json") == []
    shard = next(folder.glob("*-of-0000*"))
    os.utime(shard, (1, 1))  # another download of it: the index is the same
    with pytest.raises(server.ServerError, match="exists already"):
        comfyui.run(
            workflow(
                comfyui, source="sharded/model.safetensors.index.json", result="cooked.safetensors", recipe="published"
            )
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"result": "../escaped"}, "'../escaped' is not a file name"),
        ({"result": "/tmp/escaped"}, "is not a file name"),
        ({"result": "taken"}, "taken.safetensors exists already"),
        ({"result": "model", "overwrite": True}, "is the source itself"),
        ({"source": "../vae/model.safetensors"}, "not in list"),
    ],
)
def test_clear_errors(comfyui, changes, message):
    before = sorted(comfyui.base.rglob("*.safetensors*"))
    with pytest.raises(server.ServerError, match=f"(?s)CookFP8.*{message}"):
        comfyui.run(workflow(comfyui, **changes))
    assert sorted(comfyui.base.rglob("*.safetensors*")) == before


@pytest.mark.parametrize("name", ["", ".", "..", ".safetensors", "a/b", "a\\b", "C:\\a", "C:a", "/a", "../a", "a/"])
def test_names_with_path_parts(name):
    with pytest.raises(ValueError, match="is not a file name"):
        file_name(name, ".safetensors")


def safetensors(name='"a"', dtype='"BF16"', data=b"\0\0") -> bytes:
    header = f'{{{name}: {{"dtype": {dtype}, "shape": [{len(data) // (2 if "16" in dtype else 1)}], "data_offsets": [0, {len(data)}]}}}}'
    return len(header).to_bytes(8, "little") + header.encode() + data


BAD_NAME = "bad\udcff"  # on the disk bad\xff, which is no UTF-8
HOSTILE = {  # files, each with a lone surrogate, and what is said of them
    "name.safetensors": (safetensors(name=r'"\ud800"'), r"safetensors (has a broken|is not a) safetensors"),
    "dtype.safetensors": (safetensors(dtype=r'"\ud800"'), r"dtype\.safetensors"),
    "quant.safetensors": (
        safetensors('"blocks.0.ffn.net.0.proj.comfy_quant"', '"U8"', rb'{"format": "\ud800"}'),
        r"quant.safetensors",
    ),
    "index.safetensors.index.json": (rb'{"weight_map": {"a": "\ud800"}}', r"index.json"),
}
NAMES_ARE_BYTES = sys.platform not in ("win32", "darwin")
if NAMES_ARE_BYTES:
    HOSTILE[f"{BAD_NAME}.safetensors"] = (b"\0" * 20, r"\.safetensors: it holds characters that cannot be printed")


def test_a_hostile_file_does_not_end_the_server(comfyui):
    """Text that no log can encode once ended ComfyUI's worker: it queued and never ran again."""
    models, cameras = (comfyui.base / place for place in ("models/diffusion_models", "input"))
    written = [models / name for name in HOSTILE] + [cameras / f"{BAD_NAME}.json"] * NAMES_ARE_BYTES
    try:
        for path in written:
            path.write_bytes(HOSTILE.get(path.name, (b"{}", ""))[0])
        for name, (_, words) in HOSTILE.items():
            for prompt in (load(name), workflow(comfyui, source=name)):
                unlisted = "index" in name and "load" in prompt  # the loader takes no index
                with pytest.raises(server.ServerError, match="not in list" if unlisted else words):
                    comfyui.run(prompt)
        load_camera = {"class_type": "WorldStereoLoadCamera", "inputs": {"camera": f"{BAD_NAME}.json"}}
        with pytest.raises(server.ServerError, match=r"camera: .*bad.*udcff"):
            comfyui.run({"load": load_camera, "show": {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}}})
    finally:
        for path in written:
            path.unlink()
    comfyui.run({"show": {"class_type": "PreviewAny", "inputs": {"source": "still here"}}})


def test_interrupt_leaves_nothing(comfyui):
    folder = comfyui.base / "models" / "diffusion_models" / "large"
    folder.mkdir()
    weight = torch.randn(4096, 4096).to(torch.bfloat16)
    save_file({f"blocks.{i}.attn1.to_q.weight": weight.clone() for i in range(24)}, folder / "model.safetensors")

    def interrupt():
        while not list(folder.glob("*.cooking")):
            time.sleep(0.005)
        requests.post(f"http://{comfyui.address}/interrupt", timeout=10)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(server.ServerError, match="interrupted"):
        comfyui.run(workflow(comfyui, source="large/model.safetensors"))
    thread.join()
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
