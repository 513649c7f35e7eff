"""The example workflow on a real ComfyUI server, with toy models of the published formats."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from worldstereo_fp8.demo import job, scene, server

# Names the workflow asks for; the page only looks whether they are there.
PLACEHOLDERS = (
    "diffusion_models/WorldStereo-memory-dmd-fp8_e4m3fn_scaled.safetensors",
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "clip_vision/clip_vision_h.safetensors",
    "vae/wan_2.1_vae.safetensors",
)


FRAMES = 25  # of the render; the model takes 21 of them


def prepare(base):
    job.prepare(base)
    scene.draw(base / "input", FRAMES)
    models = base / "models"
    for placeholder in PLACEHOLDERS:
        (models / placeholder).parent.mkdir(exist_ok=True)
        (models / placeholder).touch()
    toy = models / "diffusion_models" / job.MODEL
    shutil.copyfile(models / "vae" / job.VAE, toy.with_name("a_vae.safetensors"))
    toy.with_name("truncated.safetensors").write_bytes(toy.read_bytes()[:1_000_000])
    cameras = json.loads((base / "input" / "camera.json").read_text("utf-8"))
    cameras["extrinsic"].pop()
    (base / "input" / "one_pose_short.json").write_text(json.dumps(cameras), "utf-8")


@pytest.fixture
def prompt(comfyui):
    files = {"image": "image.png", "camera": "camera.json", "render": "render.mp4", "mask": "render_mask.mp4"}
    return job.demo_prompt(comfyui.object_info(), files)


def inputs_of(prompt, class_type):
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == class_type)


@pytest.mark.parametrize(
    ("node", "name", "value", "message"),
    [
        ("LoadWorldStereoFP8", "model_name", "absent.safetensors", "absent.safetensors"),
        ("LoadWorldStereoFP8", "model_name", "../vae/wan_toy_vae.safetensors", "not in list"),
        ("LoadWorldStereoFP8", "model_name", "a_vae.safetensors", "a_vae.safetensors.*VAE"),
        ("LoadWorldStereoFP8", "model_name", "truncated.safetensors", "truncated.safetensors"),
        ("WorldStereoLoadCamera", "camera", "absent.json", "absent.json"),
        ("WorldStereoLoadCamera", "camera", "../extra_model_paths.yaml", "extra_model_paths.yaml"),
        ("WorldStereoLoadCamera", "camera", "one_pose_short.json", f"one_pose_short.json.*{FRAMES - 1}"),
        ("WorldStereoConditioning", "reference_index", "0, 5", "reference_images"),
    ],
)
def test_bad_input_is_a_clear_error(comfyui, prompt, node, name, value, message):
    inputs_of(prompt, node)[name] = value
    with pytest.raises(server.ServerError, match=f"(?s){node}.*{message}"):
        comfyui.run(prompt)


def test_demo_paints_the_render(comfyui, prompt):
    """After the errors above the server still serves. The toy model's keyframes are the render, blurred."""
    video = run_with_previews(comfyui, prompt, "none")  # core's default
    keyframes = thumbnails(scene.read_video(video))
    render = scene.read_video(comfyui.base / "input" / "render.mp4")
    render = thumbnails([render[moment] for moment in np.linspace(0, len(render) - 1, 21).astype(int)])
    assert keyframes.shape == render.shape
    assert abs(keyframes - render).mean(axis=1).max() < 0.15
    # What changes along the path changes at the right moment: every keyframe is most like its own frame or a neighbour.
    moving, wanted = keyframes - keyframes.mean(axis=0), render - render.mean(axis=0)
    likeness = (moving @ wanted.T) / np.linalg.norm(wanted, axis=1)
    assert abs(likeness.argmax(axis=1) - np.arange(21)).max() <= 1

    sheet = comfyui.base / "sheet.png"
    job.contact_sheet(comfyui.base / "input" / "render.mp4", comfyui.base / "input" / "render_mask.mp4", video, sheet)
    height, width = scene.read_video(video)[0].shape[:2]
    assert Image.open(sheet).size == (7 * width, 3 * height)


def test_every_keyframe_is_previewed_with_cores_previews_too(comfyui, prompt):
    inputs_of(prompt, "SamplerCustom")["noise_seed"] = 1  # not cached
    run_with_previews(comfyui, prompt, "latent2rgb")


def run_with_previews(comfyui, prompt, method):
    """Runs the workflow with core's previews so and returns its video: after the last step each tile of the preview is
    like its own keyframe."""
    previews = []
    video = job.saved_video(comfyui.base, comfyui.run(prompt, preview=previews.append, preview_method=method))
    assert len(previews) == 4
    sheet = Image.open(io.BytesIO(previews[-1]))
    if folder := os.environ.get("SCREENSHOTS"):
        sheet.save(Path(folder) / f"preview_{method}.png")
    keyframes = scene.read_video(video)
    rows, columns = 6, 4
    width, height = sheet.width / columns, sheet.height / rows
    tiles = [
        np.asarray(sheet.crop((column * width, row * height, (column + 1) * width, (row + 1) * height)))
        for row in range(rows)
        for column in range(columns)
    ]
    shown, wanted = thumbnails(tiles[:21]), thumbnails(keyframes)
    shown, wanted = shown - shown.mean(axis=0), wanted - wanted.mean(axis=0)
    likeness = (shown @ wanted.T) / np.linalg.norm(wanted, axis=1)
    assert abs(likeness.argmax(axis=1) - np.arange(21)).max() <= 1
    assert tiles[-1].std(axis=(0, 1)).max() < 5  # left over
    return video


def thumbnails(frames):
    small = [Image.fromarray(frame).resize((32, 20), Image.Resampling.BOX) for frame in frames]
    return np.stack([np.asarray(picture).ravel() / 255 for picture in small])
