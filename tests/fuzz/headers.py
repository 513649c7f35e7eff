"""Safetensors files whose header is broken, hostile or only unusual, for the loader and the cook."""

import json
import struct
from pathlib import Path
from random import Random

import safetensors
from worldstereo_fp8 import remap
from worldstereo_fp8.fp8.cook import Options, check
from worldstereo_fp8.fp8.files import open_files
from worldstereo_fp8.loaders.checkpoint import Checkpoint

from . import VALUES, Case

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I64": 8, "BOOL": 1, "F4": 1}
LAYERS = (
    "blocks.0.attn1.to_q", "blocks.1.attn2.add_k_proj", "blocks.0.ffn.net.0.proj", "blocks.0.self_attn.q",
    "controlnet.proj_in", "controlnet.controlnet_blocks.0.ffn.0", "controlnet.proj_out.0", "patch_embedding",
    "condition_embedder.time_embedder.linear_1", "model.diffusion_model.blocks.0.ffn.0", "proj_out",
    "controlnet.controlnet_mask_embedding.mask_proj.0",
)  # fmt: skip
SUFFIXES = ("weight", "bias", "scale_weight", "weight.scale_weight", "weight_scale", "comfy_quant", "scale_input")
NAMES = (
    "scaled_fp8", "worldstereo_config", "model.diffusion_model.worldstereo_config", "", ".", "a", "__metadata__ ",
    "\ud800", "\x1b[31m.weight", "a\nb.weight", "a" * 301, "a" + ".1" * 149, "a" + ".1" * 5000, "blocks.٣.norm2.weight",
    "blocks.999.norm2.weight", "blocks.1000.norm2.weight", "blocks.00.norm2.weight", "blocks.-1.norm2.weight",
    "blocks." + "9" * 250 + ".norm2.weight", "lora_unet_blocks_0.lora_up.weight",
)  # fmt: skip
QUANTS = (
    {"format": "float8_e4m3fn"}, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    {"format": "nvfp4"}, {"format": "\ud800"}, {"format": 5}, {}, [], "x", None,
    {"format": "int8_tensorwise", "convrot": 1, "convrot_groupsize": "x"},
    {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 0},
    {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": -4},
    {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": None},
    {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1e999},
    {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": [4]}},
)  # fmt: skip


def draw_name(random: Random) -> str:
    if random.random() < 0.2:
        return random.choice(NAMES)
    return f"{random.choice(LAYERS)}.{random.choice(SUFFIXES)}"


def draw_tensors(random: Random, plain: bool) -> tuple[dict, bytearray]:
    """A consistent header of some tensors, and their bytes; plain: those of a source."""
    header, data = {}, bytearray()
    if plain:
        for name in random.sample(LAYERS, random.randint(1, 6)):
            info = {"dtype": "BF16", "shape": [2, 4], "data_offsets": [len(data), len(data) + 16]}
            header[f"{name}.weight"] = info
            data += bytes(16)
        return header, data
    for _ in range(random.randint(0, 8)):
        name, dtype = draw_name(random), random.choice(list(SIZES))
        shape = [random.choice((0, 1, 1, 2, 8, 64)) for _ in range(random.choice((0, 1, 1, 2, 2, 2, 3, 5)))]
        if name.endswith("comfy_quant"):
            content = json.dumps(random.choice(QUANTS)).encode()
            dtype, shape = random.choice(("U8", "U8", "U8", "I8")), [len(content)]
        elif name.endswith("worldstereo_config"):
            content = write_out(random.choice(VALUES)).encode("ascii")
            dtype, shape = "U8", [len(content)]
        else:
            count = SIZES[dtype]
            for size in shape:
                count *= size
            if count > 2**20:
                continue
            content = random.randbytes(count)
        if name in header:
            continue
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    if random.random() < 0.3:
        header["__metadata__"] = {"format": "pt", "config": random.choice(("{}", "[", '{"nframe": 5}', "\ud800"))}
    return header, data


def make_hostile(random: Random, header: dict):
    """Changes one thing of it."""
    name = random.choice(list(header) or ["a"])
    info = header.setdefault(name, {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]})
    kind = random.randrange(5)
    if kind == 0:
        header[name] = random.choice(VALUES)
    elif kind == 1:
        info[random.choice(("dtype", "shape", "data_offsets", "config", "more"))] = random.choice(VALUES)
    elif kind == 2:
        info["shape"] = [random.choice(VALUES) for _ in range(random.choice((1, 2, 9, 1000)))]
    elif kind == 3:
        info["data_offsets"] = [random.choice(VALUES) for _ in range(random.choice((1, 2, 2, 2, 3)))]
    else:
        header["__metadata__"] = random.choice(({"a": random.choice(VALUES)}, random.choice(VALUES)))


def write_out(value) -> str:
    """JSON of a value that may hold an integer of more digits than Python writes."""
    return json.dumps(value, default=str) if not _huge(value) else _written(value)


def _huge(value) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) >= 10**4000
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(map(_huge, parts))


def _written(value) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    return "1" + "0" * 5000 if _huge(value) else json.dumps(value)


def make_dirty(random: Random, text: bytes) -> bytes:
    """Changes some bytes of it."""
    text = bytearray(text)
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(text) + 1)
        kind = random.randrange(4)
        if kind == 0:
            text[place:place] = random.choice(
                (b"[" * 100_000, b'"', b"{", b"\0", b"\xff", b"\\ud800", b"9" * 5000, b",")
            )
        elif kind == 1:
            del text[place : place + random.randint(1, 20)]
        elif kind == 2 and place < len(text):
            text[place] = random.randrange(256)
        else:
            text[place:place] = text[place : place + random.randint(1, 60)]
    return bytes(text)


def case(random: Random, folder: Path) -> Case:
    header, data = draw_tensors(random, plain=random.random() < 0.5)
    if random.random() < 0.5:
        make_hostile(random, header)
    text = write_out(header).encode("ascii")
    if random.random() < 0.3:
        text = make_dirty(random, text)
    length = random.choice((0, 1, len(text) - 1, len(text) + 1, 2**40, 2**63)) if random.random() < 0.05 else len(text)
    if random.random() < 0.05:
        data = data[: random.randrange(len(data) + 1)] + random.randbytes(random.choice((0, 0, 5)))
    path = folder / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text + bytes(data))
    if random.random() < 0.5:
        return Case(lambda: open_whole(path), (path.name,), lambda result: refused_by_library(path, result.tensors))
    return Case(lambda: load(path), (path.name,), lambda result: None)


def open_whole(path: Path):
    """As the cook looks at its source."""
    files = open_files(path)
    check(files, Options(), remap.source_refusal)
    return files


def load(path: Path):
    """As the loader does, up to the model."""
    checkpoint = Checkpoint(path)
    return checkpoint.state_dict(list(checkpoint.weights))


def refused_by_library(path: Path, tensors: dict) -> str | None:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except Exception as e:
        return None if b"NaN" in path.read_bytes() or b"Infinity" in path.read_bytes() else f"safetensors: {e}"
    return None if found == {name: tensor.shape for name, tensor in tensors.items()} else f"safetensors reads {found}"
