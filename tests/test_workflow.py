"""The example workflow on a real ComfyUI server and in its real web page, with toy models of the published formats."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from web_page import open_workflow
from worldstereo_fp8.demo import job, scene, server
from worldstereo_fp8.scene.camera_files import read_cameras

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
    video = job.saved_video(comfyui.base, comfyui.run(prompt))
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


@pytest.mark.parametrize("method", ["none", "latent2rgb"])
def test_every_keyframe_is_previewed(comfyui, prompt, method):
    """Whether core's previews are off (its default) or on: after the last step each tile is like its own keyframe."""
    previews = []
    inputs_of(prompt, "SamplerCustom")["noise_seed"] = ("none", "latent2rgb").index(method) + 1  # not cached
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


def thumbnails(frames):
    small = [Image.fromarray(frame).resize((32, 20), Image.Resampling.BOX) for frame in frames]
    return np.stack([np.asarray(picture).ravel() / 255 for picture in small])


def test_workflow_in_the_web_page(comfyui, page, errors):
    """The page shows the example workflow without an error and makes the same API form of it as the demo."""
    faulty, shown = open_workflow(page, json.loads(job.WORKFLOW.read_text("utf-8")))
    if folder := os.environ.get("SCREENSHOTS"):
        take_screenshot(page, Path(folder) / "your_own_render_and_mask.png")
    assert errors == []
    assert faulty == []
    assert shown == job.example_prompt(comfyui.object_info())


def take_screenshot(page, path):
    """The drawn workflow alone."""
    page.set_viewport_size({"width": 2160, "height": 1500})
    page.evaluate("""async () => {
        await window.app.extensionManager.command.execute("Workspace.ToggleFocusMode");
        window.app.canvas.ds.scale = 0.9;
        window.app.canvas.ds.offset = [40, 105]; // the groups begin at (-20, -80)
        window.app.canvas.show_info = false;
        window.app.canvas.setDirty(true, true);
    }""")
    page.wait_for_timeout(3000)
    page.screenshot(path=path, clip={"x": 0, "y": 0, "width": 1926, "height": 1454})


def upload_cameras(page, files, ending):
    """Gives files to the upload button of a WorldStereo Load Camera. Returns the chosen file's name, with this ending."""
    with page.expect_file_chooser() as chooser:
        page.evaluate("""() => {
            window.app.graph.clear();
            window.redrawn = false;
            const node = window.LiteGraph.createNode("WorldStereoLoadCamera");
            window.app.graph.add(node);
            const redraw = node.setDirtyCanvas;
            node.setDirtyCanvas = (...layers) => { window.redrawn = true; redraw.apply(node, layers); };
            node.widgets.find(widget => widget.name === "upload camera file").callback();
        }""")
    chooser.value.set_files(files)
    chosen = page.wait_for_function(
        """ending => window.app.graph.nodes.flatMap(node => node.widgets ?? [])
            .map(widget => String(widget.value)).find(value => value.endsWith(ending))""",
        arg=ending,
    ).json_value()
    page.wait_for_function("window.redrawn")
    return chosen


def test_camera_upload(comfyui, page, errors, tmp_path):
    """The file comes into the input folder and is chosen, whatever the case of its letters."""
    file = tmp_path / "My_Cameras.JSON"
    file.write_bytes((comfyui.base / "input" / "camera.json").read_bytes())
    assert upload_cameras(page, file, file.name) == file.name
    assert (comfyui.base / "input" / file.name).read_bytes() == file.read_bytes()
    assert errors == []


def test_an_uploaded_colmap_pair_stays_together(comfyui, page, errors, tmp_path):
    """Each time both files get a name of their own, and the images are chosen."""
    for focal, images, lenses in ((40, "images.txt", "cameras.txt"), (80, "IMAGES.TXT", "CAMERAS.TXT")):
        (tmp_path / images).write_text("1 1 0 0 0 0 0 0 1 a.png\n\n")
        (tmp_path / lenses).write_text(f"1 PINHOLE 64 48 {focal} {focal} 32 24\n")
        chosen = upload_cameras(page, [tmp_path / images, tmp_path / lenses], f"_{images}")
        cameras, _ = read_cameras(comfyui.base / "input" / chosen)
        assert cameras.K[0, 0, 0] == focal
    assert errors == []
