"""Modules whose `forward` other node packs replace (ComfyUI's object patches): which replacements take effect, and
warnings about the others.

Examples: KJNodes' WanVideoNAG, Wan Chunk FeedForward, Enhance-A-Video and SageAttention patches, all written for
ComfyUI's own Wan (`comfy.ldm.wan.model`).
"""

import re
import types
from collections import Counter

import torch

BLOCK = r"blocks\.\d+"
# Object patches that do not change what the prompt cache holds: keys and values, and what depends on the timestep.
KEEP_CACHE = re.compile(rf"diffusion_model\.({BLOCK}\.(self_attn\..+|cross_attn\.forward|ffn\..+)|rope_embedder)")
# Modules whose weights are used directly, together with other layers: their forward never runs.
FORWARD_NOT_CALLED = re.compile(
    rf"{BLOCK}\.(norm[123]|(self|cross)_attn\.norm_q|self_attn\.norm_k|ffn\.1)"
    rf"|controlnet\.controlnet_{BLOCK}\.(norm[12]\.norm|self_attn\.norm_[qk]|ffn\.1)"
)
SELF_ATTENTION = re.compile(rf"{BLOCK}\.self_attn")


def forward_is_replaced(module: torch.nn.Module) -> bool:
    """Whether the module's `forward` is replaced or has hooks."""
    forward = module.forward
    # Not getattr with a default: torch.compile would always see the default.
    own = isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward
    return not own or bool(module._forward_hooks or module._forward_pre_hooks)


def remarks(diffusion_model: torch.nn.Module) -> list[str]:
    """Warnings about replaced forwards that do not run, or run with other tokens than in ComfyUI's Wan."""
    unused: Counter[str] = Counter()
    attention: Counter[str] = Counter()
    for name, module in diffusion_model.named_modules():
        uncalled = FORWARD_NOT_CALLED.fullmatch(name)
        sees_references = SELF_ATTENTION.fullmatch(name) and diffusion_model.config.has_memory
        if (uncalled or sees_references) and forward_is_replaced(module):
            (unused if uncalled else attention)[re.sub(r"\.\d+\.", ".N.", name)] += 1
    return [
        f"A model patch replaces {name}.forward (in {count} places), which WorldStereo computes together with other "
        "layers: that patch has no effect."
        for name, count in unused.items()
    ] + [
        f"A model patch replaces {name}.forward (in {count} places). It runs, but its tokens are those of the "
        "reference views followed by those of the keyframes: a patch that counts frames may fail or mix them up."
        for name, count in attention.items()
    ]
