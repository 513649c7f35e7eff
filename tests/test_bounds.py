"""What one picture, number or file can cost: memory beside the result, and time, whatever the inputs say."""

import json
import os
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as management
import pytest
import torch
from comfy_api.latest import io
from fuzz.inputs import Vae, cameras, geometry, nodes
from fuzz.inputs import scene as fuzz_scene
from worldstereo_fp8.comfy_nodes import camera, common, fly, limits, save, show
from worldstereo_fp8.comfy_nodes import model as model_nodes
from worldstereo_fp8.comfy_nodes import scene as scene_nodes
from worldstereo_fp8.comfy_nodes.files import check_prefix
from worldstereo_fp8.files import json as bounded_json
from worldstereo_fp8.scene import folder as folder_module
from worldstereo_fp8.scene import pictures as pictures_module
from worldstereo_fp8.scene.camera_files import read_cameras
from worldstereo_fp8.scene.cameras import MAX_CAMERAS, Cameras, plucker, write_camera_json
from worldstereo_fp8.scene.depth import DEPTH_PICTURES
from worldstereo_fp8.scene.explore import LISTS, read_walks
from worldstereo_fp8.scene.fuse import fuse, thin_by_voxels
from worldstereo_fp8.scene.panorama import not_whole
from worldstereo_fp8.scene.pictures import contact_sheet
from worldstereo_fp8.scene.pointcloud import PointCloud, read_ply, splat_sizes, write_world_mirror
from worldstereo_fp8.scene.render import RENDER_LIMIT, render
from worldstereo_fp8.scene.scene import Scene
from worldstereo_fp8.scene.splat import gaussians_of_scene
from worldstereo_fp8.scene.start import scene_of_panorama
from worldstereo_fp8.scene.stop import stoppable
from worldstereo_fp8.worldstereo.keyframe_vae import BATCH, decode_keyframes, encode_keyframes

LIMIT = 2 << 30  # bytes beside a result
IMAGE = torch.rand(1, 24, 32, 3)
POINTS = PointCloud(torch.rand(50, 3) + torch.tensor([0, 0, 1.0]), torch.rand(50, 3))
RENDER = dict(
    image=IMAGE, depth=POINTS, cameras=cameras(), depth_picture=DEPTH_PICTURES[0], near=1.0, far=10.0, width=32,
    height=24, radius=0.1, points_per_pixel=3, background="#808080",
)  # fmt: skip
PATH = dict(
    image=IMAGE, preset="orbit left", degrees=10.0, distance=0.1, keyframes=3, easing="linear", look_at_centre="auto",
    lens="auto", lens_value=60.0, scene_depth=1.0, start_pitch=0.0,
)  # fmt: skip


DECODE = {"vae": Vae()}
HUGE = torch.zeros(1).expand(10**6, 24, 32, 3)
VIEW = dict(yaw=0.0, pitch=0.0, fov=75.0, width=32, height=32)
WITHOUT_IMAGE = geometry(panorama=True) | {"image": None}


def run(node, **inputs):
    hidden = SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None)
    return type(node.__name__, (node,), {"hidden": hidden}).execute(**inputs)


@pytest.mark.parametrize("node", nodes(), ids=lambda node: node.__name__)
def test_every_node_is_checked(node):
    name = "\ud800 no input"
    with pytest.raises(ValueError, match=r"\\ud800 no input is not an input of"):
        run(node, **{name: 1})
    for entry in node.define_schema().inputs:
        if hasattr(entry, "max"):
            for value in (entry.min - 1, entry.max + 1, 10**400, float("nan"), "1", True, [1], torch.ones(1)):
                with pytest.raises(ValueError, match=f"^{entry.id} is "):
                    limits.check(entry, value)


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        (camera.WorldStereoCameraPath, PATH | {"keyframes": 10**7}, "keyframes is 10000000: .* between 2 and 1000"),
        (camera.WorldStereoCameraPath, PATH | {"degrees": float("nan")}, "degrees is nan"),
        (camera.WorldStereoCameraPath, PATH | {"distance": 1e39}, "distance is 1e\\+39"),
        (camera.WorldStereoCameraPath, PATH | {"start": 5}, "start is 5: give WORLDSTEREO_CAMERAS or LOAD3D_CAMERA"),
        (camera.WorldStereoCameraPath, PATH | {"image": "x"}, "image is 'x': give IMAGE"),
        (camera.WorldStereoCameraPath, PATH | {"preset": "\ud800"}, "preset is "),
        (camera.WorldStereoCameraPath, PATH | {"scene": {"depth": 1}}, "scene is not a MoGe geometry"),
        (camera.WorldStereoLoadCamera, {"camera": "x" * 5000}, "^camera is .{,200} it has 5000 characters"),
        (camera.WorldStereoRender, RENDER | {"cameras": 5}, "cameras is 5: give WORLDSTEREO_CAMERAS"),
        (camera.WorldStereoRender, RENDER | {"radius": 0}, "radius is 0"),
        (camera.WorldStereoRender, RENDER | {"radius": 1e9}, "radius is 1000000000"),
        (camera.WorldStereoRender, RENDER | {"points_per_pixel": 0}, "points_per_pixel is 0"),
        (camera.WorldStereoRender, RENDER | {"points_per_pixel": 10**9}, "points_per_pixel is 1000000000"),
        (camera.WorldStereoRender, RENDER | {"background": "#12"}, "background is '#12', which is not a colour"),
        (camera.WorldStereoRender, RENDER | {"width": 8192, "height": 8192}, "8192x8192 is not drawn"),
        (camera.WorldStereoRender, RENDER | {"image": IMAGE[:, :0]}, "image is empty"),
        (camera.WorldStereoRender, RENDER | {"image": IMAGE[..., :2]}, "image is 1×24×32×2"),
        (camera.WorldStereoRender, RENDER | {"image": IMAGE.expand(-1, -1, -1, 3)[0]}, "image is 24×32×3"),
        (camera.WorldStereoRender, RENDER | {"image": IMAGE * float("nan")}, "image holds NaN or infinity"),
        (fly.WorldStereoFlyPath, {"path": "x" * 70_000}, "path has 70000 characters"),
        (save.WorldStereoSaveCamera, {"cameras": cameras(), "filename_prefix": "\ud800"}, "filename_prefix is "),
        (save.WorldStereoSaveCamera, {"cameras": cameras(), "filename_prefix": "a/" + "x" * 201}, "filename_prefix: x.* long"),
        (save.WorldStereoSaveCamera, {"cameras": cameras(), "filename_prefix": "é" * 101}, "filename_prefix: é.* too long"),
        (show.WorldStereoPreviewClip, {"images": torch.rand(1, 1, 30, 3)}, "images are 30x1: a clip's sides have 2 to 8192"),
        (show.WorldStereoPreviewClip, {"images": torch.rand(1, 9000, 4, 3)}, "images are 4x9000: a clip's sides"),
        (model_nodes.WorldStereoKeyframeDecode, DECODE | {"samples": {"samples": HUGE}}, "samples holds 2,304,000,000 num"),
        (model_nodes.WorldStereoKeyframeDecode, DECODE | {"samples": {"samples": torch.ones(3)}}, "samples is not a latent"),
        (camera.WorldStereoPanorama, VIEW | {"moge_geometry": WITHOUT_IMAGE}, "MoGe geometry of a panorama has no image"),
        (show.WorldStereoPreviewClip, {"images": IMAGE, "fps": 0.0}, "fps is 0"),
        (scene_nodes.WorldStereoAddToScene, {"scene": cameras()}, "scene is a Cameras: give WORLDSTEREO_SCENE"),
        (scene_nodes.WorldStereoContinue, {"scene": None, "view": "last"}, "scene is None"),
    ],
)  # fmt: skip
def test_an_input_is_refused_by_name(node, inputs, message):
    with pytest.raises(ValueError, match=message):
        run(node, **inputs)


def test_the_limits_are_exact_and_every_kind_of_input_is_looked_at():
    choice = declared(camera.WorldStereoLoadCamera, "camera")
    assert limits.check(choice, "x" * limits.MAX_CHOICE) and limits.check(choice, "x.json") == "x.json"
    given = declared(camera.WorldStereoRender, "cameras")
    most = Cameras(torch.eye(4).expand(MAX_CAMERAS, 4, 4), torch.eye(3).expand(MAX_CAMERAS, 3, 3), 2, 2)
    assert limits.check(given, most) is most
    image = IMAGE.clone()
    image[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"image holds NaN or infinity, first in picture 1 \(the first is 0\)"):
        limits.check(declared(camera.WorldStereoRender, "image"), torch.cat([IMAGE, image]))
    scene = {"depth": torch.ones(1, 1, 3), "mask": torch.tensor([[[0.4, 0.5, 0.6]]])}
    assert limits.check(declared(camera.WorldStereoCameraPath, "scene"), scene)["mask"].tolist() == [
        [[False, False, True]]
    ]
    samples = declared(model_nodes.WorldStereoKeyframeDecode, "samples")
    latent = {"samples": torch.zeros(1, 16, 2, 2, 2)}
    assert limits.check(samples, latent) is latent
    for wrong in ({}, {"samples": [1]}, {"samples": torch.zeros(1, 16, 0, 2, 2)}):
        with pytest.raises(ValueError, match="samples is not a latent, or an empty one"):
            limits.check(samples, wrong)
    with pytest.raises(ValueError, match="samples holds NaN or infinity"):
        limits.check(samples, {"samples": torch.full((1, 16, 2, 2, 2), float("inf"))})


def test_inputs_given_by_place_are_checked_too():
    schema = SimpleNamespace(inputs=[io.Int.Input("a", min=0, max=5), io.Int.Input("b", min=0, max=5)])
    node = SimpleNamespace(define_schema=lambda: schema)
    execute = limits.checked(lambda cls, a, b: (a, b)).__func__
    assert execute(node, 1, 2) == execute(node, 1, b=2) == (1, 2)
    with pytest.raises(ValueError, match="b is 6"):
        execute(node, 1, 6)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_a_camera_file_whose_name_is_not_utf_8(tmp_path, monkeypatch):
    """A message that holds the name as it is could not be logged, which ends the worker of ComfyUI."""
    (tmp_path / "good.json").write_text("{}")
    with open(os.fsencode(tmp_path) + b"/bad\xff.json", "w") as file:
        file.write("{}")
    monkeypatch.setattr("folder_paths.get_input_directory", lambda: str(tmp_path))
    assert declared(camera.WorldStereoLoadCamera, "camera").options == ["good.json"]
    for work in (partial(run, camera.WorldStereoLoadCamera), camera.WorldStereoLoadCamera.fingerprint_inputs):
        with pytest.raises(ValueError, match=r"camera.*bad\\+udcff.json") as caught:
            work(camera="bad\udcff.json")
        assert str(caught.value).isprintable() and str(caught.value).encode()


@pytest.mark.parametrize(
    ("images", "intrinsics"),
    [("images.txt", "cameras.txt"), ("Images.txt", "cameras.txt"), ("images.txt", "Cameras.TXT"),
     ("a_IMAGES.txt", "A_cameras.txt"), ("1_images.TXT", "1_Cameras.txt")],
)  # fmt: skip
def test_a_colmap_pair_of_different_case(images, intrinsics, tmp_path):
    (tmp_path / images).write_text("1 1 0 0 0 0 0 0 1 a.png\n\n")
    with pytest.raises(ValueError, match=f"{images}. .*cameras.txt"):
        read_cameras(tmp_path / images)
    (tmp_path / "other_cameras.txt").write_text("")
    (tmp_path / intrinsics).write_text("1 PINHOLE 32 24 30 30 16 12\n")
    assert len(read_cameras(tmp_path / images)[0]) == 1


@pytest.mark.parametrize("name", ["positive", "negative"])
@pytest.mark.parametrize("value", [None, [], "x", [["x", {}]], [[torch.zeros(1, 2, 8)]]])
def test_the_prompts_are_looked_at_before_anything_is_encoded(name, value, monkeypatch):
    from fuzz.inputs import model

    class Encoded(Exception):
        pass

    def encode(pixels):
        raise Encoded

    stub = Vae()
    monkeypatch.setattr(stub, "encode", encode)
    prompt = [[torch.zeros(1, 2, 8), {}]]
    inputs = dict(
        model=model(), positive=prompt, negative=prompt, vae=stub, image=IMAGE, render_video=IMAGE,
        render_mask=torch.ones(1, 24, 32), cameras=cameras(1),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"^{name} is "):
        run(model_nodes.WorldStereoConditioning, **(inputs | {name: value}))
    with pytest.raises(Encoded):  # with good ones it comes to that
        run(model_nodes.WorldStereoConditioning, **inputs)


@pytest.mark.parametrize("name", ["video_prefix", "scene_prefix"])
@pytest.mark.parametrize("prefix", ["../x", "/x", "a/../../x", "..\\x", ".."])
def test_an_exploration_outside_the_output_folder_does_not_start(name, prefix):
    links = ("scene", "model", "positive", "negative", "vae", "sampler", "sigmas")
    inputs = {key: ["1", 0] for key in links} | dict(
        paths=next(iter(LISTS)), own_list="", stop_after=1, keyframes=5, references=4, noise_seed=0, cfg=1.0,
        video_prefix="", scene_prefix="",
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"^{name}: .* leads outside the output folder"):
        run(scene_nodes.WorldStereoExploreScene, **(inputs | {name: prefix}))
    assert run(scene_nodes.WorldStereoExploreScene, **(inputs | {name: "a/b"})).expand


@pytest.mark.parametrize("name", ["video_prefix", "scene_prefix"])
@pytest.mark.parametrize(("prefix", "words"), [("a\0b", "holds a NUL"), ("é" * 101, "is too long a name")])
def test_an_explorations_prefix_is_named(name, prefix, words):
    with pytest.raises(ValueError, match=f"^{name}: .* {words}"):
        check_prefix(name, prefix)


def test_a_large_picture_is_previewed_small(monkeypatch):
    """Core's writing of it takes seconds and cannot be interrupted."""
    shown = []
    monkeypatch.setattr("comfy_api.latest.ui.PreviewImage", lambda picture, cls: shown.append(picture))
    small, large = torch.rand(1, 480, 832, 3), torch.rand(1, 2048, 4096, 3)
    common.preview_of(None, small)
    common.preview_of(None, large)
    assert shown[0] is small and shown[1].shape == (1, 512, 1024, 3)


def test_a_panorama_that_is_not_twice_as_wide_as_high_is_reported(caplog):
    height, width = 64, 96
    depth = torch.rand(1, height, width) + 1
    panorama = {"depth": depth, "mask": depth > 0, "image": torch.rand(1, height, width, 3)}
    start = dict(depth_picture=DEPTH_PICTURES[0], near=1.0, far=10.0, width=64, height=48)
    view = dict(yaw=0.0, pitch=0.0, fov=75.0, width=64, height=48)
    for name, work in (
        ("Start Scene", lambda: run(scene_nodes.WorldStereoStartScene, image=panorama["image"], depth=panorama, **start)),
        ("Panorama", lambda: run(camera.WorldStereoPanorama, moge_geometry=panorama, **view)),
    ):  # fmt: skip
        caplog.clear()
        work()
        assert f"WorldStereo {name}: the panorama is 96x64" in caplog.text and "pad or crop it to 128x64" in caplog.text
    assert not_whole(64, 128) is None and not_whole(960, 1925) is None and not_whole(960, 2000)


def declared(node, name):
    return next(entry for entry in node.define_schema().inputs if entry.id == name)


def test_pictures_and_masks_that_are_cleaned(caplog):
    image = declared(camera.WorldStereoRender, "image")
    grey = limits.check(image, torch.rand(1, 4, 5, 1))
    assert grey.shape == (1, 4, 5, 3) and torch.equal(grey[..., 0], grey[..., 2])
    limits.check(image, torch.full((1, 4, 5, 3), 255.0))
    assert "pixels of image range from 255 to 255" in caplog.text
    mask = next(entry for node in nodes() for entry in node.define_schema().inputs if entry.id == "render_mask")
    assert limits.check(mask, torch.zeros(4, 5)).shape == (1, 4, 5)
    with pytest.raises(ValueError, match="render_mask is 1×1×4×5"):
        limits.check(mask, torch.zeros(1, 1, 4, 5))


def test_cameras_of_numbers_that_float32_does_not_hold(tmp_path):
    pose, K = torch.eye(4, dtype=torch.float64)[None].clone(), torch.tensor([[[50.0, 0, 16], [0, 50, 12], [0, 0, 1]]])
    pose[0, 0, 3] = 1e39
    with pytest.raises(ValueError, match="Camera 0 of 1 .*: its pose holds a number of 1e\\+12 or more"):
        Cameras(pose, K, 32, 24)
    K = K.double()
    K[0, 0, 0] = 1e-50
    with pytest.raises(ValueError, match="its focal length is below 0.001 pixels"):
        Cameras(torch.eye(4)[None], K, 32, 24)
    path = tmp_path / "camera.json"
    path.write_text(
        json.dumps({"extrinsic": torch.eye(4).tolist(), "intrinsic": 10**400, "width": 10**5000 // 10**4990})
    )
    with pytest.raises(ValueError, match="camera.json"):
        read_cameras(path)


def test_frames_times_keys_is_linear(tmp_path):
    frame = {"transform_matrix": torch.eye(4).tolist()}
    keys = {f"key_{number}": 0 for number in range(40_000)}
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({"w": 32, "h": 24, "fl_x": 30, **keys, "frames": [frame] * 8000}))
    start = time.monotonic()
    assert len(read_cameras(path)[0]) == 8000
    assert time.monotonic() - start < 10  # 320 million copied keys before


@pytest.mark.parametrize("name", ["transforms.json", "images.txt", "realestate.txt"])
def test_reading_can_be_interrupted(name, tmp_path, monkeypatch):
    frame = {"transform_matrix": torch.eye(4).tolist()}
    text = {
        "transforms.json": json.dumps({"w": 32, "h": 24, "fl_x": 30, "frames": [frame] * 5}),
        "images.txt": "1 1 0 0 0 0 0 0 1 a.png\n\n",
        "realestate.txt": "0 1 1 .5 .5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n",
    }
    (tmp_path / name).write_text(text[name])
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 32 24 30 30 16 12\n")
    monkeypatch.setattr(management, "interrupt_processing", True)
    with pytest.raises(management.InterruptProcessingException):
        read_cameras(tmp_path / name)


def points_file(folder, name):
    """More points than are read at once."""
    if name == "cloud.ply":
        head = "ply\nformat binary_little_endian 1.0\nelement vertex 1000000\n"
        head += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
        (folder / name).write_bytes(head.encode() + bytes(12_000_000))
    else:
        (folder / name).write_text("1 0 0 0 9 9 9 0\n" * 200_000)
    return folder / name


def points_step():
    return folder_module._steps(lambda done, total: None, [])


FRAMES_5 = cameras(5)
POINTS_3M = PointCloud(torch.rand(3_000_000, 3), torch.rand(3_000_000, 3))
LONG_WORK = {  # and in how many pieces at least
    "render": (4, lambda folder: render(POINTS_3M, FRAMES_5)),
    "fuse": (5, lambda folder: fuse(POINTS, [torch.rand(24, 32, 3)] * 5, [torch.rand(24, 32) + 1] * 5, FRAMES_5)),
    "thin": (4, lambda folder: thin_by_voxels(POINTS_3M.points, 1_000_000)),
    "sizes": (5, lambda folder: splat_sizes(PointCloud(POINTS_3M.points[::3], POINTS_3M.colors[::3]))),
    "ply": (4, lambda folder: read_ply(points_file(folder, "cloud.ply"))),
    "points3D": (4, lambda folder: folder_module._read_points(points_file(folder, "points3D.txt"), points_step())),
    "save scene": (5, lambda folder: folder_module.write_scene(folder / "scene", scene())),
    "load scene": (5, lambda folder: folder_module.read_scene(saved_scene(folder))),
    "splat": (3, lambda folder: gaussians_of_scene(scene(deep=True), 1000)),
    "panorama": (27, lambda folder: scene_of_panorama(geometry(panorama=True), 32, 24)),
    "save cameras": (5, lambda folder: write_camera_json(folder / "camera.json", FRAMES_5)),
    "save frames": (
        5,
        lambda folder: write_world_mirror(folder / "f", torch.rand(5, 8, 8, 3), FRAMES_5, lambda n: None),
    ),
    "clip": (5, lambda folder: show.write_clip(folder / "clip.mp4", torch.rand(5, 16, 16, 3), 16)),
    "sheet": (5, lambda folder: contact_sheet(torch.rand(5, 16, 16, 3))),
    "check": (5, lambda folder: limits.check(declared(show.WorldStereoPreviewClip, "images"), torch.rand(5, 8, 8, 3))),
    "rays": (5, lambda folder: plucker(FRAMES_5.w2c, FRAMES_5.K, 24, 32)),
    "encode": (5, lambda folder: encode_keyframes(Vae(), torch.rand(5 * BATCH, 16, 16, 3))),
    "decode": (5, lambda folder: decode_keyframes(Vae(), torch.rand(1, 16, 5 * BATCH, 2, 2))),
}


def scene(deep: bool = False) -> Scene:
    """Three views, as started and a path long; deep: each with a depth."""
    found = fuzz_scene()
    depths = tuple(torch.rand(24, 32) + 1 for _ in found.names) if deep else found.depths
    return replace(found, depths=depths)


def saved_scene(folder):
    with pytest.MonkeyPatch.context() as patch:  # saving it is no part of the work
        patch.setattr(folder_module, "throw_exception_if_processing_interrupted", lambda: None)
        patch.setattr(pictures_module, "throw_exception_if_processing_interrupted", lambda: None)
        folder_module.write_scene(folder / str(time.monotonic_ns()), scene())
    return max(folder.iterdir())


@pytest.mark.parametrize("name", LONG_WORK)
def test_long_work_looks_at_the_stop_button(name, tmp_path, monkeypatch):
    """The button is pressed after a piece: the next piece is not begun, and nothing is left behind."""
    pieces, work = LONG_WORK[name]
    looks = []

    def look(stop_at):
        if len(looks) < stop_at:  # a video's file is closed after the last look, with another one
            looks.append(time.monotonic())
        if len(looks) == stop_at:
            raise management.InterruptProcessingException

    ours = [module for key, module in sys.modules.items() if key.startswith("worldstereo_fp8.") and key[-5:] != ".core"]
    for stop_at in (pieces, 2):
        looks.clear()
        for module in ours:
            if hasattr(module, "throw_exception_if_processing_interrupted"):
                monkeypatch.setattr(module, "throw_exception_if_processing_interrupted", partial(look, stop_at))
        with pytest.raises(management.InterruptProcessingException):
            work(tmp_path)
        assert len(looks) == stop_at and not list(tmp_path.glob("*.writing"))
        gaps = [after - before for before, after in zip(looks, looks[1:], strict=False)]
        assert max(gaps) < 10  # seconds; far less on a machine that does nothing else


def test_a_librarys_call_is_left_behind():
    """The stop button ends the waiting at once, not the call."""
    ended = threading.Event()
    press = threading.Timer(0.3, lambda: management.interrupt_current_processing(True))
    press.start()
    start = time.monotonic()
    with pytest.raises(management.InterruptProcessingException):
        stoppable(ended.wait, 60)
    assert time.monotonic() - start < 10
    ended.set()
    assert stoppable(lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(KeyError):
        stoppable({}.__getitem__, 1)
    with torch.inference_mode():
        assert stoppable(torch.zeros, 2).is_inference()


@pytest.mark.parametrize("count", [MAX_CAMERAS + 1])
def test_files_of_too_many_cameras(count, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"extrinsic": [0] * count, "intrinsic": []}))
    (tmp_path / "b.json").write_text(json.dumps({"frames": [{}] * count}))
    (tmp_path / "c.txt").write_text("0 1 1 .5 .5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n" * count)
    for name in ("a.json", "b.json", "c.txt"):
        with pytest.raises(ValueError, match=f"{name}. .*{count} cameras; at most {MAX_CAMERAS} are read"):
            read_cameras(tmp_path / name)


@pytest.mark.parametrize("content", [b"[]," * (20 << 20), b"[" * (60 << 20), b'"' * (60 << 20), b"0," * (30 << 20)])
def test_a_large_json_is_refused_before_it_is_parsed(content):
    start = time.monotonic()
    with pytest.raises(ValueError, match="x (holds more than|is nested|is not JSON)"):
        bounded_json.parse(content, "x", limit=bounded_json.CAMERA_LIMIT)
    assert time.monotonic() - start < 3


def test_5000_cameras_are_not_rendered():
    many = cameras(5000).scaled_to(768, 480)
    with pytest.raises(ValueError, match="cameras holds 5000: their render of 768x480 would take 29.5 GB"):
        render(POINTS, many)
    assert RENDER_LIMIT < 29.5e9


@pytest.mark.parametrize("line", ["a: orbit left " + "9" * 400, "a: dolly in 101", "a" * 101 + ": dolly in 1"])
def test_a_walk_is_bounded(line):
    with pytest.raises(ValueError, match="line 1: .* at most"):
        read_walks(line)


MEASURE = """
import sys, test_bounds
from pathlib import Path
def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
work, result_bytes = getattr(test_bounds, "big_" + sys.argv[1])(Path(sys.argv[2]))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
result = work()
print(status("VmHWM") - before - result_bytes)
"""


def refused(work):
    def refuse():
        with pytest.raises(ValueError):
            work()

    return refuse


def big_render(folder):
    """8.4 megapixels a frame, as many points."""
    image = torch.rand(1, 2048, 4096, 3)
    depth = geometry() | {
        "depth": torch.rand(1, 2048, 4096) * 0.1 + 1,
        "mask": torch.ones(1, 2048, 4096, dtype=torch.bool),
    }
    depth.pop("image")
    inputs = RENDER | dict(image=image, depth=depth, cameras=cameras(2), width=4096, height=2048, radius=0.001)
    return lambda: run(camera.WorldStereoRender, **inputs), 2 * 2048 * 4096 * 16


def big_conditioning(folder):
    """21 frames of 4K."""
    from fuzz.inputs import model
    from worldstereo_fp8.comfy_nodes.model import WorldStereoConditioning

    video = torch.rand(1, 2160, 3840, 3)
    inputs = dict(
        model=model(), positive=[[torch.zeros(1, 2, 8), {}]], negative=[[torch.zeros(1, 2, 8), {}]], vae=Vae(),
        image=video, render_video=video.expand(21, -1, -1, -1), render_mask=torch.ones(1, 2160, 3840).expand(21, -1, -1),
        cameras=cameras(21),
    )  # fmt: skip
    return lambda: run(WorldStereoConditioning, **inputs), 0


def big_save(folder):
    """The most cameras."""
    from worldstereo_fp8.scene.cameras import write_camera_json

    many = cameras(MAX_CAMERAS)
    return lambda: write_camera_json(folder / "camera.json", many), 0


def big_load(folder):
    """64 MB of numbers."""
    path = folder / "camera.json"
    path.write_bytes(b'{"extrinsic": [' + b"0.1," * (15 << 20) + b"0]}")
    return refused(lambda: read_cameras(path)), 0


def big_text(folder):
    """60 MB of empty lines, and a line of 20 million fields."""
    path = folder / "images.txt"
    path.write_bytes(b"\n" * (60 << 20))
    (folder / "cameras.txt").write_bytes(b"1 PINHOLE 32 24 " + b"1 " * (20 << 20))
    return refused(lambda: read_cameras(path)), 0


def big_explore(folder):
    """4000 paths."""
    text = "\n".join(f"p{n}: dolly in 1" for n in range(4000))
    return refused(lambda: read_walks(text)), 0


def big_fuse(folder):
    """5 frames of 832x480 into two million points."""
    from worldstereo_fp8.scene.fuse import fuse

    cloud = PointCloud(
        torch.rand(2_000_000, 3) * torch.tensor([4, 3, 0.1]) + torch.tensor([-2, -1.5, 1.0]), torch.rand(2_000_000, 3)
    )
    frames = [torch.zeros(480, 832, 3, dtype=torch.uint8)] * 5
    depths = [torch.full((480, 832), 1.0)] * 5
    return lambda: fuse(cloud, frames, depths, cameras(5).scaled_to(832, 480)), 2_000_000 * 24


def big_scene(folder):
    """27 views of 1920x1080 of a panorama."""
    from worldstereo_fp8.scene.start import scene_of_panorama

    height, width = 2048, 4096
    depth = torch.rand(1, height, width) + 1
    panorama = {
        "depth": depth,
        "mask": torch.ones_like(depth, dtype=torch.bool),
        "image": torch.rand(1, height, width, 3),
    }
    return lambda: scene_of_panorama(panorama, 1920, 1080), 27 * 1920 * 1080 * 7


def big_ply(folder):
    """As many points as are read, of as many bytes each as the largest file leaves them. The file is sparse."""
    from worldstereo_fp8.scene.pointcloud import PLY_LIMIT, PLY_POINTS, read_ply

    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    properties += "".join(f"property uchar {channel}\n" for channel in ("red", "green", "blue", *"abcdefgh"))
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {PLY_POINTS}\n{properties}end_header\n"
    path = folder / "cloud.ply"
    path.write_text(head)
    os.truncate(path, len(head) + PLY_POINTS * 23)
    assert path.stat().st_size > 0.8 * PLY_LIMIT
    return lambda: read_ply(path), PLY_POINTS * 24


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured through Linux's /proc")
@pytest.mark.parametrize("work", ["render", "conditioning", "save", "load", "text", "explore", "fuse", "scene", "ply"])
def test_memory_beside_the_result(work, tmp_path, forker):
    taken = int(forker.run(MEASURE, work, tmp_path).split()[-1])
    assert taken < LIMIT
    print(work, f"{taken / 1e9:.2f} GB")
