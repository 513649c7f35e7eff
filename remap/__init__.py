"""Tensor names of a WorldStereo checkpoint: diffusers' (the published files) and native Wan's (ComfyUI's model).

One table, read in both directions. The source is the naming of diffusers' `WanTransformer3DModel` against
`wan/modules/model.py` of Wan 2.1; inside `controlnet` only the attention projections are renamed, so that ComfyUI's
attention class serves there too.
"""

import re

from ..files.text import shown
from ..fp8.files import MAX_NAME
from ..fp8.recipe import COMFY_QUANT, INPUT_SCALE_SUFFIXES, SCALE_SUFFIXES

# (diffusers, native); `N` stands for a block number.
_ATTENTION = [
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "o"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
]
_IMAGE_ATTENTION = [("add_k_proj", "k_img"), ("add_v_proj", "v_img"), ("norm_added_k", "norm_k_img")]

MODULES = [
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("proj_out", "head.head"),
    ("patch_embedding", "patch_embedding"),
    *[(f"camera_embedding.{i}", f"camera_embedding.{i}") for i in (0, 2, 4)],
    *[(f"blocks.N.attn1.{d}", f"blocks.N.self_attn.{n}") for d, n in _ATTENTION],
    *[(f"blocks.N.attn2.{d}", f"blocks.N.cross_attn.{n}") for d, n in _ATTENTION + _IMAGE_ATTENTION],
    ("blocks.N.norm2", "blocks.N.norm3"),
    ("blocks.N.ffn.net.0.proj", "blocks.N.ffn.0"),
    ("blocks.N.ffn.net.2", "blocks.N.ffn.2"),
    *[
        (f"controlnet.{m}", f"controlnet.{m}")
        for m in (
            "controlnet_patch_embedding",
            "controlnet_mask_embedding.mask_proj.0",
            "controlnet_mask_embedding.mask_proj.1",
            "controlnet_mask_embedding.mask_zero_proj",
            "proj_in",
            "proj_out.N",
        )
    ],
    *[
        (f"controlnet.controlnet_blocks.N.self_attn.{d}", f"controlnet.controlnet_blocks.N.self_attn.{n}")
        for d, n in _ATTENTION
    ],
    *[
        (f"controlnet.controlnet_blocks.N.{m}", f"controlnet.controlnet_blocks.N.{m}")
        for m in ("norm1.linear", "norm1.norm", "norm2.linear", "norm2.norm", "ffn.0", "ffn.2")
    ],
]

# Parameters that belong to no layer of their own.
PARAMETERS = [("scale_shift_table", "head.modulation"), ("blocks.N.scale_shift_table", "blocks.N.modulation")]

# The tensors a layer may have: the weight and bias, and the scales and markers of the quantised formats.
SUFFIXES = ("weight", "bias", *SCALE_SUFFIXES, *INPUT_SCALE_SUFFIXES, COMFY_QUANT)

MODEL_PREFIX = "diffusion_model."  # of the diffusion model's tensors in a ComfyUI model
PREFIXES = (f"model.{MODEL_PREFIX}", MODEL_PREFIX)  # ComfyUI's Save nodes write these

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,2})(?=\.|$)")  # no model has a thousand blocks
_TO_NATIVE = dict(MODULES), dict(PARAMETERS)
_TO_DIFFUSERS = {n: d for d, n in MODULES}, {n: d for d, n in PARAMETERS}


def _rename(name: str, modules: dict, parameters: dict) -> str | None:
    """Looks `name` up as it is, and with each of its numbers in turn taken for the block number."""
    if len(name) > MAX_NAME:
        return None
    numbers = [(None, name)] + [(m.group(), name[: m.start()] + "N" + name[m.end() :]) for m in _NUMBER.finditer(name)]
    for number, pattern in numbers:
        found = parameters.get(pattern)
        if found is None:
            for suffix in SUFFIXES:
                if pattern.endswith("." + suffix):
                    module = modules.get(pattern[: -len(suffix) - 1])
                    if module is not None:
                        found = f"{module}.{suffix}"
        if found is not None:
            return found if number is None else found.replace("N", number, 1)
    return None


def _found(name: str, tables: tuple[dict[str, str], dict[str, str]], kind: str) -> str:
    found = _rename(name, *tables)
    if found is None:
        raise KeyError(f"{shown(name)} is not {kind} of WorldStereo or Wan2.1-I2V")
    return found


def to_native(name: str) -> str:
    """The native Wan name of a diffusers tensor name; a layer's scales and bias follow the layer.

    Raises KeyError for a name that is in no WorldStereo checkpoint.
    """
    return _found(name, _TO_NATIVE, "a diffusers name")


def to_diffusers(name: str) -> str:
    """The diffusers name of a native Wan tensor name: the inverse of `to_native`.

    Raises KeyError for a name that is in no WorldStereo checkpoint.
    """
    return _found(name, _TO_DIFFUSERS, "a native name")


def without_prefix(name: str) -> str:
    """A name without the prefix that ComfyUI's Save nodes write."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def is_native(name: str) -> bool:
    """Whether only the native naming has this name, alone or behind ComfyUI's prefix."""
    name = without_prefix(name)
    return _rename(name, *_TO_DIFFUSERS) is not None and _rename(name, *_TO_NATIVE) is None


def source_refusal(name: str) -> str | None:
    """Why this cannot be a tensor's name in a WorldStereo source, which has diffusers names; None if it can."""
    if is_native(name):
        return (
            "is a native Wan name. The recipe's exclusion words are written for the source's names and would exclude "
            "the wrong tensors here: cook the source itself."
        )
    if _rename(name, *_TO_NATIVE) is None:
        return "belongs to no WorldStereo model. Choose the BF16 WorldStereo model."
    return None
