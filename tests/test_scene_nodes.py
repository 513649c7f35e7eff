"""The scene's nodes on a real ComfyUI server with toy models: paths that remember, and what is not computed again."""

import json
import threading

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import load_file
from test_geometry_nodes import defaults
from test_geometry_nodes import graph as linked
from worldstereo_fp8.demo import job, server
from worldstereo_fp8.scene.cameras import rigid_inverse
from worldstereo_fp8.scene.folder import read_scene

WIDTH, HEIGHT, KEYFRAMES = 240, 160, 6  # an entry of the toy model's table
FILES = {
    "checkpoint": ("LoadWorldStereoFP8", {"model_name": job.MODEL, "compute": "auto"}),
    "vae": ("VAELoader", {"vae_name": job.VAE}),
    "text": ("WorldStereoDemoTextEncoder", {}),
    "vision": ("WorldStereoDemoVisionEncoder", {}),
    "prompt": ("CLIPTextEncode", {"clip": ("text", 0), "text": "a room"}),
    "nothing": ("CLIPTextEncode", {"clip": ("text", 0), "text": ""}),
    "euler": ("KSamplerSelect", {"sampler_name": "euler"}),
    "sigmas": ("WorldStereoDMDSigmas", {"model": ("checkpoint", 0)}),
    "picture": ("LoadImage", {"image": "picture.png"}),
    "moge": ("WorldStereoDemoGeometry", {"image": ("picture", 0)}),
    "depth_model": ("WorldStereoDemoMoGeModel", {}),
}


def prepare(base):
    job.prepare(base)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    checks = ((x // 16 + y // 16) % 2)[..., None] * np.array([120, 60, 20]) + np.stack([x, y, 255 - x], -1) // 2
    Image.fromarray(checks.astype(np.uint8)).save(base / "input" / "picture.png")


def graph(comfyui, **nodes):
    """A prompt of FILES and nodes by name, each (class type, inputs); other widgets have their defaults."""
    return linked(**{name: defaults(comfyui, kind, **inputs) for name, (kind, inputs) in (FILES | nodes).items()})


def start():
    return {
        "start": (
            "WorldStereoStartScene",
            {"image": ("picture", 0), "depth": ("moge", 0), "width": WIDTH, "height": HEIGHT},
        )
    }


def one_path(name, scene, view, preset, seed):
    """The ordinary nodes of one path through a scene, as a person wires them."""
    steps = {
        "from": ("WorldStereoContinue", {"scene": scene, "view": view}),
        "cameras": (
            "WorldStereoCameraPath",
            {
                "image": (f"{name}_from", 0),
                "start": (f"{name}_from", 1),
                "scene": (f"{name}_from", 2),
                "preset": preset,
                "degrees": 12.0,
                "keyframes": KEYFRAMES,
            },
        ),
        "look": (
            "WorldStereoScenePath",
            {
                "scene": scene,
                "image": (f"{name}_from", 0),
                "cameras": (f"{name}_cameras", 0),
                "clip_vision": ("vision", 0),
            },
        ),
        "conditioning": (
            "WorldStereoConditioning",
            {
                "model": ("checkpoint", 0),
                "positive": ("prompt", 0),
                "negative": ("nothing", 0),
                "vae": ("vae", 0),
                "image": (f"{name}_from", 0),
                "render_video": (f"{name}_look", 0),
                "render_mask": (f"{name}_look", 1),
                "cameras": (f"{name}_cameras", 0),
                "references": (f"{name}_look", 2),
            },
        ),
        "sample": (
            "SamplerCustom",
            {
                "model": ("checkpoint", 0),
                "positive": (f"{name}_conditioning", 0),
                "negative": (f"{name}_conditioning", 1),
                "sampler": ("euler", 0),
                "sigmas": ("sigmas", 0),
                "latent_image": (f"{name}_conditioning", 2),
                "noise_seed": seed,
                "cfg": 1.0,
            },
        ),
        "decode": ("WorldStereoKeyframeDecode", {"samples": (f"{name}_sample", 0), "vae": ("vae", 0)}),
        "depth": (
            "WorldStereoKeyframeDepth",
            {"moge_model": ("depth_model", 0), "images": (f"{name}_decode", 0), "cameras": (f"{name}_cameras", 0)},
        ),
        "add": (
            "WorldStereoAddToScene",
            {
                "scene": scene,
                "images": (f"{name}_decode", 0),
                "cameras": (f"{name}_cameras", 0),
                "depth": (f"{name}_depth", 0),
                "name": name,
            },
        ),
        "frames": ("SaveImage", {"images": (f"{name}_decode", 0), "filename_prefix": f"{name}_frames"}),
        "references": ("SaveImage", {"images": (f"{name}_look", 3), "filename_prefix": f"{name}_references"}),
    }
    return {f"{name}_{step}": node for step, node in steps.items()}


def pictures(comfyui, outputs, node):
    return [
        np.asarray(Image.open(comfyui.base / "output" / saved["filename"]), np.float32)
        for saved in outputs[node]["images"]
    ]


def executed(events):
    """The nodes that a run executed, by its events."""
    return {event["data"]["node"] for event in events if event["type"] == "executing" and event["data"]["node"]}


def test_the_second_path_is_shown_the_frames_of_the_first(comfyui):
    first = one_path("one", ("start", 0), "first", "orbit left", 0)
    nodes = start() | first | one_path("two", ("one_add", 0), "first", "orbit left", 1)
    inside = {"one_latent": ("WorldStereoKeyframeEncode", {"pixels": ("one_decode", 0), "vae": ("vae", 0)})}
    for name in ("one", "two"):
        links = {"conditioning": (f"{name}_conditioning", 0), "latent": ("one_latent", 0), "name": name}
        inside[f"{name}_inside"] = ("WorldStereoDemoSaveConditioning", links)
    outputs = comfyui.run(graph(comfyui, **nodes, **inside))
    frames = pictures(comfyui, outputs, "one_frames")
    assert len(frames) == KEYFRAMES
    start_picture = np.asarray(Image.open(comfyui.base / "input" / "picture.png"), np.float32)
    assert len(pictures(comfyui, outputs, "one_references")) == 1
    assert abs(pictures(comfyui, outputs, "one_references")[0] - start_picture).max() <= 1
    # Along the same path each keyframe's nearest view is the frame that was made there.
    references = pictures(comfyui, outputs, "two_references")
    assert len(references) == KEYFRAMES - 1
    for reference, frame in zip(references, frames[1:]):
        assert abs(reference - frame).max() <= 1

    # What the model is given: the latents of those frames, at the cameras they were made at.
    one, two = (load_file(comfyui.base / "output" / f"{name}.safetensors") for name in ("one", "two"))
    assert one["reference_latent"].shape[2] == 1 and two["reference_latent"].shape[2] == KEYFRAMES - 1
    made = one["latent"][:, :, 1:]
    apart = (two["reference_latent"][:, :, :, None] - made[:, :, None]).abs().mean((0, 1, 4, 5))
    assert apart.argmin(1).tolist() == list(range(KEYFRAMES - 1))  # each is its own frame's
    assert apart.diagonal().max() < 0.01 * made.std()  # but for the scene's pictures, which are in bytes
    torch.testing.assert_close(two["camera_qt_ref"], one["camera_qt"][:, 1:], atol=1e-5, rtol=0)
    assert two["ref_index"].tolist() == [list(range(KEYFRAMES - 1))]

    # A change of the second path leaves the first one's nodes alone; Continue takes the last frame by default.
    events = []
    nodes |= one_path("two", ("one_add", 0), "last", "dolly in", 1)
    outputs = comfyui.run(graph(comfyui, **nodes), event=events.append)
    unused = {"two_depth", "two_add"}  # nothing asks for the scene with the second path
    assert executed(events) == {name for name in nodes if name.startswith("two_")} - unused
    assert abs(pictures(comfyui, outputs, "two_references")[0] - frames[-1]).max() <= 1


def test_a_flown_path_goes_on_from_the_last_view(comfyui):
    """Through the same nodes: one view, a step to the left of a tenth of a depth of 10."""
    nodes = start() | one_path("one", ("start", 0), "first", "orbit left", 0)
    nodes |= one_path("two", ("one_add", 0), "last", "orbit left", 1)
    flown = {name: nodes["two_cameras"][1][name] for name in ("image", "start", "scene")}
    view = {"position": [-0.1, 0, 0], "rotation": [1, 0, 0, 0]}
    flown |= {"path": json.dumps({"keyframes": KEYFRAMES, "views": [view]}), "scene_depth": 10.0}
    nodes["two_cameras"] = ("WorldStereoFlyPath", flown)
    nodes["saved"] = ("WorldStereoSaveScene", {"scene": ("two_add", 0), "filename_prefix": "flown"})
    comfyui.run(graph(comfyui, **nodes))
    found, _ = read_scene(comfyui.base / "output" / "flown_00001_")
    assert [path.name for path in found.paths] == ["one", "two"]
    last, cameras = found.cameras.w2c[found.paths[0].views[-1]], found.paths[1].cameras
    assert len(cameras) == KEYFRAMES and abs(cameras.w2c[0] - last).max() < 1e-6
    step = (cameras.w2c[-1] @ rigid_inverse(last))[:3, 3]
    torch.testing.assert_close(step, torch.tensor([1.0, 0, 0]), atol=1e-4, rtol=0)


def explore(**inputs):
    links = dict(
        scene=("start", 0),
        model=("checkpoint", 0),
        positive=("prompt", 0),
        negative=("nothing", 0),
        vae=("vae", 0),
        sampler=("euler", 0),
        sigmas=("sigmas", 0),
        clip_vision=("vision", 0),
        moge_model=("depth_model", 0),
        keyframes=KEYFRAMES,
        paths="picture: left and right",
    )
    return {
        "explore": ("WorldStereoExploreScene", links | inputs),
        "cloud": ("WorldStereoSavePointCloud", {"points": ("explore", 2)}),
    }


def steps(events):
    """What ran inside Explore Scene, such as "left.sample"."""
    inside = (node for node in executed(events) if node.startswith("explore."))
    return {".".join(node.split(".")[-2:]) for node in inside}


def test_explored_paths_are_not_computed_again(comfyui):
    """And the scene is saved after every path."""
    events, kept = [], {"scene_prefix": "walks/kept"}
    comfyui.run(graph(comfyui, **start(), **explore(stop_after=1, **kept)), event=events.append)
    work = ("picture", "look", "conditioning", "sample", "decode", "depth", "add", "video", "save", "keep")
    assert {f"left.{step}" for step in work} <= steps(events)
    assert all(step.startswith("left.") for step in steps(events))
    events.clear()
    outputs = comfyui.run(graph(comfyui, **start(), **explore(**kept)), event=events.append)
    assert steps(events) == {f"right.{step}" for step in ("start", "cameras", *work)}
    assert outputs["cloud"]["3d"]
    videos = sorted(path.name for path in (comfyui.base / "output" / "video").glob("scene_*"))
    assert [name.split("_")[1] for name in videos] == ["left", "right"]
    events.clear()
    comfyui.run(graph(comfyui, **start(), **explore(**kept)), event=events.append)
    assert executed(events) == set()
    folders = sorted((comfyui.base / "output" / "walks").iterdir())
    assert [folder.name for folder in folders] == ["kept_00001_", "kept_00002_"]
    assert [[path.name for path in read_scene(folder)[0].paths] for folder in folders] == [["left"], ["left", "right"]]


def test_an_interrupted_exploration_goes_on_where_it_was(comfyui):
    events = []

    def stop_in_the_second_path(event):
        events.append(event)
        if event["type"] == "executing" and str(event["data"]["node"]).endswith("right.sample"):
            threading.Thread(target=requests.post, args=(f"http://{comfyui.address}/interrupt",)).start()

    prompt = graph(comfyui, **start(), **explore(noise_seed=7))
    with pytest.raises(server.ServerError, match="interrupted"):
        comfyui.run(prompt, event=stop_in_the_second_path)
    assert "left.sample" in steps(events) and "right.add" not in steps(events)
    events.clear()
    comfyui.run(prompt, event=events.append)
    assert not any(step.startswith("left.") for step in steps(events))
    assert {"right.sample", "right.add"} <= steps(events)


def test_a_wrong_list_is_a_clear_error(comfyui):
    prompt = graph(comfyui, **start(), **explore(paths="my own list", own_list="left from first: moonwalk 3"))
    with pytest.raises(server.ServerError, match="(?s)line 1.*moonwalk.*orbit left"):
        comfyui.run(prompt)
    prompt = graph(comfyui, **start(), **explore(paths="my own list", own_list="on from path_9/0003: dolly in 0.2"))
    with pytest.raises(server.ServerError, match="no view named 'path_9/0003'.*'start'"):
        comfyui.run(prompt)


def test_a_panorama_starts_a_scene_of_27_views(comfyui):
    room = "WorldStereoDemoPanoramaGeometry"
    nodes = {
        "moge": (room, {"image": ("picture", 0)}),
        **start(),
        **one_path("turn", ("start", 0), "panorama/0004", "pan right", 3),
    }
    outputs = comfyui.run(graph(comfyui, **nodes))
    references = pictures(comfyui, outputs, "turn_references")
    assert 1 <= len(references) <= 5 and references[0].shape == (HEIGHT, WIDTH, 3)
