"""A scene as a folder: exact for this pack, readable by others, never half; and folders that others wrote."""

import contextlib
import json
import os
import signal
import time
import tracemalloc

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from test_fuse import off_the_surface, orbit, photographs
from worldstereo_fp8.comfy_nodes import files as node_files
from worldstereo_fp8.comfy_nodes.scene_files import WorldStereoLoadScene, WorldStereoSaveScene
from worldstereo_fp8.scene import folder
from worldstereo_fp8.scene.camera_files import read_cameras
from worldstereo_fp8.scene.cameras import rigid_inverse
from worldstereo_fp8.scene.depth import points_from_depth
from worldstereo_fp8.scene.folder import MAX_PIXELS, read_scene, write_scene
from worldstereo_fp8.scene.pointcloud import read_ply
from worldstereo_fp8.scene.scene import Scene, TakenPath, to_bytes

try:
    import resource
except ImportError:
    resource = None

WIDTH, HEIGHT = 64, 48


@pytest.fixture(scope="module")
def scene():
    cameras = orbit([0, 10, 20, 30], WIDTH, HEIGHT, 60.0)
    pictures, depths = photographs(cameras)
    depths = [depth.clone() for depth in depths]
    depths[1][0, :5] = torch.inf
    cloud = points_from_depth(pictures[0], depths[0], cameras.w2c[0], cameras.K[0])
    return Scene(
        to_bytes(torch.stack(pictures)),
        cameras,
        ("start", "path 1/0003", "../../evil\\ümlaut:*", "path 1/0020"),
        (depths[0], depths[1], None, depths[3]),
        cloud,
        (TakenPath("path 1", orbit(np.linspace(0, 30, 21), 832, 480, 600.0), (1, 3)),),
    )


@pytest.fixture
def saved(scene, tmp_path):
    write_scene(tmp_path / "saved", scene)
    return tmp_path / "saved"


def assert_same(a, b):
    assert a.names == b.names and len(a.paths) == len(b.paths)
    assert all(torch.equal(x, y) for x, y in zip(a.pictures, b.pictures, strict=True))
    for x, y in zip(a.depths, b.depths, strict=True):
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y))
    pairs = [(a.cameras, b.cameras), *((p.cameras, q.cameras) for p, q in zip(a.paths, b.paths))]
    for x, y in pairs:
        assert torch.equal(x.w2c, y.w2c) and torch.equal(x.K, y.K) and (x.width, x.height) == (y.width, y.height)
    assert [(p.name, p.views) for p in a.paths] == [(p.name, p.views) for p in b.paths]
    assert torch.equal(a.cloud.points, b.cloud.points) and torch.equal(a.cloud.colors, b.cloud.colors)


def test_a_scene_comes_back_exact(scene, saved):
    done = []
    loaded, kind = read_scene(saved, lambda *bytes_: done.append(bytes_))
    assert_same(loaded, scene)
    assert kind == "a saved scene" and len(done) == 1 + 4
    assert done == sorted(done) and done[0][0] > 0 and all(total == done[-1][0] for _, total in done)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["saved"]
    assert sorted(path.name for path in (saved / "images").iterdir())[:2] == ["0000_start.png", "0001_path_1_0003.png"]


@pytest.mark.parametrize("points", ["sparse/0/points3D.txt", "cloud.ply"])
def test_reading_others_points_tells_how_far_it_is_and_can_be_interrupted(saved, monkeypatch, points):
    (saved / "scene.json").unlink()
    (saved / "transforms.json").unlink()
    (saved / "cameras.json").unlink()
    if points.endswith(".txt"):
        row = "1 0.5 0.25 2 10 20 30 0"
        (saved / points).write_text("\n".join([row] * 25_000), "utf-8")
    else:
        (saved / "sparse/0/points3D.txt").unlink()
    done = []
    read_scene(saved, lambda *bytes_: done.append(bytes_))
    assert len(done) == 4 + (3 if points.endswith(".txt") else 1)
    assert done == sorted(done) and done[-1] == (done[-1][1],) * 2
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 5:  # while the points are read
            raise InterruptedError

    monkeypatch.setattr(folder, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(InterruptedError):
        read_scene(saved)


def test_a_scene_without_points_or_depth_comes_back(tmp_path, scene):
    bare = Scene(scene.pictures, scene.cameras, scene.names, (None,) * 4, type(scene.cloud)(*[torch.zeros(0, 3)] * 2))
    write_scene(tmp_path / "bare", bare)
    assert_same(read_scene(tmp_path / "bare")[0], bare)


def only(folder, *kept):
    """The folder without the descriptions other than those named."""
    for name in ("scene.json", "scene.safetensors", "cameras.json", "transforms.json", "cloud.ply"):
        if name not in kept:
            (folder / name).unlink()
    if "sparse" not in kept:
        for path in (folder / "sparse" / "0").iterdir():
            path.unlink()
    return folder


@pytest.mark.parametrize("kept", [("transforms.json", "cloud.ply"), ("cameras.json", "cloud.ply"), ("sparse",)])
def test_each_description_gives_the_same_views_and_points(scene, saved, kept):
    loaded, _ = read_scene(only(saved, *kept))
    assert all(torch.equal(x, y) for x, y in zip(loaded.pictures, scene.pictures, strict=True))
    torch.testing.assert_close(loaded.cameras.w2c, scene.cameras.w2c)
    torch.testing.assert_close(loaded.cameras.K, scene.cameras.K)
    torch.testing.assert_close(loaded.cloud.points, scene.cloud.points, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loaded.cloud.colors, scene.cloud.colors, rtol=0, atol=0.5001 / 255)
    assert off_the_surface(loaded.cloud.points).median() < 1e-4


def test_others_read_it(scene, saved):
    """By the formats' own words: nerfstudio's OpenGL camera-to-world, COLMAP's text, a plain PLY."""
    transforms = json.loads((saved / "transforms.json").read_text())
    assert (transforms["w"], transforms["h"]) == (WIDTH, HEIGHT) and len(transforms["frames"]) == 4
    frame = transforms["frames"][1]
    c2w = torch.tensor(frame["transform_matrix"])
    expected = rigid_inverse(scene.cameras.w2c)[1]
    torch.testing.assert_close(c2w[:3, 3], expected[:3, 3])
    torch.testing.assert_close(c2w[:3, 2], -expected[:3, 2])  # looks along -z
    assert frame["fl_x"] == frame["fl_y"] == 60 and (frame["cx"], frame["cy"]) == (32, 24)
    assert (saved / frame["file_path"]).is_file() and (saved / transforms["ply_file_path"]).is_file()

    colmap = saved / "sparse" / "0"
    images = [line for line in (colmap / "images.txt").read_text().split("\n") if not line.startswith("#")]
    assert len(images[0].split()) == 10 and images[1] == "" and images[0].split()[-1] == "0000_start.png"
    (camera,) = [line for line in (colmap / "cameras.txt").read_text().splitlines() if not line.startswith("#")]
    assert camera.split() == ["1", "PINHOLE", "64", "48", "60.0", "60.0", "32.0", "24.0"]
    points = np.loadtxt(colmap / "points3D.txt")
    assert points.shape == (len(scene.cloud), 8) and (points[:, 4:7] % 1 == 0).all()
    torch.testing.assert_close(read_cameras(colmap / "images.txt")[0].w2c, scene.cameras.w2c)

    mirror = json.loads((saved / "cameras.json").read_text())
    assert mirror["num_cameras"] == 4 and mirror["extrinsics"][0]["camera_id"] == "0000_start"
    torch.testing.assert_close(read_ply(saved / "cloud.ply").points, scene.cloud.points)


def test_plyfile_reads_the_cloud(scene, saved):
    plyfile = pytest.importorskip("plyfile")
    vertex = plyfile.PlyData.read(saved / "cloud.ply")["vertex"]
    assert np.allclose(np.stack([vertex[axis] for axis in "xyz"], 1), scene.cloud.points)
    assert vertex["red"].dtype == np.uint8


def test_a_bank_of_views_is_read(scene, tmp_path):
    bank = {}
    for number, picture in enumerate(scene.pictures):
        Image.fromarray(picture.numpy()).save(tmp_path / f"{number:04}.jpg")
        w2c, K = scene.cameras.w2c[number].tolist(), scene.cameras.K[number].tolist()
        bank[f"{number:04}"] = {"intrinsic": K, "extrinsic": w2c}
    (tmp_path / "cameras.json").write_text(json.dumps(bank))
    loaded, kind = read_scene(tmp_path)
    assert loaded.names == ("0000", "0001", "0002", "0003") and kind == "a bank of views"
    assert torch.equal(loaded.cameras.w2c, scene.cameras.w2c) and len(loaded.cloud) == 0


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "scene.json").write_text("{"), "scene.json is not JSON"),
        (lambda f: (f / "scene.json").write_text("[]"), "scene.json cannot be read as a scene"),
        (lambda f: change(f / "scene.json", '"version": 1', '"version": 2'), "Update it"),
        (lambda f: change(f / "scene.json", '"width": 64', '"width": 1e3'), "`width` is 1000.0"),
        (lambda f: change(f / "scene.json", '"width": 64', '"width": 99999999'), "more than a scene holds"),
        (lambda f: change(f / "scene.json", '"width": 64', '"width": 63'), "not F32"),
        (lambda f: change(f / "scene.json", '"name": "path 1"', '"name": 5'), "a path has no name"),
        (lambda f: change(f / "scene.json", '"names"', '"nam\\u001bes"'), "it has no 'names'"),
        (lambda f: change(f / "scene.json", '"start"', '"path 1/0003"'), "picture 0000_path_1_0003.png is missing"),
        (lambda f: change(f / "scene.json", '"start"', '"st\\ud800rt"'), "missing|is inconsistent"),
        (lambda f: change(f / "scene.json", "1,\n", "9,\n"), "cannot be read as a scene"),
        (lambda f: (f / "scene.safetensors").write_bytes(b"\xff" * 100), "scene.safetensors .*damaged"),
        (lambda f: os.truncate(f / "scene.safetensors", 5000), "scene.safetensors .*damaged"),
        (lambda f: (f / "scene.safetensors").unlink(), "scene.safetensors .*damaged"),
        (lambda f: (f / "images" / "0000_start.png").unlink(), "0000_start.png is missing"),
        (lambda f: os.truncate(f / "images" / "0000_start.png", 300), "0000_start.png cannot be used"),
        (lambda f: Image.new("RGB", (8, 8)).save(f / "images" / "0000_start.png"), "it is 8x8 and the others 64x48"),
        (lambda f: (only(f), None), "is not a scene folder"),
        (
            lambda f: change(only(f, "transforms.json") / "transforms.json", "images/0000_start.png", "../../x.png"),
            "nor",
        ),
        (lambda f: change(only(f, "transforms.json") / "transforms.json", '"file_path"', '"path"'), "no `file_path`"),
        (lambda f: (only(f, "cameras.json") / "cameras.json").write_text('{"a": 5}'), "cameras.json is neither"),
        (lambda f: (only(f, "cameras.json") / "cameras.json").write_text("{}"), "cameras.json holds no cameras"),
        (
            lambda f: (only(f, "sparse") / "sparse/0/points3D.txt").write_text("1 2"),
            "points3D.txt, line 1 is not a point",
        ),
        (
            lambda f: (only(f, "transforms.json", "cloud.ply") / "cloud.ply").write_bytes(b"ply\n"),
            "cloud.ply is not a bin",
        ),
        (lambda f: os.truncate(only(f, "transforms.json", "cloud.ply") / "cloud.ply", 400), "cloud.ply cannot be read"),
    ],
)
def test_what_is_spoilt_is_named(saved, spoil, message):
    spoil(saved)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        read_scene(saved)
    str(caught.value).encode("utf-8")
    assert len(str(caught.value)) < 800


def test_pictures_outside_the_folder_are_not_read(saved, tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "outside.png")
    transforms = only(saved, "transforms.json") / "transforms.json"
    change(transforms, "images/0000_start.png", "../outside.png")
    with pytest.raises(ValueError, match="outside its folder: ../outside.png"):
        read_scene(saved)
    change(transforms, "../outside.png", "images/link.png")
    (saved / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(ValueError, match="outside its folder"):
        read_scene(saved)


@pytest.mark.parametrize(
    ("description", "file"),
    [
        ("scene.json", "scene.json"),
        ("scene.json", "scene.safetensors"),
        ("scene.json", "images/0000_start.png"),
        ("transforms.json", "transforms.json"),
        ("transforms.json", "cloud.ply"),
        ("sparse", "sparse/0/points3D.txt"),
    ],
)
def test_links_to_files_outside_the_folder_are_not_followed(saved, tmp_path, description, file):
    if description != "scene.json":
        only(saved, description, file)
    (saved / file).rename(tmp_path / "outside")
    (saved / file).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{os.path.basename(file)} is a link to a file outside saved"):
        read_scene(saved)


def test_only_pictures_formats_are_decoded(saved, monkeypatch):
    """Pillow goes by the content, and has Ghostscript run PostScript."""
    ran = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *given: ran.append(given))
    picture = saved / "images" / "0000_start.png"
    for name in ("EPS", "GIF", "TIFF", "BMP"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(picture, name)
        with pytest.raises(ValueError, match="The picture 0000_start.png cannot be used: cannot identify image file"):
            read_scene(saved)
    assert not ran


def test_one_picture_is_bounded(saved):
    transforms = only(saved, "transforms.json") / "transforms.json"
    content = json.loads(transforms.read_text())
    transforms.write_text(json.dumps(content | {"frames": content["frames"][:1]}))
    Image.new("1", (8193, 8192)).save(saved / "images" / "0000_start.png")  # 30 kB
    with pytest.raises(ValueError, match="0000_start.png cannot be used: it is 8193x8192; at most 64 megapixels"):
        read_scene(saved)


def test_a_png_that_promises_4_gigabytes(saved):
    picture = saved / "images" / "0000_start.png"
    content = picture.read_bytes()
    place = content.index(b"IDAT")
    picture.write_bytes(content[: place - 4] + b"\xff\xff\xff\xf0" + content[place:])
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            read_scene(saved)
        assert tracemalloc.get_traced_memory()[1] < 1 << 28
    finally:
        tracemalloc.stop()


def test_points_whose_colour_is_no_number(saved):
    points = only(saved, "sparse") / "sparse" / "0" / "points3D.txt"
    points.write_text("1 0 0 1 9 nan 9 0\n")
    with pytest.raises(ValueError, match="points3D.txt cannot be used. .* holds colours that are NaN"):
        read_scene(saved)


def test_a_picture_of_a_longer_name_than_files_have(saved):
    change(only(saved, "transforms.json") / "transforms.json", "images/0000_start.png", "x" * 5000)
    with pytest.raises(ValueError, match=r"The picture x+… \(5000 characters\) that transforms.json names"):
        read_scene(saved)


def test_pictures_of_any_number_are_bounded(saved, monkeypatch):
    monkeypatch.setattr("worldstereo_fp8.scene.folder.MAX_PIXELS", 4 * WIDTH * HEIGHT - 1)
    with pytest.raises(ValueError, match="more than a scene holds"):
        read_scene(saved)
    with pytest.raises(ValueError, match="more than a scene holds"):
        read_scene(only(saved, "transforms.json"))
    assert MAX_PIXELS < 1 << 30


@pytest.mark.skipif(resource is None, reason="Windows limits no file's size")
@pytest.mark.parametrize("room", [1000, 20_000, 40_000])
def test_a_full_disk_leaves_nothing(scene, tmp_path, room):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="full could not be written"):
            write_scene(tmp_path / "full", scene)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_half_scene(scene, saved, tmp_path, forker):
    """Another process saves the scene again and again, and is killed at some point; what stands is whole."""
    script = (
        "import sys; from pathlib import Path\n"
        "from worldstereo_fp8.scene.folder import read_scene, write_scene\n"
        "scene = read_scene(Path(sys.argv[1]))[0]\n"
        "for number in range(10000): write_scene(Path(sys.argv[2]) / f'scene_{number}', scene)\n"
    )
    target = tmp_path / "target"
    target.mkdir()
    saver = forker.start(script, saved, target)
    deadline = time.monotonic() + 60
    while not (target / "scene_0").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.07)
    os.kill(saver, signal.SIGKILL)
    assert forker.wait()[0] == -signal.SIGKILL
    whole = [path for path in target.iterdir() if not path.name.startswith(".")]
    assert whole
    for path in whole:
        assert_same(read_scene(path)[0], scene)


def test_the_nodes_save_and_load_in_comfyuis_folders(scene, tmp_path, monkeypatch):
    for kind in ("output", "input"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    monkeypatch.setattr(WorldStereoSaveScene, "hidden", type("Hidden", (), {"unique_id": None}), raising=False)
    monkeypatch.setattr(WorldStereoLoadScene, "hidden", type("Hidden", (), {"unique_id": None}), raising=False)
    for number in (1, 2):
        assert WorldStereoSaveScene.execute(scene, "a/room").args[0] is scene
        assert (tmp_path / "output" / "a" / f"room_{number:05}_" / "scene.json").is_file()
    write_scene(tmp_path / "input" / "given", scene)
    listed = ["a/room_00001_ [output]", "a/room_00002_ [output]", "given [input]"]
    assert node_files.scene_folders() == listed
    for name in listed:
        assert_same(WorldStereoLoadScene.execute(name).args[0], scene)
    stamp = WorldStereoLoadScene.fingerprint_inputs("given [input]")
    os.utime(tmp_path / "input" / "given" / "scene.json", (1, 1))
    assert WorldStereoLoadScene.fingerprint_inputs("given [input]") != stamp
    for name in ("../given [input]", "given [output]", str(tmp_path), "given", ""):
        with pytest.raises(ValueError, match="not a scene folder in ComfyUI's"):
            WorldStereoLoadScene.execute(name)
