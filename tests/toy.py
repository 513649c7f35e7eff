"""Toy checkpoints in every form the loader reads, made from the golden weights."""

import json
from pathlib import Path

import comfy.model_management
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from worldstereo_fp8 import remap
from worldstereo_fp8.fp8 import int8
from worldstereo_fp8.fp8.recipe import MARKER, is_quantised, quantise_weight, scale_name

GOLDEN = Path(__file__).parent / "golden"


def golden_inputs(case: str) -> tuple[dict, torch.Tensor]:
    """The inputs of a golden by the forward pass's names, and the original's output."""
    io = load_file(GOLDEN / f"{case}.io.safetensors")
    return {name.removeprefix("in."): value for name, value in io.items() if name.startswith("in.")}, io["out.sample"]


def golden_weights(case: str) -> tuple[dict, dict]:
    """The FP32 weights of a golden by their diffusers names, and the configuration."""
    with safe_open(GOLDEN / f"{case}.weights.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])


def source(case: str) -> dict:
    """The BF16 source file of a golden."""
    return {name: value.bfloat16() for name, value in golden_weights(case)[0].items()}


def save_sources(case: str, folder: Path) -> None:
    """The source file of a golden as bf16.safetensors, with its configuration, and as f32.safetensors, without."""
    weights, config = golden_weights(case)
    save(source(case), folder / "bf16.safetensors", config)
    save(weights, folder / "f32.safetensors")


def cooked(case: str, convs: str = "fp8") -> dict:
    """The scaled-FP8 file of a golden."""
    tensors = {MARKER: torch.zeros(1, dtype=torch.bfloat16)}
    for name, value in source(case).items():
        tensors[name] = value
        if is_quantised(name, tuple(value.shape), convs):
            tensors[name], tensors[scale_name(name)] = quantise_weight(value)
    return tensors


def cooked_int8(case: str, group: int = 16, every: int = 1) -> dict:
    """The INT8 file of a golden, rotated in groups that its widths allow, or with group 0 not rotated.

    every: 2 leaves every second matrix to the FP8 recipe, as a mixed file has it.
    """
    tensors, fp8 = source(case), cooked(case, "bf16")
    matrices = [name for name, value in tensors.items() if int8.is_int8(name, tuple(value.shape), group or 1)]
    for i, name in enumerate(matrices):
        layer = name.removesuffix(".weight")
        if i % every == 0:
            tensors[name], tensors[f"{layer}.weight_scale"] = int8.quantise_weight(tensors[name], group)
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(int8.description(group)), dtype=torch.uint8)
        else:
            tensors[name], tensors[scale_name(name)] = fp8[name], fp8[scale_name(name)]
    return tensors


def native(tensors: dict) -> dict:
    """The same file with native Wan names."""
    return {name if name == MARKER else remap.to_native(name): value for name, value in tensors.items()}


def comfy_style(tensors: dict) -> dict:
    """A cooked file as ComfyUI writes FP8 models: native names, FP32 `weight_scale`, `comfy_quant`."""
    out = {}
    for name, value in native(tensors).items():
        if name.endswith("." + "scale_weight"):
            layer = name.removesuffix(".scale_weight")
            out[f"{layer}.weight_scale"] = value.float()
            quant = json.dumps({"format": "float8_e4m3fn"}).encode()
            out[f"{layer}.comfy_quant"] = torch.tensor(list(quant), dtype=torch.uint8)
        elif name != MARKER:
            out[name] = value
    return out


def save(tensors: dict, path: Path, config: dict | None = None) -> Path:
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        path,
        None if config is None else {"config": json.dumps(config)},
    )
    return path


def run(patcher, inputs: dict, dtype=torch.float32) -> torch.Tensor:
    """`forward` of the model loaded as ComfyUI loads it."""
    comfy.model_management.load_models_gpu([patcher])
    return forward(patcher, inputs, dtype)


def forward(patcher, inputs: dict, dtype=torch.float32) -> torch.Tensor:
    """The diffusion model on inputs named as the goldens', on its own device; FP32 output on the CPU."""
    inputs = {k: v.to(dtype) if v.is_floating_point() and k != "timestep" else v for k, v in inputs.items()}
    inputs = {k: v.to(patcher.load_device) for k, v in inputs.items()}
    image = inputs.pop("encoder_hidden_states_image", None)
    with torch.no_grad():
        return (
            patcher.model.diffusion_model(
                inputs.pop("hidden_states"),
                inputs.pop("timestep"),
                inputs.pop("encoder_hidden_states"),
                clip_fea=image,
                **inputs,
            )
            .float()
            .cpu()
        )


def relative_error(out, reference) -> float:
    return ((out - reference).norm() / reference.norm()).item()
