"""Scene folders of every kind that Load Scene reads, with a file spoilt, exchanged or led outside."""

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from random import Random

import torch
from PIL import Image
from worldstereo_fp8.scene.camera_path import pinhole
from worldstereo_fp8.scene.cameras import Cameras
from worldstereo_fp8.scene.folder import KINDS, read_scene, write_scene
from worldstereo_fp8.scene.pointcloud import PointCloud
from worldstereo_fp8.scene.scene import Scene

from . import Case
from .cameras import spoil, words
from .headers import make_dirty, write_out

WIDTH, HEIGHT = 16, 12
OUTSIDE = (255, 0, 255)  # the colour of a picture that must not be read
NAMES = (
    "../outside.png",
    "x" * 5000,
    "\ud800",
    "a\0b",
    "/etc/passwd",
    "..",
    "",
    "images",
    ".png",
    "//x/y.png",
    "CON",
    "a.",
)
OTHERS = ("GIF", "TIFF", "BMP", "PPM", "EPS", "ICO", "PCX")  # formats that no scene's picture has


@functools.cache
def good_scene() -> Scene:
    count = 3
    w2c = torch.eye(4).repeat(count, 1, 1)
    w2c[:, 0, 3] = torch.arange(count) * 0.1
    cameras = Cameras(w2c, pinhole(WIDTH, HEIGHT, 15).K.expand(count, 3, 3), WIDTH, HEIGHT)
    pictures = [torch.full((HEIGHT, WIDTH, 3), 40 * n, dtype=torch.uint8) for n in range(count)]
    depths = (torch.ones(HEIGHT, WIDTH), None, None)
    cloud = PointCloud(torch.rand(9, 3), torch.rand(9, 3))
    scene = Scene((pictures[0],), cameras[0], ("start",), depths[:1], cloud)
    return scene.with_path("path 1", cameras, [1, 2], pictures[1:])


@functools.cache
def good() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-scene-")) / "scene"
    write_scene(folder, good_scene())
    return folder


def exchange(random: Random, path: Path, outside: Path):
    """Puts something else in the place of a file."""
    suffix, kind = path.suffix, random.randrange(6)
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1 and hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(outside.with_suffix(suffix))
    elif kind == 3:
        path.write_bytes(b"")
    elif kind == 4 and suffix == ".png":
        Image.new("RGB", (WIDTH, HEIGHT)).save(path, random.choice(OTHERS))
    elif kind == 5 and suffix == ".png":
        Image.new("1", random.choice(((9000, 9000), (20_000, 20_000), (1, 1)))).save(path)


def case(random: Random, folder: Path) -> Case:
    outside, place = folder / "outside", folder / "scene"
    shutil.copytree(good(), place)
    for file in place.rglob("*"):
        if file.is_file():
            shutil.copy(file, outside.with_suffix(file.suffix))
    Image.new("RGB", (WIDTH, HEIGHT), OUTSIDE).save(outside.with_suffix(".png"))
    kind = random.choice(KINDS[:4])
    for other in KINDS[: KINDS.index(kind)]:
        (place / other).unlink()
    read = {
        "scene.json": ["scene.safetensors"],
        "sparse/0/images.txt": ["sparse/0/cameras.txt", "sparse/0/points3D.txt"],
    }.get(kind, ["cloud.ply"])
    pictures = sorted((place / "images").iterdir())
    target = random.choice([place / kind, place / kind, *(place / file for file in read), random.choice(pictures)])
    how = random.random()
    if how < 0.35:
        exchange(random, target, outside)
    elif target.suffix == ".json" and how < 0.85:
        content = json.loads(target.read_text("utf-8"))
        text = write_out(spoil(random, content))
        if random.random() < 0.3:
            text = text.replace(pictures[1].stem, json.dumps(random.choice(NAMES))[1:-1])
        target.write_text(text, "utf-8")
    elif target.suffix == ".txt" and how < 0.85:
        target.write_bytes(words(random, target.read_text("utf-8").split("\n")).encode("utf-8", "surrogatepass"))
    else:
        target.write_bytes(make_dirty(random, target.read_bytes()))

    def wrong(result) -> str | None:
        scene, _ = result
        numbers = (scene.cameras.w2c, scene.cameras.K, scene.cloud.points, scene.cloud.colors)
        if not all(part.isfinite().all() for part in numbers):
            return "numbers that are not finite"
        if any(torch.equal(picture[0, 0], torch.tensor(OUTSIDE, dtype=torch.uint8)) for picture in scene.pictures):
            return "a picture from outside the folder"
        return None

    files = [file.name for file in (place / kind, *(place / file for file in read), *pictures)]
    return Case(lambda: read_scene(place), (*files, ".png", "scene"), wrong)
