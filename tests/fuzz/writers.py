"""Every writer, killed at a random moment, on a full disk, where its name is taken, and two at once."""

import functools
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from random import Random

import torch
from test_save_files import FRAMES, WRITERS
from toy import save_sources
from worldstereo_fp8.comfy_nodes.show import write_clip
from worldstereo_fp8.fp8.cook import cook
from worldstereo_fp8.scene.folder import write_scene

from . import Case
from .folders import good_scene

try:
    import resource
except ImportError:  # Windows
    resource = None

KINDS = ("taken", "race", *(("kill", "kill", "full", "full") if resource else ()))


@functools.cache
def source() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-source-"))
    save_sources("memory_dmd", folder)
    return folder / "bf16.safetensors"


ALL = WRITERS | {
    ".mp4": lambda path: write_clip(path, FRAMES, 16),
    ".safetensors": lambda path: cook(source(), path, device=torch.device("cpu")),
    "_scene": lambda path: write_scene(path, good_scene()),
}


def contents(path: Path):
    """A file's bytes, or those of all files of a folder; None where nothing has the name."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes() if path.exists() else None


@functools.cache
def whole(suffix: str):
    """What the writer writes, and the seconds that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        ALL[suffix](Path(folder) / f"first{suffix}")
        start = time.monotonic()
        ALL[suffix](Path(folder) / f"x{suffix}")
        return contents(Path(folder) / f"x{suffix}"), time.monotonic() - start


def kill(random: Random, suffix: str, path: Path):
    expected, seconds = whole(suffix)
    seconds *= random.uniform(0, 1.2)
    child = os.fork()
    if not child:
        try:
            ALL[suffix](path)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return contents(path) in (None, expected)


def full(random: Random, suffix: str, path: Path):
    expected, _ = whole(suffix)
    largest = max(map(len, expected.values())) if isinstance(expected, dict) else len(expected)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (random.randrange(largest), limits[1]))
    try:
        ALL[suffix](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def taken(random: Random, suffix: str, path: Path):
    ALL[suffix](path)


def race(random: Random, suffix: str, path: Path):
    errors = []

    def write():
        try:
            ALL[suffix](path)
        except FileExistsError as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(errors) == 2 and contents(path) == whole(suffix)[0]


def case(random: Random, folder: Path) -> Case:
    place = folder / "ComfyUI" / "output"
    place.mkdir(parents=True)
    suffix, kind = random.choice(list(ALL)), random.choice(KINDS)
    path = place / f"x{suffix}"
    if kind == "taken":
        there = random.choice(("file", "folder", "link", "dangling link"))
        if there == "file":
            path.write_text("another's")
        elif there == "folder":
            path.mkdir()
            (path / "other").write_text("another's")
        else:
            (folder / "other").write_text("another's")
            path.symlink_to(folder / ("other" if there == "link" else "nowhere"))
    write = {"kill": kill, "full": full, "taken": taken, "race": race}[kind]

    def wrong(result) -> str | None:
        return None if result else f"{kind} {suffix}: {sorted(file.name for file in place.iterdir())}"

    return Case(lambda: write(random, suffix, path), (path.name,), wrong, killed=kind == "kill")
