"""config.json and configurations in a file, with values out of range, of wrong types and of wrong models."""

import functools
import json
import math
from pathlib import Path
from random import Random

import torch
from toy import golden_weights
from worldstereo_fp8 import remap
from worldstereo_fp8.worldstereo.config import config_content, find_config, read_config
from worldstereo_fp8.worldstereo.schedule import dmd_sigmas
from worldstereo_fp8.worldstereo.shapes import native_shapes

from . import VALUES, Case
from .headers import make_dirty, write_out

KEYS = (
    "model_type", "nframe", "scale_map", "latent_cond_mode", "negative_prompt", "gen_shift", "dmd_steps",
    "dmd_start_steps", "dmd_end_steps", "num_attention_heads", "attention_head_dim", "eps", "controlnet_cfg",
)  # fmt: skip
CONTROL_KEYS = (
    "num_heads",
    "update_ref",
    "dim",
    "ffn_dim",
    "num_layers",
    "mid_channels",
    "mask_downsample",
    "conv_out_dim",
)
NUMBERS = (1, 2, 4, 8, 16, 20, 99, 100, 101, 250, 250.5, 999, 1000, 1001, 1e-9, 0.1, 5.0, 80, 81, 82)
TYPES = ("worldstereo-camera", "worldstereo-memory", "worldstereo-memory-dmd")


@functools.cache
def shapes_of(golden: str) -> tuple[dict, dict]:
    weights, config = golden_weights(golden)
    return {remap.to_native(name): tuple(value.shape) for name, value in weights.items()}, config


def draw(random: Random, key: str):
    if key == "model_type" and random.random() < 0.7:
        return random.choice(TYPES)
    if key == "scale_map" and random.random() < 0.7:
        sides = (16, 32, 480, 832, 1024, 2048, 65536, 0, -16, 24, 16.0)
        return [
            [random.choice(sides) for _ in range(random.choice((2, 2, 2, 3)))] for _ in range(random.choice((1, 2, 65)))
        ]
    return random.choice(VALUES) if random.random() < 0.5 else random.choice(NUMBERS)


def case(random: Random, folder: Path) -> Case:
    shapes, config = shapes_of(random.choice(("memory_dmd", "camera", "camera_maskds4")))
    shapes, config = dict(shapes), json.loads(json.dumps(config))
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        if random.random() < 0.3 and isinstance(config.get("controlnet_cfg"), dict):
            config["controlnet_cfg"][random.choice(CONTROL_KEYS)] = draw(random, "")
        else:
            key = random.choice(KEYS)
            config[key] = draw(random, key)
    if random.random() < 0.2:
        name = random.choice([*list(shapes)[:20], "controlnet.proj_in.weight", "patch_embedding.weight"])
        shapes[name] = tuple(random.choice((0, 1, 2, 7, 64, 2**40)) for _ in range(random.randint(0, 6)))
    text = write_out(config)
    path = folder / "m.safetensors"
    own = text
    if random.random() < 0.5:
        own = random.choice((None, "{}", text))
        content = text.encode()
        if random.random() < 0.3:
            content = make_dirty(random, content)
        encoding = random.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16"))
        (folder / "config.json").write_bytes(content if encoding == "utf-8" else text.encode(encoding))
    return Case(
        lambda: find_config(path, own, shapes).config,
        (path.name, "config.json"),
        lambda found: out_of_range(found, shapes),
    )


def out_of_range(c, shapes: dict) -> str | None:
    """Why the model or its sampling could not be run with it within bounds; written from what these need."""
    sigmas = dmd_sigmas(c) if c.is_dmd else torch.tensor([1.0, 0.0])
    checks = {
        "frames": 1 <= c.nframe <= 81,
        "sizes": len(c.scale_map) <= 64
        and all(h % 16 == w % 16 == 0 < h * w <= 1024**2 and h > 0 for h, w in c.scale_map),
        "sigmas": len(sigmas) <= 101 and bool((sigmas[1:] < sigmas[:-1]).all()) and 0 <= sigmas[-1] < sigmas[0] <= 1,
        "shift": math.isfinite(c.gen_shift) and c.gen_shift > 0,
        "heads": c.dim % c.num_heads == 0 and c.dim // c.num_heads % 2 == 0,
        "control heads": c.control_dim % c.control_num_heads == 0 and c.control_dim // c.control_num_heads % 2 == 0,
        "eps": 0 < c.eps < 1,
        "prompt": len(c.negative_prompt.encode()) <= 40_000,
        "groups": c.mask_channels > 0 and c.mask_channels % 8 == 0,
        "read again": read_config(shapes, json.loads(json.dumps(config_content(c)))) == c,
        "shapes": len(native_shapes(c)) < 3000,
    }
    return ", ".join(name for name, right in checks.items() if not right) or None
