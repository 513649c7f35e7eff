"""Prompts and uploads to a real server: whatever becomes of one, the next good prompt must run to its end."""

import atexit
import functools
import re
import tempfile
import threading
import time
from pathlib import Path
from random import Random

import folder_paths
import requests
from comfy_api.latest import io
from worldstereo_fp8.demo.server import Server, ServerError
from worldstereo_fp8.scene.depth import DEPTH_PICTURES

from . import VALUES, Case
from .cameras import spoil
from .headers import write_out
from .inputs import COLOURS, LISTS, TEXTS, nodes

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS = 10  # a prompt that takes longer (an ordinary one takes about one) is interrupted,
STOP_SECONDS = 10  # and hangs where that does not end it, or the next one does not run, in this time
SOURCES = {  # the outputs of Sample Scene, and of the scene started from them
    "IMAGE": ["1", 0],
    "MOGE_GEOMETRY": ["1", 1],
    "WORLDSTEREO_POINTS": ["1", 3],
    "WORLDSTEREO_CAMERAS": ["1", 4],
    "WORLDSTEREO_SCENE": ["4", 0],
}
SAMPLE = {"class_type": "WorldStereoSampleScene", "inputs": {}}
START = {
    "class_type": "WorldStereoStartScene",
    "inputs": {"image": ["1", 0], "depth": ["1", 1], "depth_picture": DEPTH_PICTURES[0], "near": 1, "far": 10}
    | {"width": 64, "height": 48},
}
CLEAR = ("ValueError", "OSError", "FileNotFoundError", "FileExistsError")
NAMES = (
    "a.json",
    "bad\udcff.json",
    "b\udcff\udcfe.TXT",
    "a\n.json",
    "\x1b[31m.json",
    "..\\a.json",
    "../a.json",
    "A.JSON",
    "é" * 120 + ".json",
    "a.txt",
)


def good_prompt(name) -> dict:
    save = {"cameras": ["1", 4], "filename_prefix": f"good/{name}"}
    return {"1": SAMPLE, "2": {"class_type": "WorldStereoSaveCamera", "inputs": save}}


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
    node = random.choice(nodes())
    inputs = {}
    for declared in node.define_schema().inputs:
        kinds = declared.get_io_type().split(",")
        linked = [SOURCES[kind] for kind in kinds if kind in SOURCES]
        if linked and random.random() < 0.9:
            inputs[declared.id] = random.choice(linked)
        elif isinstance(declared, io.Combo.Input) and declared.options and random.random() < 0.7:
            inputs[declared.id] = random.choice(declared.options)
        elif random.random() < 0.7 and getattr(declared, "default", None) is not None:
            inputs[declared.id] = declared.default
        elif not declared.optional or random.random() < 0.3:
            inputs[declared.id] = value_of(random, declared)
    prompt = {"1": SAMPLE}
    if SOURCES["WORLDSTEREO_SCENE"] in inputs.values():
        prompt["4"] = START
    prompt["2"] = {"class_type": node.define_schema().node_id, "inputs": inputs}
    if node.define_schema().outputs:
        prompt["3"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}
    return prompt


def upload(address: str, name: str, content: bytes):
    """As a form of a browser's, but also with a name that is no text."""
    head = f'--x\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
    requests.post(
        f"http://{address}/upload/image",
        data=head.encode("utf-8", "surrogateescape") + content + b"\r\n--x--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=x"},
        timeout=SECONDS,
    )


def case(random: Random, folder: Path) -> Case:
    running = server()
    name = random.choice(NAMES)
    content = write_out(spoil(random, {"extrinsic": [[[1, 0, 0, 0]]], "intrinsic": []})).encode()
    uploaded = random.random() < 0.3
    prompt = hostile(random)
    number = random.randrange(10**9)

    def run():
        start = time.monotonic()
        refused = None
        stop = threading.Timer(SECONDS, requests.post, (f"http://{running.address}/interrupt",))
        stop.start()
        try:
            if uploaded:
                upload(running.address, name, content)
                prompt["2"] = {"class_type": "WorldStereoLoadCamera", "inputs": {"camera": name}}
            running.run(prompt)
        except ServerError as error:
            refused = str(error)
        finally:
            stop.cancel()
        running.run(good_prompt(number))
        saved = list((running.base / "output" / "good").glob(f"{number}_*.json"))
        seconds = time.monotonic() - start
        if seconds > SECONDS + STOP_SECONDS:
            raise TimeoutError(f"{seconds:.0f} s: {prompt}")
        if len(saved) != 1:
            raise RuntimeError(f"{len(saved)} files of the good prompt after {prompt}")
        if refused is not None:
            failed = re.search(r" failed: ([\w.]+): ", refused)  # else it was refused before it ran, in core's words
            if failed and failed[1] not in CLEAR:
                raise RuntimeError(refused)
            raise ValueError("prompt refused, and the next one ran")

    places = ("input", "models", "output", "temp")  # core writes uploads
    own = ("user", "comfyui.log", "worldstereo_fly_path")  # core's; and what Fly Path finds again it touches
    return Case(run, ("prompt",), watched=running.base, places=places, ignored=own)
