"""Camera files of every kind: camera.json, transforms.json, COLMAP's two files, RealEstate10K's, and the scene's text of
a flown path."""

import json
import os
from pathlib import Path
from random import Random

import torch
from worldstereo_fp8.scene.camera_files import read_cameras
from worldstereo_fp8.scene.cameras import MAX_CAMERAS, write_camera_json
from worldstereo_fp8.scene.fly_path import fly, read_fly_path

from . import VALUES, Case
from .headers import make_dirty, write_out

NUMBERS = (
    0, 1, -1, 0.5, 1e-50, 1e-4, 1e13, 1e39, 1e308, 10**400, float("inf"), float("nan"), -0.0, 65536, 65537, 2**31, True,
    "1", None, [], "x" * 3000,
)  # fmt: skip
WORDS = (
    "nan",
    "inf",
    "1e39",
    "1e-50",
    "-1",
    "0",
    "",
    "x",
    "9" * 400,
    "\ud800",
    "\x1b[31m",
    "PINHOLE",
    "FOV",
    "1 " * 50,
)


def pose(random: Random) -> list:
    rows = torch.eye(4).tolist()
    for row in range(3):
        rows[row][3] = random.uniform(-2, 2)
    return rows


def spoil(random: Random, content):
    """Puts a bad value somewhere into nested lists and objects."""
    for _ in range(random.choice((0, 1, 1, 2))):
        place = content
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = random.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and random.random() < 0.85:
                place = place[key]
                continue
            kind = random.random()
            if kind < 0.2:
                del place[key]
            else:
                place[key] = random.choice(VALUES if kind < 0.5 else NUMBERS)
            break
    return content


def camera_json(random):
    count = random.choice((1, 2, 5))
    K = [[[500, 0, 320], [0, 500, 240], [0, 0, 1]]] * count
    content = {"extrinsic": [pose(random) for _ in range(count)], "intrinsic": json.loads(json.dumps(K))}
    return spoil(random, content | ({"width": 640, "height": 480} if random.random() < 0.7 else {}))


def transforms(random):
    frames = [{"file_path": f"{n}.png", "transform_matrix": pose(random)} for n in range(random.choice((0, 1, 3)))]
    lens = random.choice(({"fl_x": 500, "fl_y": 500, "cx": 320, "cy": 240}, {"camera_angle_x": 1.2}))
    return spoil(random, {"w": 640, "h": 480, **lens, "frames": frames})


def words(random, lines: list[str]) -> str:
    lines = [line.split(" ") for line in lines]
    for _ in range(random.choice((0, 1, 1, 2))):
        line = random.choice(lines)
        if line:
            line[random.randrange(len(line))] = random.choice(WORDS)
    separator = random.choice(("\n", "\n", "\r\n"))
    return separator.join(" ".join(line) for line in lines) + "\n"


def case(random: Random, folder: Path) -> Case:
    kind = random.choice(("camera.json", "transforms.json", "images.txt", "realestate.txt", "flown"))
    if kind == "flown":
        views = [{"position": [0.1, 0, 0.2], "rotation": [1, 0, 0, 0]} for _ in range(random.choice((0, 1, 3, 65)))]
        content = spoil(random, {"keyframes": 21, "easing": "linear", "views": views})
        text = write_out(content)

        def wrong(positions):
            return None if all(part.isfinite().all() for part in positions) else "not finite"

        return Case(lambda: fly(read_fly_path(text)), ("path",), wrong)
    path = folder / kind
    if kind.endswith(".json"):
        text = write_out(camera_json(random) if kind == "camera.json" else transforms(random)).encode("ascii")
    elif kind == "images.txt":
        text = words(random, [f"{n} 1 0 0 0 0.1 0 {n} 1 f_{n}.png\n" for n in range(1, 4)]).encode(
            "utf-8", "surrogatepass"
        )
        cameras = words(random, ["# cameras", "1 PINHOLE 640 480 500 500 320 240"]).encode("utf-8", "surrogatepass")
        (folder / "cameras.txt").write_bytes(cameras)
    else:
        line = "0 0.8 1.4 0.5 0.5 0 0 1 0 0 0.1 0 1 0 0 0 0 1 0"
        text = words(random, ["https://example.org/watch", line, line, line]).encode("utf-8", "surrogatepass")
    if random.random() < 0.25:
        text = make_dirty(random, text)
    if random.random() < 0.03 and hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(path)
    else:
        path.write_bytes(text)

    def wrong(result) -> str | None:
        cameras, _ = result
        numbers = (cameras.w2c, cameras.K, torch.linalg.inv(cameras.K))
        if not all(part.isfinite().all() for part in numbers) or len(cameras) > MAX_CAMERAS:
            return "numbers that are not finite, or too many"
        write_camera_json(folder / "again.json", cameras)
        again, _ = read_cameras(folder / "again.json")
        same = torch.equal(again.w2c, cameras.w2c) and torch.equal(again.K, cameras.K)
        return None if same and (again.width, again.height) == (cameras.width, cameras.height) else "not what was saved"

    return Case(lambda: read_cameras(path), (kind, "cameras.txt"), wrong)
