"""ComfyUI's ModelPatcher, extended to keep weights out of VRAM that the prompt cache makes unnecessary."""

# mypy: disable-error-code="attr-defined, misc"
# mypy does not see that the mixins below are used with core's patchers.

from collections.abc import Iterable

import torch

from ..core import (
    CallbacksMP,
    CoreModelPatcher,
    ModelPatcher,
    ModelPatcherDynamic,
    QuantizedTensor,
    WrappersMP,
    get_attr,
    get_key_weight,
    set_attr,
    set_attr_param,
)
from ..worldstereo import object_patches
from ..worldstereo.comfy_model import WorldStereo
from ..worldstereo.preview import show_keyframes
from ..worldstereo.prompt_cache import LAYERS as CACHED_LAYERS

CACHED = tuple(f".{name}" for name in CACHED_LAYERS)
ROOM_TO_STREAM = 256 * 2**20  # bytes of its budget that core reserves for the layers it streams


class CachedLayersLast:
    """If not all weights fit, those used only once per prompt or timestep are the first to stay in RAM. Core streams
    them when they are needed."""

    def _load_list(self, for_dynamic=False, default_device=None):
        entries = super()._load_list(for_dynamic, default_device)
        cached = cached_layers(self.model, self.object_patches)
        # Core sorts by the first item: with dynamic VRAM ascending, False for small modules; else descending, by size.
        last = 2 if for_dynamic else -1
        return [(last, *entry[1:]) if entry[-3].endswith(cached) else entry for entry in entries]


class ListedWeight(QuantizedTensor):
    """A quantised weight whose `half()` and `float()` are plain tensors: core's LoRA extraction writes `half()` of a
    weight to the file."""

    @classmethod
    def of(cls, weight):
        """The quantised weight as a ListedWeight; any other weight as it is."""
        if not isinstance(weight, QuantizedTensor):
            return weight
        return cls(weight._qdata, weight._layout_cls, weight._params)

    def half(self):
        return self.dequantize().half()

    def float(self):
        return self.dequantize().float()


class QuantisedWeights:
    """Gives weights in the form that core's merges, LoRA extraction and hook LoRAs need."""

    def model_state_dict(self, filter_prefix=None):
        """Core's state dict, but with each quantised weight as one tensor. Core splits it into values, scale and format
        and would then look for the last two as attributes of the layer."""
        weights = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {key: ListedWeight.of(weights[key]) for key in super().model_state_dict(filter_prefix) if key in weights}

    def patch_weight_to_device(self, *args, **kwargs):
        return ListedWeight.of(super().patch_weight_to_device(*args, **kwargs))


class HooksReplaceWeights:
    """Hook LoRAs replace a Linear's weight as a whole and put the original back afterwards. Core copies values back and
    forth instead, which would not restore a quantised weight's scale."""

    def _set_aside(self, key: str) -> bool:
        """Keeps the weight of `key` until the hooks are off, if it is a Linear's. Returns whether it is."""
        weight, set_function, _ = get_key_weight(self.model, key)
        if set_function is not None:
            self.hook_backup.setdefault(key, (weight, weight.device))
        return set_function is not None

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        replaced = key in combined_patches and self._set_aside(key)
        super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        cached = self.cached_hook_patches.get(hooks, {})
        if replaced and key in cached:
            weight = get_attr(self.model, key)
            cached[key] = (weight.to(cached[key][0].device), weight.device)

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        if self._set_aside(key):
            weight, device = cached_weights[key]
            set_attr_param(self.model, key, weight.to(device))
        else:
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set=None):
        with self.use_ejected():
            for key, (weight, _) in list(self.hook_backup.items()):
                if isinstance(weight, torch.nn.Parameter) and (not whitelist_keys_set or key in whitelist_keys_set):
                    set_attr(self.model, key, weight)
                    self.hook_backup.pop(key)
        super().unpatch_hooks(whitelist_keys_set)


class WorldStereoPatcher(HooksReplaceWeights, QuantisedWeights, CachedLayersLast, ModelPatcher):
    """Core's patcher without dynamic VRAM, which loads as much as an estimate says will fit."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        """If not all weights fit, loads only those that every step uses: the weights that the prompt cache stands in
        for would take up VRAM for nothing."""
        enough = resident_bytes(self.model, self.object_patches) + ROOM_TO_STREAM
        super().load(device_to, min(lowvram_model_memory, enough), force_patch_weights, full_load)


class WorldStereoPatcherDynamic(QuantisedWeights, CachedLayersLast, ModelPatcherDynamic):
    """Core's patcher with dynamic VRAM: weights go to the GPU when they are used, and are evicted when VRAM is
    needed."""

    def clone(self, disable_dynamic=False, **kwargs):
        clone = super().clone(disable_dynamic, **kwargs)
        if disable_dynamic:  # core makes it a plain ModelPatcher
            clone.__class__ = WorldStereoPatcher
        return clone


def cached_layers(model: WorldStereo, patched: Iterable[str] = ()) -> tuple[str, ...]:
    """Name endings of the layers that no step uses once the prompt cache is filled. patched: names of object
    patches."""
    if not model.use_prompt_cache:
        return ()
    if any(name.endswith("cross_attn.forward") for name in patched):  # it computes keys and values at every step
        return tuple(name for name in CACHED if not name.startswith(".cross_attn"))
    return CACHED


def resident_bytes(model: WorldStereo, patched: Iterable[str] = ()) -> int:
    """The size in bytes of the weights that every step uses. patched: names of object patches."""
    cached = cached_layers(model, patched)
    return sum(p.nbytes for name, p in model.named_parameters() if not name.rsplit(".", 1)[0].endswith(cached))


def make_patcher(
    model: WorldStereo, load_device: torch.device, offload_device: torch.device, disable_dynamic: bool
) -> ModelPatcher:
    """A patcher of the kind ComfyUI runs with: with dynamic VRAM if that is on, unless `disable_dynamic`."""
    dynamic = issubclass(CoreModelPatcher, ModelPatcherDynamic)
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
        patcher.model.warn_once(remark)


def _forget_cache(patcher, unpatch_all: bool):
    if unpatch_all:  # unloaded, not merely replaced by another clone
        patcher.model.diffusion_model.prompt_cache.forget()
