"""WorldStereo as a ComfyUI model: conditions, memory estimate and model configuration, as ComfyUI's samplers see
them."""

import json
import logging
import math
import weakref
from collections.abc import Callable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..core import (
    WAN21,
    WAN21_I2V,
    CONDRegular,
    ModelPatcher,
    ModelType,
    convert_tensor,
    dtype_size,
    get_torch_device,
    pytorch_attention_flash_attention,
    xformers_enabled,
)
from ..fp8.arithmetic import UPCAST
from ..scene.cameras import plucker
from . import context_windows, object_patches
from .blocks import CHUNK, UPCAST_QUERIES
from .config import CONFIG_TENSOR, MASK_CAM_CHANNELS, PATCH, SPATIAL_DOWNSCALE, WorldStereoConfig, config_content
from .model import WorldStereoModel
from .preview import KeyframeLatents
from .prompt_cache import COMING_TIMESTEPS, WEIGHTS, WHOLE_TIMESTEPS

TEXT_TOKENS, IMAGE_TOKENS = 512, 257
WORKSPACE = 150 * 2**20  # bytes, of cuBLAS, cuDNN and everything too small to count
CONDITION_LATENTS = ("render_latent", "reference_latent")
OF_REFERENCES = ("reference_latent", "ref_index", "camera_qt_ref")
CONDITIONS = (*OF_REFERENCES, "render_latent", "render_mask", "camera_embedding", "camera_qt")


class OnDevice(CONDRegular):
    """A condition that is moved to the GPU once per run, where core would copy it at every step."""

    def concat(self, others):
        """Core's batch of conditions, but without a copy where there is only this one."""
        return super().concat(others) if others else self.cond


class OfReferences(OnDevice):
    """A condition of the reference views. chosen_for: the keyframe that each was chosen for, from which a context
    window selects its references."""

    def __init__(self, cond, chosen_for: list[int]):
        super().__init__(cond)
        self.chosen_for = chosen_for

    def _copy_with(self, cond):
        return type(self)(cond, self.chosen_for)


class WorldStereo(WAN21):
    """The model with its sampling, as ComfyUI's samplers use it.

    Beside core's I2V conditions it reads these, each with a batch axis of 1: `render_latent` [1,16,F,h,w] and
    `reference_latent` [1,16,R,h,w], as the VAE returns them (not normalised), and `render_mask`, `camera_embedding`,
    `ref_index`, `camera_qt` and `camera_qt_ref` in the shapes of `WorldStereoModel._forward`. Instead of
    `camera_embedding`, which takes hundreds of megabytes, `camera_w2c` [1,Fm,4,4] from `normalise` and `camera_K`
    [1,Fm,3,3] in pixels can be given.
    """

    def __init__(self, model_config, device=None):
        super(WAN21, self).__init__(model_config, ModelType.FLOW, device=device, unet_model=WorldStereoModel)
        self.image_to_video = True
        self.use_prompt_cache = True  # see prompt_cache.py
        self._conditions = WeakTensorKeyDictionary()
        self._said: set[str] = set()
        self.memory_usage_factor_conds = ("reference_latent",)

    def warn_once(self, remark: str):
        """Logs a warning, once per model."""
        if remark not in self._said:
            self._said.add(remark)
            logging.warning(remark)

    # Core's signature. In addition it tells the diffusion model which weights it runs with, and to round the timesteps
    # of variants that were not distilled down to whole numbers, as diffusers' UniPC does.
    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        transformer_options = transformer_options | {WHOLE_TIMESTEPS: not self.diffusion_model.config.is_dmd}
        if self.use_prompt_cache and self.current_patcher is not None and not _changes_the_model(self.current_patcher):
            sigmas = transformer_options.get("sample_sigmas", t)
            coming = self.model_sampling.timestep(sigmas[sigmas > 0]).float().tolist()
            transformer_options = transformer_options | {
                WEIGHTS: self.current_weight_patches_uuid,
                COMING_TIMESTEPS: coming,
            }
        return super()._apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def extra_conds(self, **kwargs):
        """Core's I2V conditions and WorldStereo's, for the diffusion model. Raises ValueError if the latent to sample
        does not have the size that the conditioning was made for."""
        out = super().extra_conds(**kwargs)
        if out.pop("reference_latent", None) is not None:  # of core's node ReferenceLatent, not WorldStereo's own
            self.warn_once(
                "ReferenceLatent has no effect on WorldStereo: reference views are inputs of WorldStereo Conditioning."
            )
        noise = kwargs["noise"]
        for name in CONDITION_LATENTS:
            latent = kwargs.get(name, noise)
            if latent.shape[-2:] != noise.shape[-2:] or (name == "render_latent" and latent.shape[2] != noise.shape[2]):
                raise ValueError(
                    f"The latent to sample is {tuple(noise.shape[2:])} (frames, height, width), but the "
                    f"conditioning was made for {tuple(latent.shape[2:])}: use the latent that "
                    "WorldStereo Conditioning returns."
                )
        device = kwargs["device"]
        values = {name: self._on_device(name, kwargs[name], device) for name in CONDITIONS if name in kwargs}
        if "camera_w2c" in kwargs:
            w2c, K = kwargs["camera_w2c"], kwargs["camera_K"]
            height, width = (SPATIAL_DOWNSCALE * side for side in noise.shape[-2:])
            values["camera_embedding"] = self._kept(
                "camera_embedding", w2c, device, lambda: plucker(w2c[0], K[0], height, width, device)[None]
            )
        chosen_for = [int(index) + 1 for index in kwargs.get("ref_index", torch.empty(0)).flatten()]
        return out | {
            name: OfReferences(value, chosen_for) if name in OF_REFERENCES else OnDevice(value)
            for name, value in values.items()
        }

    def _on_device(self, name: str, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The condition in the form the diffusion model needs."""

        def make():
            moved = value.to(device)  # before it is converted: PyTorch's copy would do that on the CPU
            if name in CONDITION_LATENTS:
                moved = self.process_latent_in(moved)
            if name == "reference_latent":
                moved = torch.cat([moved, torch.ones_like(moved[:, :4]), moved], dim=1)
            return moved

        return self._kept(name, value, device, make)

    def _kept(
        self, name: str, source: torch.Tensor, device: torch.device, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """make() in the inference dtype, on the device. What positive and negative share is made only once."""
        of_source = self._conditions.setdefault(source, {})
        kept = of_source[name]() if name in of_source else None
        if kept is None or kept.device != device:
            kept = convert_tensor(make(), self.get_dtype_inference(), device)
            of_source[name] = weakref.ref(kept)
        return kept

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=[]):
        """The part of a condition that belongs to a context window (core's method)."""
        if cond_key not in CONDITIONS:
            return super().resize_cond_for_context_window(
                cond_key, cond_value, window, x_in, device, retain_index_list=retain_index_list
            )
        value, frames = cond_value.cond, context_windows.window_frames(window, retain_index_list)
        if cond_key == "render_latent":
            value = value[:, :, frames]
        elif cond_key in ("render_mask", "camera_embedding"):
            value = value[:, :, context_windows.pixel_frames(frames, self.diffusion_model.config.mask_downsample)]
        elif cond_key == "camera_qt":
            value = value[:, frames]
        else:
            kept, ref_index = context_windows.references(cond_value.chosen_for, frames)
            if cond_key == "ref_index":
                value = torch.tensor([ref_index], dtype=value.dtype, device=value.device)
            elif cond_key == "reference_latent":
                value = value[:, :, kept]
            else:
                value = value[:, kept]
        return cond_value._copy_with(value)

    def extra_conds_shapes(self, **kwargs):
        """The shapes that `memory_required` needs (core's method): of the references."""
        if "reference_latent" not in kwargs:
            return {}
        return {"reference_latent": list(kwargs["reference_latent"].shape)}

    def memory_required(self, input_shape, cond_shapes={}):
        """Bytes that a step needs beside the weights at its peak, which is in self-attention.

        For each sample: every token's residual, its control tokens, its render's pixels, and its prompt's keys and
        values. For one sample at a time: all keys and values, the normed tokens (the attention's result reuses their
        memory; half as much where they are quantised), the queries and result of one span, and an upcast weight.
        benchmarks/RESULTS.md has the measured peaks.
        """
        if not (xformers_enabled() or pytorch_attention_flash_attention()):
            return super().memory_required(input_shape, cond_shapes)
        config, (batch, _, frames, height, width) = self.diffusion_model.config, input_shape
        size = dtype_size(self.get_dtype_inference())
        references = max((shape[2] for shape in cond_shapes.get("reference_latent", [])), default=0)
        per_frame = (height // PATCH[1]) * (width // PATCH[2])
        tokens, targets = (frames + references) * per_frame, frames * per_frame
        rope = 4 * 2 * sum((config.dim // config.num_heads, config.control_dim // config.control_num_heads))
        pixels = MASK_CAM_CHANNELS * frames * math.prod(config.mask_kernel) * height * width * size
        prompt = 2 * config.num_layers * (TEXT_TOKENS + IMAGE_TOKENS) * config.dim * size
        layer = self.diffusion_model.blocks[0].self_attn.q
        quantised = layer.arithmetic(get_torch_device()) is not UPCAST
        normed, queries, weight = (0.5, CHUNK, 0) if quantised else (1, UPCAST_QUERIES, config.dim**2)
        one = tokens * ((2 + normed) * config.dim * size + rope) + (2 * queries * config.dim + weight) * size
        each = tokens * config.dim * size + targets * config.control_dim * size + pixels + prompt
        return WORKSPACE + one + batch * each


def _changes_the_model(patcher) -> bool:
    """Whether the model is changed in a way that the uuid of its weight patches does not show, so that the prompt cache
    could be wrong: hooks, injections (bypass LoRAs), replaced modules."""
    patched = any(
        name.startswith("diffusion_model") and not object_patches.KEEP_CACHE.fullmatch(name)
        for name in patcher.object_patches
    )
    return patched or bool(patcher.current_hooks or patcher.injections)


def config_of(patcher: ModelPatcher) -> WorldStereoConfig:
    """The configuration of a loaded MODEL. Raises ValueError for any model but WorldStereo."""
    if not isinstance(patcher.model, WorldStereo):
        raise ValueError(f"model is {type(patcher.model).__name__}, not WorldStereo. Connect Load WorldStereo FP8.")
    return patcher.model.diffusion_model.config


class WorldStereoModelConfig(WAN21_I2V):
    """ComfyUI's model configuration: the model's class, latent format, noise schedule and memory estimate."""

    latent_format = KeyframeLatents
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, config: WorldStereoConfig):
        super().__init__({"image_model": "wan2.1", "config": config})
        self.sampling_settings["shift"] = config.shift
        self.memory_usage_factor = config.dim / 2222  # as core estimates Wan 2.1

    def get_model(self, state_dict, prefix="", device=None):
        """The model, without its weights (core's method)."""
        return WorldStereo(self, device=device)

    def process_unet_state_dict_for_saving(self, state_dict):
        """Core's names, and the configuration as a tensor, because a model cannot add metadata to the files that
        ModelSave and CheckpointSave write."""
        text = json.dumps(config_content(self.unet_config["config"])).encode()
        config = {CONFIG_TENSOR: torch.tensor(list(text), dtype=torch.uint8)}
        return super().process_unet_state_dict_for_saving(state_dict | config)
