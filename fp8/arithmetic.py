"""How a Linear multiplies: in FP8, in INT8, or with its weight upcast.

The three classes have the same methods, documented in `Upcast`. Code that computes a layer's input gets the class from
the layer and lets it prepare the input, without knowing which one it is.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch

from . import activations, int8_matmul
from .activations import QuantisedTokens
from .matmul import scaled_linear, size_refusal
from .recipe import FP8

Tokens: TypeAlias = torch.Tensor | QuantisedTokens  # [..., K]


def dequantised(x: Tokens) -> torch.Tensor:
    """The tokens as a tensor [..., K]."""
    return x.dequantise() if isinstance(x, QuantisedTokens) else x


@dataclass(frozen=True)
class Upcast:
    """Plain tensors: the weight is upcast for each product, or is not quantised."""

    def take(self, x: torch.Tensor, done: Tokens | None = None) -> Tokens:
        """x [..., K] as the layer's input, to keep until the layer runs. done: tokens of x's size that are no longer
        needed; their memory is reused if they have the form of the result."""
        return done.copy_(x) if isinstance(done, torch.Tensor) else x

    def gelu(self, x: torch.Tensor) -> Tokens:
        """GELU(x) in its tanh form as the layer's input. x: [..., K]; it may be overwritten."""
        return torch.ops.aten.gelu_(x, approximate="tanh")

    def layer_norm(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> Tokens:
        """LayerNorm(x)·(1 + scale) + shift as the layer's input; shapes as in `activations.layer_norm_modulate`."""
        return activations.layer_norm_modulate(x, shift, scale, eps)


@dataclass(frozen=True)
class FP8Matmul:
    """FP8 weight times FP8 tokens; see `matmul`."""

    dtype = FP8

    def size_refusal(self, in_features: int, out_features: int) -> str | None:
        return size_refusal(in_features, out_features)

    def take(self, x: torch.Tensor, done: Tokens | None = None) -> Tokens:
        fits = isinstance(done, QuantisedTokens) and done.values.dtype == FP8
        return activations.quantise(x, into=done if fits else None)

    def gelu(self, x: torch.Tensor) -> Tokens:
        return activations.gelu_quantise(x)

    def layer_norm(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> Tokens:
        return activations.layer_norm_quantise(x, shift, scale, eps)

    def product(self, x: Tokens, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x · (weight·scale)ᵀ + bias; shapes as in `matmul.scaled_linear`. x may have been prepared for another
        layer."""
        if isinstance(x, QuantisedTokens) and x.values.dtype != FP8:
            x = x.dequantise()
        return scaled_linear(x, weight, scale, bias)


@dataclass(frozen=True)
class INT8Matmul:
    """INT8 weight times INT8 tokens, both rotated in groups of `group` channels (0: not rotated); see `int8_matmul`."""

    group: int
    dtype = torch.int8

    def size_refusal(self, in_features: int, out_features: int) -> str | None:
        return None

    def take(self, x: torch.Tensor, done: Tokens | None = None) -> Tokens:
        return int8_matmul.quantise(x, self.group, into=done if isinstance(done, QuantisedTokens) else None)

    def gelu(self, x: torch.Tensor) -> Tokens:
        return int8_matmul.gelu_quantise(x, self.group)

    def layer_norm(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> Tokens:
        return int8_matmul.quantise(activations.layer_norm_modulate(x, shift, scale, eps), self.group)

    def product(self, x: Tokens, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return int8_matmul.int8_linear(x, weight, scale, bias, self.group)


UPCAST, FP8_MATMUL = Upcast(), FP8Matmul()
