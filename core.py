"""The one door to ComfyUI's internals: every name outside its documented node API that this pack uses, and what for.

ComfyUI keeps its node API (`comfy_api.latest`, `folder_paths`, `node_helpers`) stable, but not these names.
`from ..core import X` looks X up where the table says, at each import, because some are set only while ComfyUI starts.
A name that is gone raises MissingFromCore, which says what needs it; `nodes` then leaves out only the nodes that do.
tests/test_core_contract.py checks the signatures and layouts this pack relies on.
"""

import importlib

NAMES = {
    # Devices and memory
    "cast_to": ("comfy.model_management", "modulation parameters on the computing device"),
    "dtype_size": ("comfy.model_management", "the VRAM estimate"),
    "free_memory": ("comfy.model_management", "room for MoGe's activations"),
    "get_free_memory": ("comfy.model_management", "the loader's memory line; MoGe's batch"),
    "get_torch_device": ("comfy.model_management", "where models, renders and cooks compute"),
    "get_torch_device_name": ("comfy.model_management", "the card's name in messages"),
    "is_device_cpu": ("comfy.model_management", "whether the model runs or is offloaded on the CPU"),
    "pytorch_attention_flash_attention": ("comfy.model_management", "the VRAM estimate"),
    "should_use_fp16": ("comfy.model_management", "whether MoGe is faster in half precision"),
    "supports_fp8_compute": ("comfy.model_management", "whether the card multiplies in FP8"),
    "synchronize": ("comfy.model_management", "waiting for the GPU between two looks at the stop button"),
    "throw_exception_if_processing_interrupted": ("comfy.model_management", "interrupting long work"),
    "unet_manual_cast": ("comfy.model_management", "the activations' dtype"),
    "unet_offload_device": ("comfy.model_management", "the device that offloaded weights are kept on"),
    "xformers_enabled": ("comfy.model_management", "the VRAM estimate"),
    # Linear layers
    "QuantizedTensor": ("comfy.quant_ops", "quantised weights that core offloads, patches and saves"),
    "cast_bias_weight": ("comfy.ops", "fetching a weight: streamed, patched, dequantised"),
    "mixed_precision_ops": ("comfy.ops", "the Linear that ours extends"),
    "run_every_op": ("comfy.ops", "core's check for an interrupt in every layer"),
    "uncast_bias_weight": ("comfy.ops", "returning a fetched weight to the offload stream"),
    # The network
    "EmbedND": ("comfy.ldm.flux.layers", "rotary embeddings"),
    "MLPProj": ("comfy.ldm.wan.model", "the picture's embedding"),
    "WanAttentionBlock": ("comfy.ldm.wan.model", "the backbone's block"),
    "WanI2VCrossAttention": ("comfy.ldm.wan.model", "cross-attention over text and picture"),
    "WanModel": ("comfy.ldm.wan.model", "the backbone"),
    "WanSelfAttention": ("comfy.ldm.wan.model", "self-attention"),
    "attention_pytorch": ("comfy.ldm.modules.attention", "whether the user chose another attention"),
    "optimized_attention": ("comfy.ldm.modules.attention", "attention as the user chose it"),
    "sinusoidal_embedding_1d": ("comfy.ldm.wan.model", "the timestep's embedding"),
    # The model as samplers see it
    "CONDRegular": ("comfy.conds", "conditions that stay on the GPU"),
    "CallbacksMP": ("comfy.patcher_extension", "starting and ending a run of the prompt cache"),
    "WrappersMP": ("comfy.patcher_extension", "showing the keyframes while they are sampled"),
    "CoreModelPatcher": ("comfy.model_patcher", "whether ComfyUI runs with dynamic VRAM"),
    "ModelPatcher": ("comfy.model_patcher", "the patcher without dynamic VRAM: `_load_list`, `load`, `clone`"),
    "ModelPatcherDynamic": ("comfy.model_patcher", "the patcher with dynamic VRAM"),
    "ModelType": ("comfy.model_base", "flow sampling"),
    "WAN21": ("comfy.model_base", "Wan's conditions"),
    "WAN21_I2V": ("comfy.supported_models", "Wan's model configuration"),
    "get_attr": ("comfy.utils", "a weight by its name, while a LoRA is merged or a hook changes it"),
    "get_key_weight": ("comfy.model_patcher", "the same, with the functions that convert and set it"),
    "set_attr": ("comfy.utils", "a weight put back after hooks"),
    "set_attr_param": ("comfy.utils", "a weight set for hooks"),
    "convert_tensor": ("comfy.model_base", "conditions in the inference dtype"),
    # Files
    "load_torch_file": ("comfy.utils", "mapping a safetensors file into memory"),
    "lora": ("comfy", "LoRA names: `model_lora_keys_unet` is wrapped, as it has no hook for diffusers' names"),
    # The VAE
    "HunyuanVideo": ("comfy.latent_formats", "recognising a wrong tiny VAE"),
    "RMS_norm": ("comfy.ldm.wan.vae", "the VAE's norms, each of which one kernel computes with its activation"),
    "TAEHV": ("comfy.taesd.taehv", "accepting tiny VAEs of Wan"),
    "WanVAE": ("comfy.ldm.wan.vae", "refusing other VAEs, and computing this one faster"),
    # The page
    "PromptServer": ("server", "texts on the running node: `send_progress_text`"),
    "GraphBuilder": ("comfy_execution.graph_utils", "Explore Scene, which becomes ordinary nodes"),
    "Latent2RGBPreviewer": ("latent_preview", "the preview of all keyframes"),
    "LatentPreviewMethod": ("comfy.cli_args", "whether core shows a preview of its own"),
    "ProgressBar": ("comfy.utils", "progress of long work"),
    "Wan21": ("comfy.latent_formats", "Wan's latents, whose preview ours replaces"),
    "args": ("comfy.cli_args", "whether core shows a preview of its own"),
    "turbo": ("comfy.ldm.colormap", "the colours of a drawn path"),
}


class MissingFromCore(ImportError):
    """A name that this ComfyUI does not have."""


def __getattr__(name: str):
    if name not in NAMES:
        raise AttributeError(f"core declares no {name}: add it to NAMES, with the reason.")
    module, reason = NAMES[name]
    try:
        found = importlib.import_module(module)
        return getattr(found, name) if hasattr(found, name) else importlib.import_module(f"{module}.{name}")
    except ImportError as e:
        raise MissingFromCore(
            f"This ComfyUI{_version()} has no {module}.{name}, which WorldStereo FP8 needs for: {reason}. Update the "
            f"pack, or use a ComfyUI it was tested with (README)."
        ) from e


def _version() -> str:
    try:
        from comfyui_version import __version__
    except ImportError:
        return ""
    return f" ({__version__})"
