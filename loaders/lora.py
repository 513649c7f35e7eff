"""LoRA files for Wan that were trained with diffusers, loaded by ComfyUI's own LoRA loaders.

Core lists a model's LoRA keys in `comfy.lora.model_lora_keys_unet`, for Wan only by native names. It has no hook for
other names, so that function is wrapped; for every model but WorldStereo it returns what it did before.
"""

import functools
from collections.abc import Iterable

from .. import core, remap
from ..worldstereo.comfy_model import WorldStereo
from ..worldstereo.shapes import native_shapes


def diffusers_keys(native_keys: Iterable[str]) -> dict[str, str]:
    """The names a LoRA may have for each weight, made from its diffusers name, and the model's own name for it.

    native_keys: the names of the model's weights, `diffusion_model.….weight`.
    """
    keys = {}
    for key in native_keys:
        layer = remap.to_diffusers(remap.without_prefix(key)).removesuffix(".weight")
        flat = layer.replace(".", "_")
        for name in (
            f"transformer.{layer}",
            f"{remap.MODEL_PREFIX}{layer}",
            layer,
            f"lora_unet_{flat}",
            f"lora_transformer_{flat}",
            f"lycoris_{flat}",
        ):
            keys[name] = key
    return keys


def _with_diffusers_names(model_lora_keys_unet):
    @functools.wraps(model_lora_keys_unet)
    def wrapper(model, key_map={}):
        key_map = model_lora_keys_unet(model, key_map)
        if isinstance(model, WorldStereo):
            there = model.state_dict()
            native = (
                remap.MODEL_PREFIX + name
                for name in native_shapes(model.diffusion_model.config)
                if name.endswith(".weight")
            )
            key_map = diffusers_keys(key for key in native if key in there) | key_map
        return key_map

    wrapper.worldstereo = True  # type: ignore[attr-defined]
    return wrapper


def register() -> None:
    """Adds the diffusers names to core's LoRA keys, once."""
    if not hasattr(core.lora.model_lora_keys_unet, "worldstereo"):
        core.lora.model_lora_keys_unet = _with_diffusers_names(core.lora.model_lora_keys_unet)
