"""The parts of a forward pass that depend only on the prompt or the timestep, computed once and kept.

The cross-attention's keys and values (of 40 layers: 6.3 GB of weights) depend only on the prompt and the picture, the
modulations of backbone and control branch (1.6 GB of weights) only on the timestep. Once computed they take 0.6 GB per
prompt, in VRAM during a run and in RAM otherwise, and the weights behind them need not be in VRAM during the steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

KEPT_TIMESTEPS = 256

# What the sampling model passes to the diffusion model in transformer_options. Without WEIGHTS nothing is kept.
WEIGHTS = "worldstereo_weights"  # identifies the LoRAs in the weights
COMING_TIMESTEPS = "worldstereo_timesteps"  # the timesteps of this run
WHOLE_TIMESTEPS = "worldstereo_whole_timesteps"  # whether timesteps are rounded down to whole numbers

# The layers whose results are kept, by the ends of their native names. Their weights are used for nothing else.
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
    """What depends only on a sample's prompt and picture. context: [1, I+T, C], both embedded. blocks: one KeysValues
    per block, None where a replaced cross-attention computes its own."""

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
    """What depends only on a timestep. temb: its embedding [1,1,C]. e: the backbone's modulation [1,1,6,C]. control:
    for each control block the shift, scale and gate [1,1,D] of its attention and of its FFN
    (`control.AdaptiveNorm`)."""

    temb: torch.Tensor
    e: torch.Tensor
    control: list[tuple[torch.Tensor, ...]]


@dataclass
class _Kept:
    inputs: tuple[torch.Tensor | None, ...]
    prompt: Prompt
    used: bool = True
    parked: Prompt | None = None  # the copy in RAM, for between the runs


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@dataclass
class PromptCache:
    """The cache of one model. `weights` identifies the weights that its content was computed with; it is cleared when
    they change. A prompt is dropped after a run that did not use it, and earlier if another one needs its memory."""

    weights: object = None
    prompts: list[_Kept] = field(default_factory=list)
    times: dict[tuple, Time] = field(default_factory=dict)

    def forget(self):
        """Drops everything."""
        self.prompts.clear()
        self.times.clear()

    def start_run(self):
        """Drops the prompts that the previous run did not use."""
        self.prompts = [kept for kept in self.prompts if kept.used]
        for kept in self.prompts:
            kept.used = False

    def end_run(self, device: torch.device):
        """Moves the prompts to `device`, so that between runs other models can use their VRAM."""
        for kept in self.prompts:
            if kept.parked is None:
                kept.parked = kept.prompt.to(device)
            kept.prompt = kept.parked

    def use_weights(self, weights):
        """Drops everything if `weights` are not those of the previous call."""
        if weights != self.weights:
            self.forget()
            self.weights = weights

    @torch.compiler.disable
    def prompts_of(self, samples: list[tuple], compute: Callable[..., Prompt]) -> list[Prompt]:
        """The prompt of each sample's inputs (tensors or None, compared by value), or `compute(*inputs)` for new ones.

        Before any is computed, those that this run has not used are dropped: the memory estimate counts only this
        run's.
        """
        found: list = [self._find(inputs) for inputs in samples]
        if None in found:
            self.prompts = [kept for kept in self.prompts if kept.used]
            for i, inputs in enumerate(samples):
                if found[i] is None:
                    found[i] = self._find(inputs)  # computed for an earlier sample
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
        """What depends on the wanted timesteps. If one of them is new, all coming ones are computed with it, if there
        is room for them. key: what else the result depends on (dtype, device)."""
        missing = [t for t in dict.fromkeys(wanted) if (t, *key) not in self.times]
        if missing:
            missing += [t for t in dict.fromkeys(coming) if (t, *key) not in self.times and t not in missing]
            if len(self.times) + len(missing) > KEPT_TIMESTEPS:
                self.times.clear()
                missing = list(dict.fromkeys(wanted))
            self.times |= {(t, *key): time for t, time in zip(missing, compute(missing))}
        return [self.times[name] for name in [(t, *key) for t in wanted]]
