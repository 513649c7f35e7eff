"""Whatever the prefix, a save is numbered on, replaces nothing and is never half."""

import ast
import re
import time
import tracemalloc
from pathlib import Path

import folder_paths
import pytest
import torch
from worldstereo_fp8 import nodes
from worldstereo_fp8.comfy_nodes.files import prefix_of, save_output
from worldstereo_fp8.comfy_nodes.save import WorldStereoSaveCamera, WorldStereoSaveFrames, WorldStereoSavePointCloud
from worldstereo_fp8.comfy_nodes.show import write_clip
from worldstereo_fp8.scene.camera_files import read_cameras
from worldstereo_fp8.scene.cameras import Cameras, write_camera_json
from worldstereo_fp8.scene.pointcloud import PointCloud, read_ply, save_ply, write_world_mirror

try:
    import resource
except ImportError:
    resource = None

COUNT = 400
CAMERAS = Cameras(
    torch.eye(4).repeat(COUNT, 1, 1), torch.eye(3).repeat(COUNT, 1, 1) * torch.tensor([50, 50, 1]), 64, 48
)
POINTS = PointCloud(torch.rand(5000, 3), torch.rand(5000, 3))
FRAMES = torch.rand(3, 48, 64, 3)
WRITERS = {
    ".json": lambda path: write_camera_json(path, CAMERAS),
    ".ply": lambda path: save_ply(path, POINTS, y_up=False),
    "": lambda path: write_world_mirror(path, FRAMES, CAMERAS[:3], lambda pictures: None),
}


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PREFIXES = (
    "",
    " ",
    "/.",
    ".",
    "./",
    "//",
    "a/",
    "a/.",
    "a//b",
    "./a/./b/",
    "a\\b",
    "a\\b\\",
    "a/b/\\.",
    "%year%/",
    "ü/x",
    "_",
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", WRITERS)
def test_three_saves_of_any_prefix_are_three(output, prefix, suffix):
    nodes = {".json": WorldStereoSaveCamera, ".ply": WorldStereoSavePointCloud, "": WorldStereoSaveFrames}
    arguments = {".json": (CAMERAS,), ".ply": (POINTS,), "": (FRAMES, CAMERAS)}
    more = {".json": (), ".ply": ("OpenCV (y down, z forward)",), "": ()}
    kept = {}
    for number in range(3):
        nodes[suffix].hidden = type("Hidden", (), {"unique_id": None})
        try:
            nodes[suffix].execute(*arguments[suffix], prefix, *more[suffix])
        except Exception as error:
            assert prefix in ("/.", "//") and "outside the output folder" in str(error)
            assert everything(output) == {}
            return
        now = everything(output)
        assert kept.items() <= now.items() and len(now) > len(kept)
        kept = now
        places = list(output.rglob(f"*_{number + 1:05}_{suffix}"))
        assert len(places) == 1 and not any(part in ("", ".") for part in places[0].relative_to(output).parts)


def test_prefixes_are_read_alike_on_every_system():
    assert prefix_of("a\\b/.//c/") == prefix_of("a/b/c") == "a/b/c"
    assert prefix_of("") == prefix_of(" ") == prefix_of("./.") == "worldstereo"
    assert prefix_of("../a") == "../a" and prefix_of("/tmp/a") == "/tmp/a" and prefix_of("\\tmp") == "/tmp"
    with pytest.raises(ValueError, match="filename_prefix: .*NUL"):
        prefix_of("a\0b")


@pytest.mark.parametrize("prefix", ["../a", "/tmp/worldstereo_a", "a/../../b", "..\\a"])
def test_nothing_is_written_outside(output, prefix):
    before = sorted(output.parent.iterdir())
    with pytest.raises(Exception, match="outside the output folder"):
        save_output(prefix, ".json", lambda path: path.write_text("x"))
    assert sorted(output.parent.iterdir()) == before and everything(output) == {}


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_came_meanwhile_is_passed_over(output, suffix):
    """Another server takes the number after it was counted; a dangling link takes one too."""

    def write(path):
        if path.name == f"x_00001_{suffix}":
            path.write_text("another's") if suffix else (path.mkdir(), (path / "other").write_text("another's"))
        if path.name == f"x_00002_{suffix}":
            path.symlink_to(output / "nowhere")
        WRITERS[suffix](path)

    path, subfolder = save_output("s/x", suffix, write)
    assert path.name == f"x_00003_{suffix}" and subfolder == "s"
    first = output / "s" / f"x_00001_{suffix}"
    assert (first if suffix else first / "other").read_text() == "another's"
    assert (output / "s" / f"x_00002_{suffix}").is_symlink() and not (output / "nowhere").exists()


UNFINISHED = {  # what writes anything, and what cares for it: only files.atomic gives a file or folder its final name
    "comfy_nodes/files.py keep_in_temp new_file",
    "comfy_nodes/show.py write_clip new_file",
    "cook_worldstereo_fp8.py _write new_file",
    "cook_worldstereo_fp8.py write_report new_file",
    "fp8/cook.py cook new_large_file",
    "scene/cameras.py write_camera_json new_file",
    "scene/folder.py write_scene new_folder",
    "scene/pointcloud.py save_ply new_file",
    "scene/pointcloud.py write_world_mirror new_folder",
}
PARTS = {  # what writes into a folder that one of these has made
    "scene/folder.py _write_colmap",
    "scene/folder.py _write_json",
    "scene/folder.py _write_tensors",
    "scene/folder.py write_scene",
    "scene/pictures.py write_png",
    "scene/pointcloud.py write_world_mirror",
}
DIRECT = re.compile(r"""\.write_(?:text|bytes)\(|\bopen\([^)]*"[wxa]b?"|\.savez?\(|save_file\(|tofile\(""")


def test_every_writer_is_known():
    """Each is under test here, in test_scene_folder.py or in test_cook.py."""
    root, unfinished, parts = Path(nodes.__file__).parent, set(), set()
    rooms = ("comfy_nodes", "files", "fp8", "loaders", "remap", "scene", "worldstereo")
    for path in [root / "cook_worldstereo_fp8.py", *(path for room in rooms for path in (root / room).glob("*.py"))]:
        tree = ast.parse(path.read_text("utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            if path.name == "atomic.py" and function.name.startswith("new_"):
                continue
            text, place = ast.unparse(function), f"{path.relative_to(root).as_posix()} {function.name}"
            unfinished |= {f"{place} {used}" for used in re.findall(r"with (new_\w+)\(", text)}
            if DIRECT.search(text.replace("'", '"')) and not re.search(r"with new_(large_)?file\(", text):
                parts.add(place)
    assert unfinished == UNFINISHED and parts == PARTS


@pytest.mark.skipif(resource is None, reason="Windows limits no file's size")
@pytest.mark.parametrize("suffix", [*WRITERS, ".mp4"])
@pytest.mark.parametrize("room", [0, 3000])
def test_a_full_disk_leaves_nothing_and_is_reported(output, suffix, room):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="full_00001_.* could not be written: File too large"):
            save_output("full", suffix, (WRITERS | {".mp4": lambda path: write_clip(path, FRAMES, 16)})[suffix])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(output.iterdir()) == []


def whole(path, suffix):
    if suffix == ".json":
        return len(read_cameras(path)[0]) == COUNT
    if suffix == ".ply":
        return len(read_ply(path)) == len(POINTS)
    return len(list((path / "images").iterdir())) == 3 and (path / "cameras.json").read_text().rstrip().endswith("}")


@pytest.mark.parametrize("suffix", WRITERS)
def test_kills_leave_nothing_half_under_a_final_name(output, suffix, forker):
    script = (
        "import os, random, signal, sys, time; from pathlib import Path\n"
        "from test_save_files import WRITERS\n"
        "for run in range(20):\n"
        "    child = os.fork()\n"
        "    first, *rest = (Path(sys.argv[1]) / f'{run}_{number}{sys.argv[2]}' for number in range(1000))\n"
        "    if not child:\n"
        "        for path in (first, *rest): WRITERS[sys.argv[2]](path)\n"
        "    while not first.exists(): time.sleep(0.001)\n"
        "    time.sleep(random.Random(run).random() / 20)\n"
        "    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)\n"
    )
    forker.run(script, output, suffix)
    made = [path for path in output.iterdir() if not path.name.startswith(".")]
    assert len(made) >= 20 and all(whole(path, suffix) for path in made)


def test_many_cameras_are_saved_in_little_memory(output):
    cameras = Cameras(torch.eye(4).expand(10_000, 4, 4), torch.eye(3).expand(10_000, 3, 3), 64, 48)
    tracemalloc.start()
    started = time.monotonic()
    write_camera_json(output / "many.json", cameras)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6 and time.monotonic() - started < 60
    loaded = read_cameras(output / "many.json")[0]
    assert torch.equal(loaded.w2c, cameras.w2c) and torch.equal(loaded.K, cameras.K)
