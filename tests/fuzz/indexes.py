"""Indexes of models in shards, and shards that do not bear them out."""

import json
import os
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from worldstereo_fp8.fp8.files import open_files

from . import VALUES, Case
from .headers import make_dirty, write_out

SHARDS = (
    "a.safetensors", "b.safetensors", "../a.safetensors", "/etc/passwd", "C:a.safetensors", "x\\a.safetensors", "", ".",
    "..", "a\0", "\ud800", "a" * 256, "é" * 200, "none.safetensors", "folder", "link", "m.safetensors.index.json",
)  # fmt: skip


def case(random: Random, folder: Path) -> Case:
    stored = {"a.safetensors": ["x", "y"], "b.safetensors": ["z"]}
    for shard, names in stored.items():
        save_file({name: torch.zeros(2) for name in names}, folder / shard)
    (folder / "folder").mkdir()
    if os.path.exists("/dev/zero"):  # not on Windows
        (folder / "link").symlink_to("/dev/zero")
    weight_map = {name: shard for shard, names in stored.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    for _ in range(random.randint(0, 2)):
        kind = random.randrange(5)
        if kind == 0:
            index["weight_map"] = random.choice(VALUES)
        elif kind == 1:
            weight_map[random.choice(("x", "y", "z", "w", "\ud800", "n" * 400))] = random.choice(
                (*SHARDS, *SHARDS, *VALUES)
            )
        elif kind == 2:
            weight_map.pop(random.choice(("x", "y", "z")), None)
        elif kind == 3:
            index[random.choice(("metadata", "more"))] = random.choice(VALUES)
        else:
            (folder / random.choice(("a.safetensors", "b.safetensors"))).write_bytes(
                random.randbytes(random.randint(0, 40))
            )
    text = write_out(index).encode("ascii")
    if random.random() < 0.3:
        text = make_dirty(random, text)
    path = folder / "m.safetensors.index.json"
    path.write_bytes(text)

    def wrong(files) -> str | None:
        whole = json.loads(text)["weight_map"] if b"0" * 5000 not in text else weight_map
        placed = {name: tensor.file.name for name, tensor in files.tensors.items()}
        return None if placed == whole and set(placed.values()) <= stored.keys() else f"{placed} of {whole}"

    return Case(lambda: open_files(path), (path.name, "a.safetensors", "b.safetensors"), wrong)
