"""The parts of a forward pass that depend only on the prompt or the timestep, computed once and kept.

The cross-attention's keys and values (of 40 layers: 6.3 GB of weights) follow from the prompt and the picture, the
modulations of backbone and control branch (1.6 GB of weights) from the timestep. Kept, they take 0.6 GB per prompt, in
VRAM while a run uses them and otherwise in RAM, and their weights need not be in VRAM while the steps run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

KEPT_TIMESTEPS = 256

# What the sampling model passes to the diffusion model in transformer_options; without it nothing is kept between calls.
WEIGHTS = "worldstereo_weights"  # which LoRAs the weights carry
COMING_TIMESTEPS = "worldstereo_timesteps"  # the timesteps of this run
WHOLE_TIMESTEPS = "worldstereo_whole_timesteps"  # whether timesteps are cut to whole numbers

# Layers whose weights are used for nothing else, by the ends of their native names.
LAYERS = (
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.k_img",
    "cross_attn.v_img",
    "text_embedding.0",
    "text_embedding.2",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "norm1.linear",
    "norm2.linear",
)


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of one sample in one block's cross-attention: text [1,T,C], picture [1,I,C] or None."""

    k: torch.Tensor
    v: torch.Tensor
    k_img: torch.Tensor | None
    v_img: torch.Tensor | None


@dataclass(frozen=True)
class Prompt:
    """A sample's prompt and picture. context: [1, I+T, C], embedded. blocks: one KeysValues for each block, None where
    a patch's cross-attention computes its own."""

    context: torch.Tensor
    blocks: list[KeysValues | None]

    def to(self, device: torch.device) -> "Prompt":
        """The same on another device."""
        blocks = [
            kv and KeysValues(*(None if t is None else t.to(device) for t in (kv.k, kv.v, kv.k_img, kv.v_img)))
            for kv in self.blocks
        ]
        return Prompt(self.context.to(device), blocks)


@dataclass(frozen=True)
class Time:
    """A timestep. temb: [1,1,C]. e: [1,1,6,C]. control: for each control block the shift, scale and gate [1,1,D] of
    its attention and of its FFN, the norms' own weights folded in."""

    temb: torch.Tensor
    e: torch.Tensor
    control: list[tuple[torch.Tensor, ...]]


@dataclass
class _Kept:
    inputs: tuple[torch.Tensor | None, ...]
    prompt: Prompt
    used: bool = True
    parked: Prompt | None = None  # the copy that waits between runs


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@dataclass
class PromptCache:
    """What is kept of one model. `weights` says which LoRAs they were computed with; with others they are
    forgotten. A prompt is forgotten after a run that did not use it, and earlier if another needs its room."""

    weights: object = None
    prompts: list[_Kept] = field(default_factory=list)
    times: dict[tuple, Time] = field(default_factory=dict)

    def forget(self):
        """Frees everything."""
        self.prompts.clear()
        self.times.clear()

    def start_run(self):
        """Forgets the prompts that the run before did not use."""
        self.prompts = [kept for kept in self.prompts if kept.used]
        for kept in self.prompts:
            kept.used = False

    def end_run(self, device: torch.device):
        """Moves the prompts to `device`: between runs their VRAM is free for other models."""
        for kept in self.prompts:
            if kept.parked is None:
                kept.parked = kept.prompt.to(device)
            kept.prompt = kept.parked

    def use_weights(self, weights):
        """Forgets everything if `weights` are not those of the call before."""
        if weights != self.weights:
            self.forget()
            self.weights = weights

    @torch.compiler.disable
    def prompts_of(self, samples: list[tuple], compute: Callable[..., Prompt]) -> list[Prompt]:
        """The prompt of each sample's inputs (tensors or None, compared by value); `compute(*inputs)` if it is not kept.

        Before any is computed, those that this run has not used make room: memory is reckoned for this run's alone.
        """
        found: list = [self._find(inputs) for inputs in samples]
        if None in found:
            self.prompts = [kept for kept in self.prompts if kept.used]
            for i, inputs in enumerate(samples):
                if found[i] is None:
                    found[i] = self._find(inputs)  # that of a sample before
                if found[i] is None:
                    found[i] = _Kept(tuple(None if t is None else t.clone() for t in inputs), compute(*inputs))
                    self.prompts.append(found[i])
        return [kept.prompt for kept in found]

    def _find(self, inputs: tuple) -> _Kept | None:
        for kept in self.prompts:
            if all(map(_same, kept.inputs, inputs)):
                kept.used = True
                if kept.prompt.context.device != inputs[0].device:
                    kept.prompt = kept.prompt.to(inputs[0].device)
                return kept
        return None

    def timesteps(
        self, wanted: list[float], coming: list[float], key: tuple, compute: Callable[[list[float]], list[Time]]
    ) -> list[Time]:
        """What follows from the wanted timesteps. If one is not kept, those of the coming ones are computed with it, where
        there is room for all.
        key: what else they depend on (dtype, device)."""
        missing = [t for t in dict.fromkeys(wanted) if (t, *key) not in self.times]
        if missing:
            missing += [t for t in dict.fromkeys(coming) if (t, *key) not in self.times and t not in missing]
            if len(self.times) + len(missing) > KEPT_TIMESTEPS:
                self.times.clear()
                missing = list(dict.fromkeys(wanted))
            self.times |= {(t, *key): time for t, time in zip(missing, compute(missing))}
        return [self.times[name] for name in [(t, *key) for t in wanted]]
