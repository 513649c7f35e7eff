"""ComfyUI's ModelPatcher, told which weights can do without VRAM."""

import comfy.model_patcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..worldstereo import object_patches
from ..worldstereo.preview import show_keyframes
from ..worldstereo.prompt_cache import LAYERS as CACHED_LAYERS

CACHED = tuple(f".{name}" for name in CACHED_LAYERS)
ROOM_TO_STREAM = 256 * 2**20  # bytes that core sets aside, of what it loads, for the layers it streams


class ConstantsLast:
    """Where not all weights fit, those that are used once a prompt or once a timestep are the first to stay in RAM:
    core streams them through when they are wanted."""

    def _load_list(self, for_dynamic=False, default_device=None):
        entries = super()._load_list(for_dynamic, default_device)
        constants = constant_layers(self.model, self.object_patches)
        # Core's keys: with dynamic VRAM ascending, the first item False for small modules; else descending by size.
        last = 2 if for_dynamic else -1
        return [(last, *entry[1:]) if entry[-3].endswith(constants) else entry for entry in entries]


class WorldStereoPatcher(ConstantsLast, comfy.model_patcher.ModelPatcher):
    """Core's patcher that loads what an estimate says fits."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        """Loads no more than every step uses where not all fits: the weights behind the prompt cache would fill the rest for nothing."""
        enough = resident_bytes(self.model, self.object_patches) + ROOM_TO_STREAM
        super().load(device_to, min(lowvram_model_memory, enough), force_patch_weights, full_load)


class WorldStereoPatcherDynamic(ConstantsLast, comfy.model_patcher.ModelPatcherDynamic):
    """Core's patcher with dynamic VRAM: weights come to the GPU as they are used, and are evicted for other needs."""

    def clone(self, disable_dynamic=False, **kwargs):
        clone = super().clone(disable_dynamic, **kwargs)
        if disable_dynamic:
            clone.__class__ = (
                WorldStereoPatcher  # core makes it a plain ModelPatcher, which does not know the prompt cache
            )
        return clone


def constant_layers(model, patched=()) -> tuple[str, ...]:
    """How the names of layers end that no step uses once the prompt cache is filled. patched: names of object patches."""
    if not model.use_prompt_cache:
        return ()
    if any(name.endswith("cross_attn.forward") for name in patched):  # it computes keys and values at every step
        return tuple(name for name in CACHED if not name.startswith(".cross_attn"))
    return CACHED


def resident_bytes(model, patched=()) -> int:
    """Bytes of the weights that every step uses. patched: names of object patches."""
    constants = constant_layers(model, patched)
    return sum(p.nbytes for name, p in model.named_parameters() if not name.rsplit(".", 1)[0].endswith(constants))


def make_patcher(model, load_device, offload_device, disable_dynamic: bool):
    """A patcher of the kind ComfyUI runs with: dynamic VRAM where that is on, unless `disable_dynamic`."""
    dynamic = issubclass(comfy.model_patcher.CoreModelPatcher, comfy.model_patcher.ModelPatcherDynamic)
    patcher_class = WorldStereoPatcherDynamic if dynamic and not disable_dynamic else WorldStereoPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    patcher.add_callback(CallbacksMP.ON_PRE_RUN, _start_run)
    patcher.add_callback(
        CallbacksMP.ON_CLEANUP, lambda p: p.model.diffusion_model.prompt_cache.end_run(p.offload_device)
    )
    patcher.add_callback(CallbacksMP.ON_DETACH, _forget_cache)
    patcher.add_wrapper(WrappersMP.OUTER_SAMPLE, show_keyframes)
    return patcher


def _start_run(patcher):
    patcher.model.diffusion_model.prompt_cache.start_run()
    for remark in object_patches.remarks(patcher.model.diffusion_model):
        patcher.model.say_once(remark)


def _forget_cache(patcher, unpatch_all: bool):
    if unpatch_all:  # unloaded, and not only another clone's turn
        patcher.model.diffusion_model.prompt_cache.forget()
