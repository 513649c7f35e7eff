"""A checkpoint file, known by its header: its tensors under their native names, before any weight is read."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from .. import remap
from ..core import load_torch_file
from ..files.json import CONFIG_LIMIT
from ..files.regular import open_regular
from ..files.text import first_few, shown
from ..fp8 import int8
from ..fp8.files import DTYPES, Tensor, read_header
from ..fp8.recipe import COMFY_QUANT, FP8, INPUT_SCALE_SUFFIXES, MARKER, SCALE_SUFFIX, SCALE_SUFFIXES, dequantise
from ..worldstereo.config import CONFIG_TENSOR

FLOATS = ("F32", "F16", "BF16")
FORMATS = {"F8_E4M3": "float8_e4m3fn", "I8": int8.FORMAT}  # ComfyUI's name of each format that is loaded, by dtype
COMFY_QUANT_LIMIT = 4096  # bytes of a layer's description; the longest known have 100

# Other model files, recognised by a part of one of their tensors' names.
KINDS = (
    ("lora_", "a LoRA: load WorldStereo first and add this file with a LoRA loader node"),
    ("lokr_", "a LoKr adapter: load WorldStereo first and add this file with a LoRA loader node"),
    ("decoder.middle.0.residual", "a Wan VAE: it belongs in models/vae"),
    ("decoder.mid.block", "a VAE: it belongs in models/vae"),
    ("encoder.block.0.layer", "a T5 text encoder: it belongs in models/text_encoders"),
    ("shared.weight", "a text encoder: it belongs in models/text_encoders"),
    ("text_model.", "a CLIP text encoder: it belongs in models/text_encoders"),
    ("vision_model.", "a CLIP vision model: it belongs in models/clip_vision"),
    ("visual.", "a CLIP vision model: it belongs in models/clip_vision"),
    ("vace_blocks.", "a Wan VACE model: load it with Load Diffusion Model"),
    ("double_blocks.", "a Flux or Hunyuan model: load it with Load Diffusion Model"),
    ("joint_blocks.", "a Stable Diffusion 3 model: load it with Load Diffusion Model"),
    ("input_blocks.", "a Stable Diffusion model: load it with Load Checkpoint"),
)


def describe(names: Iterable[str]) -> str:
    """What kind of file these tensor names look like."""
    names = list(names)
    for part, kind in KINDS:
        if any(part in name for name in names):
            return kind
    known = {native for native in map(native_name, names) if native}
    if any(n.startswith("blocks.") for n in known) and not any(n.startswith("controlnet.") for n in known):
        if any(n.startswith("img_emb.") for n in known):
            return (
                "a plain Wan2.1-I2V model without WorldStereo's control branch: it can be the base_model of an "
                "overlay file, or be loaded with Load Diffusion Model"
            )
        return "a plain Wan text-to-video model: load it with Load Diffusion Model"
    return f"an unknown kind of file (tensors such as {first_few(names, 3)})"


def native_name(name: str) -> str | None:
    """The native name of a tensor with a native or diffusers name; None for a name that no WorldStereo file has."""
    name = remap.without_prefix(name)
    if remap.is_native(name):
        return name
    try:
        return remap.to_native(name)
    except KeyError:
        return None


class Checkpoint:
    """The tensors of one file by native name.

    weights: weights, biases and parameters. scales: the entry of each layer's scale, by layer name. quant: the entry of
    each layer's `comfy_quant`, and formats: its content. config: the text of the configuration in the file, or None.

    A file with ComfyUI's prefix may be a checkpoint with a VAE and text encoders: tensors without the prefix are
    ignored. Raises ValueError for a tensor under two names, two scales of one layer, and tensors that do not belong to
    WorldStereo.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.name = shown(self.path.name)
        entries, metadata = read_header(self.path)
        self.config = metadata.get("config")
        self.weights: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.quant: dict[str, Tensor] = {}
        self.formats: dict[str, dict] = {}
        unknown = []
        saved_by_comfyui = any(name.startswith(remap.PREFIXES[0]) for name in entries)
        for name, entry in entries.items():
            if name.split(".")[-1] == MARKER or (saved_by_comfyui and not name.startswith(remap.PREFIXES[0])):
                continue
            if remap.without_prefix(name) == CONFIG_TENSOR:
                self.config = self._text(entry, CONFIG_LIMIT)
                continue
            native = native_name(name)
            if native is None:
                unknown.append(name)
                continue
            if native.endswith(INPUT_SCALE_SUFFIXES):
                continue  # activations are scaled dynamically here
            table, key = self.weights, native
            for suffix in (*SCALE_SUFFIXES, COMFY_QUANT):
                if native.endswith("." + suffix):
                    table = self.quant if suffix == COMFY_QUANT else self.scales
                    key = native[: -len(suffix) - 1]
                    break
            if key in table:
                what = f"two scales for {key}" if table is self.scales else f"{key} twice"
                raise ValueError(f"{self.name} holds {what}: {table[key].name} and {name}. Keep one of them.")
            table[key] = entry
        self._read_formats()
        if not self.weights or (unknown and "controlnet.proj_in.weight" not in self.weights):
            raise ValueError(f"{self.name} is not a WorldStereo checkpoint. It looks like {describe(entries)}.")
        if unknown:
            raise ValueError(f"{self.name} holds tensors that belong to no WorldStereo model: {first_few(unknown)}.")
        self._check_dtypes()

    def _read_formats(self):
        """Reads each layer's `comfy_quant`. Raises ValueError for a format that cannot be loaded."""
        for layer, entry in self.quant.items():
            where = f"{self.name}: {entry.name}"
            quant = int8.read_description(self._text(entry, COMFY_QUANT_LIMIT).encode(), where)
            if quant["format"] not in FORMATS.values():
                raise ValueError(
                    f"{where} says the format is {shown(quant['format'])}; only {' and '.join(FORMATS.values())} "
                    "can be loaded."
                )
            self.formats[layer] = quant

    def quantised_dtypes(self) -> list[torch.dtype]:
        """The dtypes of the quantised matrices."""
        found = {entry.dtype for entry in self.weights.values() if len(entry.shape) == 2}
        return [DTYPES[dtype] for dtype in FORMATS if dtype in found]

    def _check_int8(self, layer: str, entry: Tensor):
        where, scale = f"{self.name}: {entry.name}", self.scales.get(layer)
        described = self.formats.get(layer, {}).get("format") == int8.FORMAT
        if len(entry.shape) != 2 or not described or scale is None:
            raise ValueError(
                f"{where} is I8. Only matrices can be INT8, and they need {layer}.{int8.SCALE_SUFFIX} and "
                f"{layer}.{COMFY_QUANT} with the format {int8.FORMAT}. Make the file again."
            )
        if scale.count not in (1, entry.shape[0]) or scale.dtype not in FLOATS:
            raise ValueError(
                f"{self.name}: {scale.name} is {scale.dtype} {list(scale.shape)}; an INT8 weight has one scale, "
                f"or one for each of its {entry.shape[0]} rows."
            )
        int8.check_group(int8.group_of(self.formats[layer]), entry.shape[1], f"{self.name}: {self.quant[layer].name}")

    def _text(self, entry: Tensor, limit: int) -> str:
        """The text in a tensor of bytes. Raises ValueError for another dtype or shape, or more than `limit` bytes."""
        if entry.dtype != "U8" or len(entry.shape) != 1 or entry.nbytes > limit:
            raise ValueError(
                f"{self.name}: {entry.name} is {shown(entry.dtype)} {list(entry.shape)}; it must be a text of at most "
                f"{limit} bytes (U8). The file is damaged; make it again."
            )
        with open_regular(self.path) as file:
            file.seek(entry.begin)
            return file.read(entry.nbytes).decode("utf-8", "replace")

    def _check_dtypes(self):
        for native, entry in self.weights.items():
            if not entry.count:
                raise ValueError(
                    f"{self.name}: {entry.name} has the shape {list(entry.shape)} and is empty. The file is "
                    "damaged; download or make it again."
                )
            layer = native.removesuffix(".weight")
            if entry.dtype == "I8" and native.endswith(".weight"):
                self._check_int8(layer, entry)
                continue
            quantised = entry.dtype == "F8_E4M3"
            if entry.dtype not in FLOATS and not (quantised and native.endswith(".weight") and len(entry.shape) > 1):
                raise ValueError(
                    f"{self.name}: {entry.name} is {shown(entry.dtype)}. Weights can be BF16, FP16, FP32, or "
                    "float8_e4m3fn or int8 with a scale; all other tensors BF16, FP16 or FP32. Make the file again."
                )
            if quantised and layer not in self.scales:
                raise ValueError(
                    f"{self.name}: {entry.name} is FP8 but has no scale ({layer}.{SCALE_SUFFIX}): its "
                    "values cannot be restored. Use a scaled-FP8 file, or cook one with Cook FP8."
                )
        for table in (self.scales, self.quant):
            for layer, entry in table.items():
                weight = self.weights.get(f"{layer}.weight")
                if weight is None:
                    raise ValueError(
                        f"{self.name}: {entry.name} belongs to a weight that is missing. The file is incomplete; "
                        "download or make it again."
                    )
                # A convolution left in BF16 may still come with the scale it would have had; a matrix may not.
                if weight.dtype not in FORMATS and len(weight.shape) < 3:
                    raise ValueError(
                        f"{self.name}: {entry.name} scales {weight.name}, which is {shown(weight.dtype)}, "
                        "not FP8 or INT8. The file is inconsistent; make it again."
                    )
                if layer in self.formats and self.formats[layer]["format"] != FORMATS.get(weight.dtype):
                    raise ValueError(
                        f"{self.name}: {weight.name} is {weight.dtype}, but {self.quant[layer].name} says "
                        f"{self.formats[layer]['format']}. The file is inconsistent; make it again."
                    )
        for layer, entry in self.scales.items():
            if (
                self.weights[f"{layer}.weight"].dtype != "I8" and entry.shape not in ((), (1,))
            ) or entry.dtype not in FLOATS:
                raise ValueError(
                    f"{self.name}: {entry.name} is {shown(entry.dtype)} {list(entry.shape)}; an FP8 weight has one "
                    "scale, a BF16, FP16 or FP32 number. Make the file again."
                )

    def storage_dtype(self) -> torch.dtype:
        """The most frequent dtype of the tensors that are not quantised."""
        dtypes = [entry.dtype for entry in self.weights.values() if entry.dtype in FLOATS]
        return DTYPES[max(FLOATS, key=dtypes.count)]

    def state_dict(self, keep) -> dict[str, torch.Tensor]:
        """The tensors whose native names are in `keep`, memory-mapped, as core's quantised operations load them:
        `layer.weight`, `layer.weight_scale` (FP32), `layer.comfy_quant`. FP8 convolutions are dequantised to FP32.

        Raises ValueError if core cannot read the file, and for a scale that is not a positive number.
        """
        try:
            tensors = load_torch_file(str(self.path))
        except Exception as e:  # of the safetensors library or core, neither of which names the file
            raise ValueError(
                f"{self.name} cannot be read by ComfyUI ({type(e).__name__}: {shown(e)}). Download or make it again."
            ) from e
        out = {}
        for native in keep:
            entry = self.weights[native]
            tensor = out[native] = tensors[entry.name]
            if tensor.dtype not in (FP8, int8.INT8):
                continue
            layer = native.removesuffix(".weight")
            scale = tensors[self.scales[layer].name].float()
            scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
            wrong = ~(torch.isfinite(scale) & (scale > 0))
            if wrong.any():
                raise ValueError(
                    f"{self.name}: {self.scales[layer].name} is {scale[wrong][0].item()}; a scale must be a positive "
                    "number. The file is damaged; download or make it again."
                )
            if tensor.ndim > 2:
                out[native] = dequantise(tensor, scale, torch.float32)
                continue
            quant = self.formats.get(layer, {"format": FORMATS["F8_E4M3"]})
            out[f"{layer}.weight_scale"] = scale
            out[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(quant).encode()), dtype=torch.uint8)
        return out
