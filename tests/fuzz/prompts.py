"""Prompts and uploads to a real server: whatever becomes of one, the next good prompt must run to its end."""

import atexit
import functools
import json
import tempfile
import time
from pathlib import Path
from random import Random

import folder_paths
import requests
from comfy_api.latest import io
from worldstereo_fp8.demo.server import Server

from . import VALUES, Case
from .cameras import spoil
from .inputs import COLOURS, LISTS, TEXTS, nodes

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 30  # both prompts together; an ordinary pair takes about one
SOURCES = {"IMAGE": 0, "MOGE_GEOMETRY": 1, "WORLDSTEREO_POINTS": 3, "WORLDSTEREO_CAMERAS": 4}  # Sample Scene's outputs
NAMES = (
    "a.json",
    "bad\udcff.json",
    "a\n.json",
    "\x1b[31m.json",
    "..\\a.json",
    "../a.json",
    "A.JSON",
    "é" * 120 + ".json",
    "a.txt",
)
SLOW = {"WorldStereoSamplePanorama", "WorldStereoExploreScene", "WorldStereoStartScene"}


def good_prompt(name) -> dict:
    save = {"cameras": ["1", 4], "filename_prefix": f"good/{name}"}
    return {
        "1": {"class_type": "WorldStereoSampleScene", "inputs": {}},
        "2": {"class_type": "WorldStereoSaveCamera", "inputs": save},
    }


@functools.cache
def server():
    base = Path(tempfile.mkdtemp(prefix="fuzz-server-"))
    limits = resource.getrlimit(resource.RLIMIT_DATA) if resource else None
    if resource:  # the worker's limit is for its own cases
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, limits[1]))
    started = Server(Path(folder_paths.base_path), base).__enter__()
    if resource:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    atexit.register(started.__exit__)
    started.run(good_prompt("first"))  # its first prompt loads what later ones find
    return started


def value_of(random: Random, declared):
    if random.random() < 0.3:
        return random.choice([value for value in VALUES if value != 10**5000 and value == value])
    if declared.id == "own_list":
        return random.choice(LISTS)
    if isinstance(declared, io.Color.Input):
        return random.choice(COLOURS)
    if isinstance(declared, io.String.Input):
        return random.choice(TEXTS)
    return getattr(declared, "default", None)


def hostile(random: Random) -> dict:
    node = random.choice([node for node in nodes() if node.__name__ not in SLOW])
    inputs = {}
    for declared in node.define_schema().inputs:
        kinds = declared.get_io_type().split(",")
        linked = [SOURCES[kind] for kind in kinds if kind in SOURCES]
        if linked and random.random() < 0.9:
            inputs[declared.id] = ["1", random.choice(linked)]
        elif isinstance(declared, io.Combo.Input) and declared.options and random.random() < 0.7:
            inputs[declared.id] = random.choice(declared.options)
        elif random.random() < 0.7 and getattr(declared, "default", None) is not None:
            inputs[declared.id] = declared.default
        elif not declared.optional or random.random() < 0.3:
            inputs[declared.id] = value_of(random, declared)
    prompt = {"1": {"class_type": "WorldStereoSampleScene", "inputs": {}}}
    prompt["2"] = {"class_type": node.define_schema().node_id, "inputs": inputs}
    if node.define_schema().outputs:
        prompt["3"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}
    return prompt


def case(random: Random, folder: Path) -> Case:
    running = server()
    name = random.choice(NAMES)
    content = json.dumps(spoil(random, {"extrinsic": [[[1, 0, 0, 0]]], "intrinsic": []})).encode()
    uploaded = random.random() < 0.3
    prompt = hostile(random)
    number = random.randrange(10**9)

    def run():
        start = time.monotonic()
        refused = None
        try:
            if uploaded:
                files = {"image": (name, content)}
                requests.post(f"http://{running.address}/upload/image", files=files, timeout=SECONDS)
                prompt["2"] = {"class_type": "WorldStereoLoadCamera", "inputs": {"camera": name}}
            running.run(prompt)
        except Exception as error:  # what it says is looked at by the classes that call execute themselves
            refused = error
        running.run(good_prompt(number))
        saved = list((running.base / "output" / "good").glob(f"{number}_*.json"))
        if refused is not None and len(saved) == 1 and time.monotonic() - start < SECONDS:
            raise ValueError("prompt refused, and the next one ran")
        return len(saved), time.monotonic() - start

    def wrong(result) -> str | None:
        count, seconds = result
        return None if count == 1 and seconds < SECONDS else f"{count} files of the good prompt, {seconds:.0f} s"

    return Case(run, ("prompt",), wrong)
