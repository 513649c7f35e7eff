"""What the nodes for the picture say on themselves, and the size they take from the model."""

from types import SimpleNamespace

import comfy_api.latest
import pytest
import torch
from toy import GOLDEN
from worldstereo_fp8.comfy_nodes import camera, common, model, picture
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.scene.cameras import Cameras
from worldstereo_fp8.scene.depth import DEPTH_PICTURES
from worldstereo_fp8.scene.pointcloud import PointCloud


@pytest.fixture
def shown(monkeypatch):
    """The texts that nodes show, in order."""
    texts = []
    server = SimpleNamespace(send_progress_text=lambda text, node: texts.append(text))
    monkeypatch.setattr(common, "PromptServer", SimpleNamespace(instance=server))
    monkeypatch.setattr(
        comfy_api.latest.ui, "PreviewImage", lambda image, cls: SimpleNamespace(as_dict=lambda: {"images": image})
    )
    return texts


@pytest.fixture(scope="module")
def worldstereo():
    """A toy model; its own table of sizes would be too large for a test."""
    patcher = load_worldstereo(GOLDEN / "memory_dmd.weights.safetensors")
    config = patcher.model.diffusion_model.config
    object.__setattr__(config, "scale_map", ((32, 48), (48, 32)))
    return patcher


def run(node, *arguments, **inputs):
    """The outputs of a node that runs as number 1."""
    node = type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id="1")})
    return node.execute(*arguments, **inputs)


def cameras_of(width, height, count=2):
    K = torch.tensor([[float(width), 0, width / 2], [0, width, height / 2], [0, 0, 1]]).repeat(count, 1, 1)
    return Cameras(torch.eye(4).repeat(count, 1, 1), K, width, height)


def render(image, cameras, **inputs):
    cloud = PointCloud(torch.rand(50, 3) + torch.tensor([0, 0, 1.0]), torch.rand(50, 3))
    sizes = {"width": 0, "height": 0} | inputs
    return run(
        camera.WorldStereoRender, image, cloud, cameras, DEPTH_PICTURES[0], 1.0, 2.0, radius=0.1, points_per_pixel=3,
        background="#808080", **sizes,
    )  # fmt: skip


def test_picture_shows_its_crop_and_what_lies_under_transparent_parts(shown, worldstereo):
    image = torch.rand(1, 40, 48, 3)
    result = run(picture.WorldStereoPicture, image, "crop", 0.5, "#204060", worldstereo)
    assert result.result[0].shape == (1, 32, 48, 3) and result.ui["images"].shape == (1, 40, 48, 3)
    assert result.ui["worldstereo_text"] == shown  # for when ComfyUI has it in its cache
    transparency = torch.zeros(1, 40, 48)
    transparency[:, :, :10] = 1
    result = run(picture.WorldStereoPicture, image, "stretch", 0.5, "#204060", worldstereo, transparency)
    torch.testing.assert_close(result.result[0][0, 0, 0], torch.tensor([0x20, 0x40, 0x60]) / 255)
    assert shown == [
        "48×40 to 48×32: cropped by 4 px top, 4 px bottom",
        "48×40 to 48×32: 25% wider\ntransparent parts laid on #204060",
    ]


def test_render_has_the_models_size_or_the_pictures_own(shown, worldstereo, caplog):
    image = torch.rand(1, 40, 60, 3)
    video, holes, _ = render(image, cameras_of(60, 40), model=worldstereo).result
    assert video.shape == (2, 32, 48, 3) and (video[1][holes[1] == 1] == 0.5).all() and holes[1].any()
    assert render(image, cameras_of(60, 40)).result[0].shape == (2, 40, 60, 3)
    assert render(image, cameras_of(60, 60), width=24, height=16).result[0].shape == (2, 16, 24, 3)
    assert [text.split("\n")[0] for text in shown] == [f"2 frames of {size}" for size in ("48×32", "60×40", "24×16")]
    assert shown[2].split("\n")[-1] == "cameras' picture 60×60 stretched to 24×16: 50% wider"
    assert "WorldStereo Render: cameras' picture 60×60 stretched to 24×16: 50% wider." in caplog.text
    assert "stretched" not in shown[0] + shown[1]


def test_camera_path_says_what_another_shape_does(shown):
    start = (torch.rand(1, 40, 60, 3), "dolly in", 30.0, 0.1, 3, "linear", "auto", "auto", 60.0, 1.0, 0.0)
    run(camera.WorldStereoCameraPath, *start)
    run(camera.WorldStereoCameraPath, *start, start=cameras_of(60, 60))
    assert "stretched" not in shown[0]
    assert "start's picture 60×60 stretched to 60×40: 50% wider" in shown[1]


def test_conditioning_says_what_it_stretches_and_what_is_no_mask(shown, worldstereo, monkeypatch):
    latent = torch.zeros(1, 16, 2, 4, 6)
    monkeypatch.setattr(model, "condition", lambda *inputs: ({}, latent))
    inputs = [torch.rand(1, 32, 48, 3), torch.rand(2, 40, 40, 3), torch.ones(2, 32, 48), cameras_of(48, 32)]
    prompt = [[torch.zeros(1, 2, 8), {}]]
    run(model.WorldStereoConditioning, worldstereo, prompt, prompt, SimpleNamespace(first_stage_model=None), *inputs)
    size, stretched, holes = shown[0].split("\n")
    assert size == "48×32, 2 keyframes of 2 frames"
    assert stretched == "render_video 40×40 stretched to 48×32: 50% wider"
    assert holes.startswith("render_mask has holes in 100% of frame 0")
