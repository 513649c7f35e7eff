"""The camera and render nodes on a real ComfyUI server, and the files they write."""

import json
import os
import shutil
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from test_workflow import PLACEHOLDERS
from worldstereo_fp8.comfy_nodes.files import camera_file, camera_files
from worldstereo_fp8.demo import job, scene, server
from worldstereo_fp8.scene.camera_files import read_cameras
from worldstereo_fp8.scene.cameras import centres, rigid_inverse

EXAMPLES = Path(__file__).parents[1] / "example_workflows"
WIDTH, HEIGHT, KEYFRAMES = 96, 64, 5


def prepare(base):
    job.prepare(base)
    for name in (*PLACEHOLDERS, "geometry_estimation/moge_2_vitl_normal_fp16.safetensors"):
        (base / "models" / name).parent.mkdir(exist_ok=True)
        (base / "models" / name).touch()
    gradient = np.linspace(40, 250, WIDTH * HEIGHT * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
    Image.fromarray(gradient).save(base / "input" / "picture.png")
    Image.fromarray(gradient).resize((1024, 512)).save(base / "input" / "panorama.png")
    Image.fromarray(gradient.mean(-1).astype(np.uint8)).save(base / "input" / "depth.png")
    (base / "input" / "cameras.txt").write_text("1 PINHOLE 96 64 80 80 48 32")
    (base / "input" / "images.txt").write_text("1 1 0 0 0 0 0 0 1 a.png\n\n2 1 0 0 0 0.1 0 0 1 b.png\n")


def graph(**nodes):
    """A prompt of nodes by name, each (class type, inputs); a link is ("name", output)."""
    return {
        name: {
            "class_type": kind,
            "inputs": {key: list(value) if isinstance(value, tuple) else value for key, value in inputs.items()},
        }
        for name, (kind, inputs) in nodes.items()
    }


def defaults(comfyui, kind, **inputs):
    """The inputs of a node: these, and the default of every other widget."""
    declared = comfyui.object_info(kind)[kind]["input"]
    values = {}
    for name, (type_, *options) in (declared.get("required", {}) | declared.get("optional", {})).items():
        options = options[0] if options else {}
        if "default" in options:
            values[name] = options["default"]
        elif type_ == "COMBO":
            values[name] = options["options"][0]
    return kind, values | inputs


def render(comfyui, image=("picture", 0), depth=("moge", 0), cameras=("path", 0), width=WIDTH, height=HEIGHT, **inputs):
    """A WorldStereo Render, small unless the inputs say otherwise."""
    links = dict(image=image, depth=depth, cameras=cameras)
    return defaults(comfyui, "WorldStereoRender", width=width, height=height, **links, **inputs)


def test_from_a_picture_to_the_files(comfyui):
    outputs = comfyui.run(
        graph(
            picture=("LoadImage", {"image": "picture.png"}),
            moge=("WorldStereoDemoGeometry", {"image": ("picture", 0)}),
            path=defaults(
                comfyui, "WorldStereoCameraPath", image=("picture", 0), scene=("moge", 0), keyframes=KEYFRAMES
            ),
            render=render(comfyui, radius=0.04),
            mask=("MaskToImage", {"mask": ("render", 1)}),
            frames=("SaveImage", {"images": ("render", 0), "filename_prefix": "render"}),
            holes=("SaveImage", {"images": ("mask", 0), "filename_prefix": "holes"}),
            camera=defaults(comfyui, "WorldStereoSaveCamera", cameras=("path", 0)),
            cloud=defaults(comfyui, "WorldStereoSavePointCloud", points=("render", 2)),
            viewer=("PreviewPointCloud", {"model_3d": ("cloud", 0), "viewport_state": {}, "width": 64, "height": 64}),
            folder=defaults(comfyui, "WorldStereoSaveFrames", images=("render", 0), cameras=("path", 0)),
            named=defaults(
                comfyui, "WorldStereoSaveFrames", images=("render", 0), cameras=("path", 0), filename_prefix="a/b"
            ),
        )
    )
    output = comfyui.base / "output"
    frames = [np.asarray(Image.open(output / saved["filename"])) for saved in outputs["frames"]["images"]]
    holes = [np.asarray(Image.open(output / saved["filename"])) for saved in outputs["holes"]["images"]]
    assert len(frames) == len(holes) == KEYFRAMES
    assert (frames[0] == np.asarray(Image.open(comfyui.base / "input" / "picture.png"))).all() and not holes[0].any()
    assert 0 < (holes[-1] > 127).mean() < 0.5 and set(frames[-1][holes[-1][..., 0] > 127].ravel()) <= {127, 128}
    assert outputs["path"]["images"][0]["type"] == "temp"  # the drawing, on the node

    cameras = read_cameras(output / "worldstereo" / "camera_00001_.json")[0]
    assert (len(cameras), cameras.width, cameras.height) == (KEYFRAMES, WIDTH, HEIGHT)
    assert cameras.K[0, 0, 0].item() == pytest.approx(0.9 * WIDTH)  # the lens of the geometry

    saved = outputs["cloud"]["3d"][0]
    header, _, body = (output / saved["subfolder"] / saved["filename"]).read_bytes().partition(b"end_header\n")
    assert f"element vertex {len(body) // 15}\n".encode() in header and len(body) % 15 == 0 < len(body)
    viewed = next((comfyui.base / "temp").glob("preview_pointcloud_*.ply"))
    assert viewed.read_bytes() == header + b"end_header\n" + body

    folder = output / "worldstereo" / "frames_00001_"
    content = json.loads((folder / "cameras.json").read_text())
    names = [picture.stem for picture in sorted((folder / "images").iterdir())]
    assert names == [camera["camera_id"] for camera in content["extrinsics"]]
    assert names == [camera["camera_id"] for camera in content["intrinsics"]] and len(names) == KEYFRAMES
    c2w = torch.tensor([camera["matrix"] for camera in content["extrinsics"]])
    torch.testing.assert_close(rigid_inverse(c2w), cameras.w2c)
    assert (output / "a" / "b_00001_" / "cameras.json").is_file()


def test_a_panorama_starts_a_path(comfyui):
    outputs = comfyui.run(
        graph(
            picture=("LoadImage", {"image": "panorama.png"}),
            moge=("WorldStereoDemoPanoramaGeometry", {"image": ("picture", 0)}),
            start=defaults(
                comfyui,
                "WorldStereoPanorama",
                moge_geometry=("moge", 0),
                yaw=40.0,
                pitch=10.0,
                width=WIDTH,
                height=HEIGHT,
            ),
            path=defaults(
                comfyui,
                "WorldStereoCameraPath",
                image=("start", 0),
                scene=("start", 1),
                start=("start", 2),
                preset="dolly in",
                keyframes=KEYFRAMES,
            ),
            render=render(comfyui, image=("start", 0), depth=("start", 1), radius=0.08),
            frames=("SaveImage", {"images": ("render", 0), "filename_prefix": "panorama"}),
        )
    )
    frames = [
        np.asarray(Image.open(comfyui.base / "output" / saved["filename"]), np.float32)
        for saved in outputs["frames"]["images"]
    ]
    assert len(frames) == KEYFRAMES
    assert abs(frames[1] - frames[0]).mean() < 25  # a short step: much the same picture, though one is a render
    assert frames[-1].mean() > 30


def test_the_sample_scene_is_shown_without_writing_anything(comfyui):
    """No file and no model: the scene, its render beside it as a clip, a sheet, points and splats in 3-D."""
    before = sorted((comfyui.base / "output").rglob("*"))
    viewer = {"viewport_state": {}, "width": 64, "height": 64}
    outputs = comfyui.run(
        graph(
            sample=("WorldStereoSampleScene", {}),
            render=render(
                comfyui,
                image=("sample", 0),
                depth=("sample", 1),
                cameras=("sample", 4),
                width=208,
                height=128,
                radius=0.03,
            ),
            clip=("WorldStereoPreviewClip", {"images": ("render", 0), "render_video": ("render", 0), "fps": 16.0}),
            sheet=("PreviewImage", {"images": ("clip", 0)}),
            solid=("WorldStereoPointsTo3D", {"points": ("sample", 3)}),
            points=("PreviewPointCloud", {"model_3d": ("solid", 0)} | viewer),
            splat=("SplatToFile3D", {"splat": ("solid", 1), "format": "ply"}),
            splats=("PreviewGaussianSplat", {"model_3d": ("splat", 0)} | viewer),
        )
    )
    temp = comfyui.base / "temp"
    saved = outputs["clip"]["images"][0]
    assert saved["type"] == "temp"
    clip = scene.read_video(temp / saved["filename"])
    assert len(clip) == 21 and clip[0].shape == (128, 416, 3)
    assert abs(clip[10][:, :208].astype(float) - clip[10][:, 208:]).mean() < 4  # the same beside itself
    assert Image.open(temp / outputs["sheet"]["images"][0]["filename"]).width <= 1680
    kinds = [next(temp.glob(f"preview_{kind}_*.ply")).read_bytes()[:400] for kind in ("pointcloud", "splat")]
    assert b"uchar red" in kinds[0] and b"f_dc_0" in kinds[1]
    assert outputs["sample"]["images"][0]["type"] == "temp"
    assert sorted((comfyui.base / "output").rglob("*")) == before


def test_the_sample_panorama_starts_a_path(comfyui):
    comfyui.run(
        graph(
            sample=("WorldStereoSamplePanorama", {}),
            start=defaults(
                comfyui, "WorldStereoPanorama", moge_geometry=("sample", 1), width=WIDTH, height=HEIGHT, yaw=90.0
            ),
            frames=("SaveImage", {"images": ("start", 0), "filename_prefix": "sample_panorama"}),
        )
    )
    view = np.asarray(Image.open(comfyui.base / "output" / "sample_panorama_00001_.png"), np.float32)
    assert view.std() > 20 and view[0].mean() > 60  # a wall, lit


def test_paths_are_chained_and_files_loaded(comfyui):
    outputs = comfyui.run(
        graph(
            picture=("LoadImage", {"image": "picture.png"}),
            depth=("LoadImage", {"image": "depth.png"}),
            file=("WorldStereoLoadCamera", {"camera": "images.txt"}),
            path=defaults(comfyui, "WorldStereoCameraPath", image=("picture", 0), start=("file", 0), keyframes=4),
            camera=defaults(comfyui, "WorldStereoSaveCamera", cameras=("path", 0), filename_prefix="chained"),
            render=render(comfyui, depth=("depth", 0)),
            cloud=defaults(comfyui, "WorldStereoSavePointCloud", points=("render", 2), filename_prefix="chained"),
        )
    )
    cameras = read_cameras(comfyui.base / "output" / "chained_00001_.json")[0]
    assert len(cameras) == 2 + 4 - 1 and cameras.K[-1, 0, 0] == 80
    assert (comfyui.base / "output" / outputs["cloud"]["3d"][0]["filename"]).stat().st_size > 2000  # 15 bytes a point


def test_cores_camera_sets_the_first_pose(comfyui):
    """Core's axes have y up and look along -z; OpenCV's come out, and the path goes on from there."""
    comfyui.run(
        graph(
            picture=("LoadImage", {"image": "picture.png"}),
            viewer=defaults(
                comfyui,
                "CreateCameraInfo",
                **{
                    "mode": "look_at",
                    "mode.position_x": 1.0,
                    "mode.position_y": 2.0,
                    "mode.position_z": 4.0,
                    "target_x": 1.0,
                    "target_y": 2.0,
                    "target_z": 0.0,
                    "fov": 90.0,
                },
            ),
            path=defaults(
                comfyui,
                "WorldStereoCameraPath",
                image=("picture", 0),
                start=("viewer", 0),
                preset="dolly in",
                distance=0.5,
                keyframes=2,
            ),
            camera=defaults(comfyui, "WorldStereoSaveCamera", cameras=("path", 0), filename_prefix="viewer"),
        )
    )
    cameras = read_cameras(comfyui.base / "output" / "viewer_00001_.json")[0]
    torch.testing.assert_close(cameras.w2c[:, :3, :3], torch.eye(3).repeat(2, 1, 1))
    torch.testing.assert_close(centres(cameras.w2c), torch.tensor([[1.0, -2, -4], [1, -2, -2]]))  # half its 4 units
    assert cameras.K[0, 0, 0].item() == pytest.approx(HEIGHT / 2)


def test_frames_that_are_mostly_holes_are_named_in_the_log(comfyui):
    comfyui.run(
        graph(
            picture=("LoadImage", {"image": "picture.png"}),
            moge=("WorldStereoDemoGeometry", {"image": ("picture", 0)}),
            path=defaults(
                comfyui, "WorldStereoCameraPath", image=("picture", 0), preset="pan left", degrees=120.0, keyframes=4
            ),
            render=render(comfyui, radius=0.08),
            frames=("PreviewImage", {"images": ("render", 0)}),
        )
    )
    assert "these frames are more than half holes: 1, 2, 3." in comfyui.log.read_text("utf-8")


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("WorldStereoSaveCamera", {"filename_prefix": "../camera"}, "outside the output folder"),
        ("WorldStereoSavePointCloud", {"filename_prefix": "/tmp/points"}, "outside the output folder"),
        ("WorldStereoSaveFrames", {"filename_prefix": "a/../../frames"}, "outside the output folder"),
    ],
)
def test_nothing_is_written_outside_the_output_folder(comfyui, kind, changes, message):
    with pytest.raises(server.ServerError, match=f"(?s){kind}.*{message}"):
        comfyui.run(
            graph(
                picture=("LoadImage", {"image": "picture.png"}),
                moge=("WorldStereoDemoGeometry", {"image": ("picture", 0)}),
                path=defaults(comfyui, "WorldStereoCameraPath", image=("picture", 0), keyframes=2),
                render=render(comfyui),
                save=defaults(
                    comfyui,
                    kind,
                    **{
                        name: link
                        for name, link in (
                            ("cameras", ("path", 0)),
                            ("points", ("render", 2)),
                            ("images", ("render", 0)),
                        )
                        if name in comfyui.object_info(kind)[kind]["input"]["required"]
                    },
                    **changes,
                ),
            )
        )


def test_only_the_files_of_the_input_folder_are_read(monkeypatch, tmp_path):
    (tmp_path / "input").mkdir()
    for file in ("camera.json", "input/camera.json", "input/picture.png"):
        (tmp_path / file).touch()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    assert camera_files() == ["camera.json"]
    assert camera_file("camera.json") == tmp_path / "input" / "camera.json"
    for name in ("../camera.json", str(tmp_path / "camera.json"), "picture.png", ".", ""):
        with pytest.raises(ValueError, match="not a camera file in ComfyUI's input folder"):
            camera_file(name)


def at_toy_size(prompt):
    """A workflow with the toy model, stand-ins for the encoders and MoGe, and few steps."""
    stand_ins = job.STAND_INS | {
        "MoGeInference": "WorldStereoDemoGeometry",
        "MoGePanoramaInference": "WorldStereoDemoPanoramaGeometry",
    }
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in stand_ins:
            node["class_type"] = stand_ins[kind]
            node["inputs"] = {"image": inputs["image"]} if "image" in inputs else {}
        for widget, value in {
            "LoadWorldStereoFP8": ("model_name", job.MODEL),
            "VAELoader": ("vae_name", job.VAE),
            "BasicScheduler": ("steps", 2),
        }.items():
            if kind == widget:
                inputs[value[0]] = value[1]
        if kind == "WorldStereoPanorama":
            inputs |= {"width": 256, "height": 160}
    return {number: node for number, node in prompt.items() if node["class_type"] != "LoadMoGeModel"}


def test_the_first_workflow_runs_on_the_sample_scene_by_one_switch(comfyui):
    """The group of the picture bypassed, as Ctrl-B on it does: no picture, no MoGe; what it saves is one video."""
    workflow = json.loads((EXAMPLES / "picture_to_camera_move.json").read_text("utf-8"))
    x, y, width, height = next(group["bounding"] for group in workflow["groups"] if group["title"].startswith("2"))
    for node in workflow["nodes"]:
        if x <= node["pos"][0] < x + width and y <= node["pos"][1] < y + height:
            node["mode"] = server.BYPASSED
    prompt = at_toy_size(server.to_api(workflow, comfyui.object_info()))
    kinds = {node["class_type"] for node in prompt.values()}
    assert not kinds & {"LoadImage", "WorldStereoPicture", "WorldStereoDemoGeometry"}
    render = next(node["inputs"] for node in prompt.values() if node["class_type"] == "WorldStereoRender")
    render |= {"width": 208, "height": 128}
    path = next(node["inputs"] for node in prompt.values() if node["class_type"] == "WorldStereoCameraPath")
    path["keyframes"] = KEYFRAMES
    before = set((comfyui.base / "output").rglob("*"))
    outputs = comfyui.run(prompt)
    video = job.saved_video(comfyui.base, outputs)
    assert {path for path in (comfyui.base / "output").rglob("*") if path.is_file()} - before == {video}
    if folder := os.environ.get("SCREENSHOTS"):
        for number, output in outputs.items():
            for saved in output.get("images", []):
                source = comfyui.base / saved["type"] / saved["subfolder"] / saved["filename"]
                shutil.copyfile(source, Path(folder) / f"sample_{number}{source.suffix}")
