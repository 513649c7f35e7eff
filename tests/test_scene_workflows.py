"""The scene's example workflows: in ComfyUI's web page, and from there, with toy models, on the server."""

import json
import os
import shutil
from pathlib import Path

import comfy.cli_args
import numpy as np
import pytest
import torch
from PIL import Image
from test_workflow import PLACEHOLDERS
from web_page import open_workflow
from worldstereo_fp8.demo import job, scene
from worldstereo_fp8.scene.cameras import rigid_inverse
from worldstereo_fp8.scene.folder import read_scene

COMFYUI = Path(comfy.cli_args.__file__).parents[1]
EXAMPLES = Path(__file__).parents[1] / "example_workflows"
STAND_INS = job.STAND_INS | {"LoadMoGeModel": "WorldStereoDemoMoGeModel"}
TOYS = {"LoadWorldStereoFP8": ("model_name", job.MODEL), "VAELoader": ("vae_name", job.VAE)}
SAVED = "worldstereo/scene_00001_"  # what continue_scene.json opens


def prepare(base):
    job.prepare(base)
    for name in (*PLACEHOLDERS, "geometry_estimation/moge_2_vitl_normal_fp16.safetensors"):
        (base / "models" / name).parent.mkdir(exist_ok=True)
        (base / "models" / name).touch()
    shutil.copyfile(COMFYUI / "input" / "example.png", base / "input" / "example.png")
    y, x = np.mgrid[:256, :512]
    colours = np.stack([x // 2, y, 255 - x // 2], -1) // 2 + ((x // 16 + y // 16) % 2)[..., None] * 100
    Image.fromarray(colours.astype(np.uint8)).save(base / "input" / "panorama.png")


@pytest.fixture
def opened(page, errors):
    """Opens an example workflow in the page and returns its API form; no error and no red node may come of it."""

    def opened(name):
        page.evaluate("window.app.refreshComboInNodes()")  # as the key R does: there may be new files
        faulty, prompt = open_workflow(page, json.loads((EXAMPLES / f"{name}.json").read_text("utf-8")))
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{name}.png")
        assert errors == [] and faulty == []
        return prompt

    return opened


def run_small(comfyui, prompt, event=lambda message: None, **explore):
    """Runs a workflow with the toy model, stand-ins for the encoders and MoGe, and few keyframes."""
    for number, node in prompt.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in STAND_INS:
            prompt[number] = {"class_type": STAND_INS[kind], "inputs": {}}
        elif kind in TOYS:
            inputs[TOYS[kind][0]] = TOYS[kind][1]
        elif kind == "MoGePanoramaInference":
            prompt[number] = {"class_type": "WorldStereoDemoPanoramaGeometry", "inputs": {"image": inputs["image"]}}
        elif kind == "WorldStereoExploreScene":
            inputs |= {"keyframes": 5} | explore
        elif kind == "WorldStereoCameraPath":
            inputs["keyframes"] = 5
    return comfyui.run(prompt, event=event)


def videos(comfyui):
    return sorted((comfyui.base / "output" / "video").glob("scene_*"))


def test_explore_a_picture_and_go_on_from_the_saved_scene(comfyui, opened):
    prompt, events = opened("explore_picture"), []
    run_small(comfyui, prompt, events.append)
    found, _ = read_scene(comfyui.base / "output" / SAVED)
    assert [path.name for path in found.paths] == ["left", "right"]
    assert found.names == ("start", *(f"{name}/{frame:04}" for name in ("left", "right") for frame in range(1, 5)))
    assert [video.name.split("_")[1] for video in videos(comfyui)] == ["left", "right"]
    assert all(len(scene.read_video(video)) == 5 for video in videos(comfyui))
    shown = {prompt[event["data"]["display_node"]]["class_type"] for event in events if event["type"] == "executed"}
    assert {"PreviewPointCloud", "PreviewGaussianSplat", "WorldStereoExploreScene"} <= shown

    run_small(comfyui, opened("continue_scene"))
    more, _ = read_scene(comfyui.base / "output" / "worldstereo" / "scene_00002_")
    assert [path.name for path in more.paths] == ["left", "right", "path_1"]
    assert more.names[: len(found)] == found.names
    last = found.cameras.w2c[found.paths[-1].views[-1]]
    assert (more.paths[-1].cameras.w2c[0] - last).abs().max() < 1e-6  # it starts where the last path ended

    # The same with a path that is flown: one view, a step to the left.
    prompt = opened("continue_scene")
    flown = next(node for node in prompt.values() if node["class_type"] == "WorldStereoCameraPath")
    view = {"position": [-0.1, 0, 0], "rotation": [1, 0, 0, 0]}
    flown["class_type"] = "WorldStereoFlyPath"
    flown["inputs"] = {name: flown["inputs"][name] for name in ("image", "scene", "start", "lens", "lens_value")}
    flown["inputs"] |= {"path": json.dumps({"keyframes": 6, "views": [view]}), "scene_depth": 10.0, "start_pitch": 0.0}
    run_small(comfyui, prompt)
    more, _ = read_scene(comfyui.base / "output" / "worldstereo" / "scene_00003_")
    cameras = more.paths[-1].cameras
    assert len(cameras) == 6 and (cameras.w2c[0] - last).abs().max() < 1e-6
    torch.testing.assert_close(
        (cameras.w2c[-1] @ rigid_inverse(last))[:3, 3], torch.tensor([1.0, 0, 0]), atol=1e-4, rtol=0
    )


def test_explore_a_panorama(comfyui, opened):
    before = set(videos(comfyui))
    prompt = opened("explore_panorama")
    run_small(comfyui, prompt, stop_after=2)
    new = sorted(set(videos(comfyui)) - before)
    assert [video.name.rsplit("_", 2)[0] for video in new] == ["scene_right_0", "scene_rise_0"]
    folder = max((comfyui.base / "output" / "worldstereo").glob("scene_*"))
    found, _ = read_scene(folder)
    assert len(found) == 27 + 2 * 4 and [path.name for path in found.paths] == ["rise_0", "right_0"]
