"""The quantised Linear as a ComfyUI operation.

The weight is core's QuantizedTensor (per-tensor float8_e4m3fn, or int8_tensorwise with or without rotation), so core
does offloading, dynamic VRAM, LoRA patching and saving. This module adds the product: quantised weights times
activations quantised with a dynamic scale per token, or the weight upcast.
"""

import contextlib
import functools
import types
from collections.abc import Callable

import torch

from ..core import (
    QuantizedTensor,
    cast_bias_weight,
    get_torch_device_name,
    mixed_precision_ops,
    run_every_op,
    supports_fp8_compute,
    uncast_bias_weight,
)
from . import int8_matmul
from .activations import backend, row_scales_refusal
from .arithmetic import FP8_MATMUL, UPCAST, FP8Matmul, INT8Matmul, Tokens, Upcast, dequantised
from .int8 import INT8

COMPUTE = ("auto", "fp8", "bf16")


@functools.cache
def matmul_refusal(compute: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `device` cannot multiply matrices of `dtype` (FP8 or INT8), so that layers upcast their weights, or None if
    it can.

    compute: "auto" and "fp8" ask for the product of quantised weights, "bf16" does not. Raises ValueError where "fp8"
    is not possible.
    """
    if compute not in COMPUTE:
        raise ValueError(f"compute is {compute!r}, expected one of {', '.join(COMPUTE)}")
    if compute == "bf16":
        return "compute is bf16"
    refusal = int8_matmul.device_refusal(device) if dtype == INT8 else _fp8_refusal(device)
    if refusal and compute == "fp8":
        raise ValueError(f"compute is fp8, but {refusal}. Choose compute auto or bf16.")
    return refusal


def _fp8_refusal(device: torch.device) -> str | None:
    if not supports_fp8_compute(device):
        name = get_torch_device_name(device)
        return f"{name} has no FP8 matmul (compute capability 8.9 or higher: GeForce RTX 40, Hopper and newer)"
    if backend(device)[0] == "eager":  # it has only per-token scales
        return row_scales_refusal(device)
    return None


def operations(storage_dtype: torch.dtype, refusal: Callable[[torch.dtype, torch.device], str | None]) -> type:
    """ComfyUI operations whose Linear holds scaled-FP8 and INT8 weights.

    storage_dtype: of the tensors that are not quantised, and the dtype a quantised weight stands for.
    refusal: why a device cannot multiply FP8 or INT8 matrices, None if it can; see `matmul_refusal`. Layers whose size
    the matrix units do not support upcast in any case.
    """
    core_operations = mixed_precision_ops({}, storage_dtype)

    @torch.compiler.assume_constant_result
    def refused(dtype: torch.dtype, device: torch.device) -> str | None:
        return refusal(dtype, device)

    class Operations(core_operations):  # type: ignore[misc, valid-type]
        class Linear(core_operations.Linear):  # type: ignore[name-defined]
            """Linear over the last axis of any input; see `arithmetic` for the products."""

            matmul: FP8Matmul | INT8Matmul | None = None  # None for a weight that is not quantised

            def _load_from_state_dict(self, state_dict, prefix, *args):
                weight = state_dict[f"{prefix}weight"]
                if f"{prefix}comfy_quant" not in state_dict:  # core would cast the weight to another dtype
                    self.factory_kwargs["dtype"] = weight.dtype
                super()._load_from_state_dict(state_dict, prefix, *args)
                if isinstance(self.weight, QuantizedTensor):
                    params = self.weight._params
                    rotated = params.convrot_groupsize if getattr(params, "convrot", False) else 0
                    self.matmul = INT8Matmul(rotated) if weight.dtype == INT8 else FP8_MATMUL

            def set_weight(self, weight, inplace_update=False, **kwargs):
                """Core's hook LoRAs pass `inplace_update`, which core's own quantised layer does not accept."""
                return super().set_weight(weight, **kwargs)

            def upcast_reason(self, device: torch.device) -> str | None:
                """Why this layer upcasts its weight on `device`, or None if the weight multiplies as it is stored."""
                if not isinstance(self.weight, QuantizedTensor) or self.matmul is None:
                    return "not a quantised weight"
                if self._full_precision_mm_config:
                    return "the file asks for full precision"
                if getattr(self, "comfy_force_cast_weights", False):
                    return "another compute dtype was chosen for the model"
                refusal = refused(self.matmul.dtype, device)
                return refusal or self.matmul.size_refusal(self.in_features, self.out_features)

            def is_wrapped(self) -> bool:
                """Whether `forward` is replaced (core's bypass LoRAs) or has hooks."""
                # Not getattr with a default: torch.compile would always see the default.
                own = isinstance(self.forward, types.MethodType) and self.forward.__func__ is type(self).forward
                return not own or bool(self._forward_hooks or self._forward_pre_hooks)

            def arithmetic(self, device: torch.device) -> Upcast | FP8Matmul | INT8Matmul:
                """How the layer multiplies on `device`, which decides the form its input should have."""
                return UPCAST if self.upcast_reason(device) or self.is_wrapped() else self.matmul  # type: ignore[return-value]

            @contextlib.contextmanager
            def fetched(self, device: torch.device, dtype: torch.dtype):
                """A context that fetches the weight once (streams, patches, dequantises it) and yields the layer's
                product, a function of a tensor [..., K] or of tokens from its `arithmetic`: for inputs that come in
                several parts. Only one layer at a time, because core's offload streams reuse their buffers."""
                if self.is_wrapped():
                    yield lambda x: self(dequantised(x))
                else:
                    with self._fetched(device, dtype) as product:
                        yield product

            @contextlib.contextmanager
            def _fetched(self, device: torch.device, dtype: torch.dtype):
                run_every_op()
                quantised = self.upcast_reason(device) is None
                # A weight with a LoRA comes back requantised if core streams it, else dequantised with the LoRA added.
                weight, bias, stream = cast_bias_weight(
                    self,
                    dtype=self.weight.dtype if quantised else dtype,
                    device=device,
                    bias_dtype=dtype,
                    offloadable=True,
                    compute_dtype=dtype,
                    want_requant=quantised,
                )
                if isinstance(weight, QuantizedTensor) and quantised:
                    scale = weight._params.scale
                    product = functools.partial(self.matmul.product, weight=weight._qdata, scale=scale)  # type: ignore[union-attr]
                else:
                    weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
                    product = functools.partial(_plain_linear, weight=weight.to(dtype))
                try:
                    yield functools.partial(product, bias=bias)
                finally:
                    uncast_bias_weight(self, weight, bias, stream)

            def forward(self, input):
                with self._fetched(input.device, input.dtype) as product:
                    return product(input)

    return Operations


def _plain_linear(x: Tokens, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(dequantised(x), weight, bias)
