"""The FP8 Linear as a ComfyUI operation.

The weight is core's QuantizedTensor (per-tensor float8_e4m3fn), so offload, dynamic VRAM, LoRA patching and saving are
core's. What is ours is the product: native FP8 matmul with a dynamic scale for each token, or the weight upcast.
"""

import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from .matmul import scaled_linear, why_not_native
from .recipe import FP8

COMPUTE = ("auto", "fp8", "bf16")


def native_refusal(compute: str, device: torch.device) -> str | None:
    """Why Linear layers cannot take native FP8 matmul on `device`, or None if they can.

    compute: "auto" and "fp8" want native matmul, "bf16" does not. Raises ValueError where "fp8" cannot be had.
    """
    if compute not in COMPUTE:
        raise ValueError(f"compute is {compute!r}, expected one of {', '.join(COMPUTE)}")
    if compute == "bf16":
        return "compute is bf16"
    refusal = None
    if not comfy.model_management.supports_fp8_compute(device):
        name = comfy.model_management.get_torch_device_name(device)
        refusal = f"{name} has no FP8 matmul (compute capability 8.9 or higher: GeForce RTX 40, Hopper and newer)"
    if refusal and compute == "fp8":
        raise ValueError(f"compute is fp8, but {refusal}. Choose compute auto or bf16.")
    return refusal


def operations(storage_dtype: torch.dtype, native: bool):
    """ComfyUI operations whose Linear holds scaled-FP8 weights.

    storage_dtype: of the tensors that are not FP8, and the dtype an FP8 weight stands for.
    native: whether the device multiplies FP8 matrices; layers whose size it cannot take upcast all the same.
    """
    core = comfy.ops.mixed_precision_ops({}, storage_dtype)

    class Operations(core):
        class Linear(core.Linear):
            """Linear over the last axis of any input; see `matmul.scaled_linear` for the native product."""

            def _load_from_state_dict(self, state_dict, prefix, *args):
                weight = state_dict[f"{prefix}weight"]
                if weight.dtype != FP8:  # kept as the file has it; core would round it to storage_dtype
                    self.factory_kwargs["dtype"] = weight.dtype
                super()._load_from_state_dict(state_dict, prefix, *args)

            def why_not_native(self) -> str | None:
                """Why this layer upcasts its weight, or None if it multiplies in FP8."""
                if not isinstance(self.weight, QuantizedTensor):
                    return "not an FP8 weight"
                if not native:
                    return "native FP8 matmul is off"
                if self._full_precision_mm_config:
                    return "the file asks for full precision"
                return why_not_native(self.in_features, self.out_features)

            def forward(self, input):
                comfy.ops.run_every_op()
                if input.numel() == 0 or self.why_not_native() is not None:
                    return self.forward_comfy_cast_weights(input, input.dtype)
                # As core's own FP8 layers ask for it: a weight with a LoRA comes back requantised where core streams
                # it, or dequantised with the LoRA added.
                weight, bias, stream = comfy.ops.cast_bias_weight(
                    self, dtype=self.weight.dtype, device=input.device, bias_dtype=input.dtype, offloadable=True,
                    compute_dtype=input.dtype, want_requant=True)
                if isinstance(weight, QuantizedTensor):
                    output = scaled_linear(input, weight._qdata, weight._params.scale, bias)
                else:
                    output = torch.nn.functional.linear(input, weight.to(input.dtype), bias)
                comfy.ops.uncast_bias_weight(self, weight, bias, stream)
                return output

    return Operations
