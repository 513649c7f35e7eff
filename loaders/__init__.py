"""Files into MODELs."""

import functools
import logging
import os

import torch

from ..core import (
    ModelPatcher,
    QuantizedTensor,
    get_free_memory,
    get_torch_device,
    get_torch_device_name,
    is_device_cpu,
    unet_manual_cast,
    unet_offload_device,
)
from ..files.text import first_few
from ..fp8.activations import backend
from ..fp8.int8 import INT8
from ..fp8.int8_matmul import product_kernel
from ..fp8.linear import matmul_refusal, operations
from ..fp8.recipe import FP8
from ..scene.memory import REFERENCES
from ..worldstereo.attention import cudnn_is_faster, prefer_cudnn
from ..worldstereo.comfy_model import WorldStereoModelConfig
from ..worldstereo.config import LATENT_CHANNELS, RANKS, SPATIAL_DOWNSCALE, WorldStereoConfig, assumptions, find_config
from ..worldstereo.shapes import backbone_shapes, native_shapes
from . import lora
from .checkpoint import Checkpoint
from .patcher import make_patcher, resident_bytes

lora.register()

LINE = 250  # characters of a tensor's name and shapes in a message
# The tensors that sizes are read from: a file without them is not a complete model.
ANCHORS = tuple(name for name in RANKS if not name.startswith(("controlnet.", "camera_embedding.")))
CONTROL_ANCHORS = tuple(name for name in RANKS if name.startswith("controlnet."))


def _overlay(checkpoint: Checkpoint, base: Checkpoint | None) -> dict[str, Checkpoint]:
    """The file that each tensor comes from: the checkpoint or, for what it lacks, the base."""
    missing = [name for name in CONTROL_ANCHORS if name not in checkpoint.weights]
    if missing:
        raise ValueError(
            f"{checkpoint.name} lacks {first_few(missing)}: it has no WorldStereo control branch, or only "
            "a part of one. Choose a WorldStereo checkpoint."
        )
    source = dict.fromkeys(checkpoint.weights, checkpoint)
    if base is not None:
        if any(name.startswith("controlnet.") for name in base.weights):
            raise ValueError(
                f"base_model {base.name} is a WorldStereo checkpoint. The base must be a plain Wan2.1-I2V-14B-480P "
                "model."
            )
        source = dict.fromkeys(base.weights, base) | source
    missing = [name for name in ANCHORS if name not in source]
    if missing:
        raise _overlay_error(checkpoint, base, missing)
    return source


def _overlay_error(checkpoint: Checkpoint, base: Checkpoint | None, missing: list[str]) -> ValueError:
    if base is not None:
        return ValueError(
            f"base_model {base.name} lacks {first_few(missing)}, and so does {checkpoint.name}. "
            "The base must be a complete Wan2.1-I2V-14B-480P model."
        )
    return ValueError(
        f"{checkpoint.name} is an overlay: it lacks backbone tensors ({first_few(missing)}). Choose the "
        "Wan2.1-I2V-14B-480P model it was made on as base_model."
    )


def _account(
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    source: dict[str, Checkpoint],
    shapes: dict,
    config: WorldStereoConfig,
):
    """Raises ValueError unless every expected tensor is there, in its shape, and no other."""
    expected = native_shapes(config)
    missing = [name for name in expected if name not in shapes]
    if missing and backbone_shapes(config).keys() >= set(missing):
        raise _overlay_error(checkpoint, base, missing)
    if missing:
        raise ValueError(
            f"{checkpoint.name} lacks {len(missing)} tensors: {first_few(missing)}. The file is incomplete; download "
            "or make it again."
        )
    unexpected = [
        f"{source[name].weights[name].name} (in {source[name].name})" for name in shapes if name not in expected
    ]
    if unexpected:
        raise ValueError(
            f"{checkpoint.name}: {len(unexpected)} tensors have no place in a {config.model_type} "
            f"model of {config.num_layers} layers: {first_few(unexpected, length=LINE)}. Choose another file."
        )
    wrong = [
        f"{source[name].weights[name].name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    if wrong:
        raise ValueError(
            f"{checkpoint.name}: wrong shapes: {first_few(wrong, length=LINE)}. The file is damaged, or of another "
            "model."
        )


def load_worldstereo(
    path: str | os.PathLike,
    compute: str = "auto",
    dtype: torch.dtype | None = None,
    base: str | os.PathLike | None = None,
    prompt_cache: bool = True,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Loads a WorldStereo checkpoint as an ordinary ComfyUI model.

    path: a .safetensors file in any of these forms, recognised by content: scaled FP8 (`scale_weight`), BF16, FP16 or
    FP32, each with diffusers or native Wan names, or ComfyUI's own FP8 and INT8 (`weight_scale`, `comfy_quant`).
    compute: "auto" multiplies in FP8 or INT8, as the layer is stored, where the device and the layer's size allow it,
    and elsewhere upcasts the weight; "fp8" requires a device that can; "bf16" always upcasts.
    dtype: of the activations; None lets ComfyUI choose for the device.
    base: the Wan2.1-I2V-14B-480P model, for a file that holds only a part of the backbone.
    prompt_cache: keep what depends only on the prompt or the timestep (see `worldstereo.prompt_cache`).
    disable_dynamic: do not use core's dynamic VRAM; core passes it for nodes that cannot work with it.

    Returns the ModelPatcher. The weights are memory-mapped. Raises ValueError, naming file and tensor, for a file that
    is not a complete WorldStereo checkpoint, and if compute is "fp8" on a device without such a matmul; and OSError.
    """
    device = get_torch_device()
    checkpoint = Checkpoint(path)
    backbone = None if base is None else Checkpoint(base)
    dtypes = {dtype for file in (checkpoint, backbone) if file is not None for dtype in file.quantised_dtypes()}
    for dtype_of_file in dtypes or {FP8}:
        matmul_refusal(compute, dtype_of_file, device)  # raises if `compute` is not possible
    source = _overlay(checkpoint, backbone)
    shapes = {name: file.weights[name].shape for name, file in source.items()}
    found = find_config(checkpoint.path, checkpoint.config, shapes)
    config = found.config
    _account(checkpoint, backbone, source, shapes, config)

    tensors: dict[str, torch.Tensor] = {}
    for file in {id(f): f for f in source.values()}.values():
        tensors |= file.state_dict([name for name, owner in source.items() if owner is file])

    storage_dtype = checkpoint.storage_dtype()
    model_config = WorldStereoModelConfig(config)
    if dtype is None:
        dtype = unet_manual_cast(None, device, model_config.supported_inference_dtypes)
    model_config.set_inference_dtype(storage_dtype, dtype, device=device)
    model_config.custom_operations = operations(storage_dtype, functools.partial(matmul_refusal, compute))
    model = model_config.get_model(tensors)
    offload_device = unet_offload_device()
    patcher = make_patcher(model, device, offload_device, disable_dynamic)
    if cudnn_is_faster(device):
        patcher.model_options["transformer_options"]["optimized_attention_override"] = prefer_cudnn
    if not is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(tensors, assign=True)  # memory-mapped, each in the file's own dtype
    model.use_prompt_cache = prompt_cache
    patcher.cached_patcher_init = (
        load_worldstereo,
        (str(path), compute, dtype, None if backbone is None else str(backbone.path), prompt_cache),
    )
    logging.info(_summary(checkpoint.name, model, config, compute, dtype, device))
    if assumed := assumptions(checkpoint.name, found.content, config):
        logging.info(assumed)
    if not is_device_cpu(device):
        logging.info(_memory(model, config, device))
    return patcher


def _memory(model, config: WorldStereoConfig, device) -> str:
    """One line: the VRAM that a step takes at the first size of the model's table, and what happens if there is
    less."""
    height, width = config.scale_map[0]
    latent = (1, LATENT_CHANNELS, config.nframe, height // SPATIAL_DOWNSCALE, width // SPATIAL_DOWNSCALE)
    references = {"reference_latent": [(1, LATENT_CHANNELS, REFERENCES, *latent[3:])]} if config.has_memory else {}
    need = resident_bytes(model) + model.memory_required(latent, references)
    free = get_free_memory(device)
    line = (
        f"At {width}×{height}"
        + (f" with {REFERENCES} references" if references else "")
        + f" a step takes about {need / 1e9:.1f} GB of VRAM; {free / 1e9:.1f} GB are free."
    )
    if need > free:
        line += (
            f" About {(need - free) / 1e9:.1f} GB of weights will be streamed from RAM during every step. "
            "That costs no time as long as they are copied before the step ends; fewer references need less VRAM."
        )
    return line


def _summary(name: str, model, config: WorldStereoConfig, compute: str, dtype, device) -> str:
    """One line: what was loaded, how its Linear layers multiply, and why."""
    layers = [m for m in model.diffusion_model.modules() if isinstance(getattr(m, "weight", None), QuantizedTensor)]
    kind = f"{name}: {config.model_type}, activations {str(dtype).removeprefix('torch.')}, compute {compute}"
    if not layers:
        return f"{kind}: no quantised weights in the file, its {str(model.get_dtype()).removeprefix('torch.')} weights are used as they are"
    parts = [
        _multiplied(label, [layer for layer in layers if layer.matmul.dtype == of_format], device)
        for label, of_format in (("FP8", FP8), ("INT8", INT8))
    ]
    return f"{kind}: " + "; ".join(part for part in parts if part)


def _multiplied(label: str, layers: list, device) -> str:
    """How the layers of one format multiply, and why; empty without layers."""
    if not layers:
        return ""
    upcast = [reason for reason in (layer.upcast_reason(device) for layer in layers) if reason]
    why = first_few(sorted(set(upcast)))
    if len(upcast) == len(layers):
        return f"all {len(layers)} {label} layers upcast their weight for each product, because {why}"
    name = get_torch_device_name(device)
    line = f"{label} matmul on {len(layers) - len(upcast)} of {len(layers)} {label} layers ({name})"
    if label == "FP8":
        kernels, reason = backend(device)
        line += f", activations quantised by {kernels}" + (f" because {reason}" if reason else "")
    elif device.type == "cuda":
        line += f", products by {product_kernel(device, torch.bfloat16)[0]}"
    return line + (f", upcast on {len(upcast)} ({why})" if upcast else "")
