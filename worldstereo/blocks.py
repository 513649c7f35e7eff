"""What backbone and control branch share: attention, feed-forward, and the spans of tokens they work in.

Letters in the shapes: B batch, F keyframes, R reference views, h×w latent size, n = h/2·w/2 tokens a frame, C backbone
width, D control width.
"""

import dataclasses
import math

import torch
from torch import nn

from ..core import (
    EmbedND,
    WanAttentionBlock,
    WanI2VCrossAttention,
    WanSelfAttention,
    cast_bias_weight,
    cast_to,
    optimized_attention,
    uncast_bias_weight,
)
from ..fp8.activations import gated_add_, layer_norm_modulate, rms_rope
from ..fp8.arithmetic import Tokens
from .attention import wants_whole_tensors
from .object_patches import forward_is_replaced
from .prompt_cache import KeysValues

ROPE_THETA = 10000.0
CHUNK = 16384  # tokens at a time where the intermediate results are wide
UPCAST_QUERIES = CHUNK // 2  # queries at a time where normed tokens and weights, not quantised, take twice the memory


def rope_embedder(head_dim: int) -> EmbedND:
    """The rotary embedding with Wan's split of a head's channels over time, height and width."""
    side = 2 * (head_dim // 6)
    return EmbedND(dim=head_dim, theta=ROPE_THETA, axes_dim=[head_dim - 2 * side, side, side])


def to_tokens(x: torch.Tensor) -> torch.Tensor:
    """[B, C, F, h/2, w/2] to [B, F·n, C]."""
    return x.flatten(2).transpose(1, 2)


def spans(length: int, chunk: int, first: int = 0) -> list[slice]:
    """The tokens from `first` to `length` in about equal parts of at most `chunk`, in multiples of 128."""
    count = max(math.ceil((length - first) / chunk), 1)
    step = math.ceil((length - first) / count / 128) * 128
    return [slice(start, min(start + step, length)) for start in range(first, length, step)]


def part_of(x: Tokens, span: slice) -> Tokens:
    """A span of a single sample's tokens, [1, span, C]."""
    if isinstance(x, torch.Tensor):
        return x[:, span]
    return dataclasses.replace(x.rows(span.start, span.stop), shape=(1, span.stop - span.start, x.shape[-1]))


def norm_weights(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A norm's weight and bias [C] in x's dtype on its device. They are copies, because the next layer overwrites
    core's offload buffers."""
    weight, bias, stream = cast_bias_weight(norm, x, offloadable=True)
    copies = weight.clone(), None if bias is None else bias.clone()
    uncast_bias_weight(norm, weight, bias, stream)
    return copies


def normed(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, layer: nn.Module) -> Tokens:
    """LayerNorm(x)·(1 + scale) + shift in the form that `layer` multiplies. x: [B, L, C]; shift, scale: [B or 1, 1,
    C]."""
    return layer.arithmetic(x.device).layer_norm(x, shift, scale, eps)


def as_input(x: torch.Tensor, layer: nn.Module, done: Tokens | None = None) -> Tokens:
    """x [..., C] in the form that `layer` multiplies, to keep until the layer runs: quantised it is half as large.
    done: tokens of x's size that are no longer needed; their memory is reused if they have the form of the result."""
    return layer.arithmetic(x.device).take(x, done)


class SelfAttention(WanSelfAttention):
    """Wan's self-attention, added to the residual stream in spans of queries."""

    def normed(self, x, shift, scale, eps: float) -> Tokens:
        """LayerNorm(x)·(1 + scale) + shift in the form that `add_to` needs. x: [B,L,C]; shift, scale: [B,1,C]."""
        if forward_is_replaced(self):
            return layer_norm_modulate(x, shift, scale, eps)
        return normed(x, shift, scale, eps, self.q)

    def add_to(self, x, h: Tokens, gate, freqs, transformer_options, first: int = 0):
        """x += gate · attention(h), in place, for the tokens from `first` on, which attend to all tokens. x: [1,L,C],
        h:
        its normed tokens, gate: [1,1,C], freqs: [1,L,1,d/2,2,2].

        Patches that need whole tensors (an `attn1_patch`, a replaced `forward`, another attention override) get them: x
        may then have a batch and is not split.
        """
        if forward_is_replaced(self):
            gated_add_(x, self(h, freqs, transformer_options=transformer_options), gate)
            return
        patches = transformer_options.get("patches", {}).get("attn1_patch", [])
        norm_q, norm_k = norm_weights(self.norm_q, x)[0], norm_weights(self.norm_k, x)[0]
        with self.k.fetched(x.device, x.dtype) as product:
            k = rms_rope(product(h), norm_k, freqs, self.num_heads, self.eps)
        with self.v.fetched(x.device, x.dtype) as product:
            v = product(h)
        queries = UPCAST_QUERIES if isinstance(h, torch.Tensor) else CHUNK
        whole = patches or wants_whole_tensors(transformer_options)
        parts = [slice(0, x.shape[1])] if whole else spans(x.shape[1], queries, first)
        attended = []
        with self.q.fetched(x.device, x.dtype) as product:
            for span in parts:
                part = h if len(parts) == 1 and not first else part_of(h, span)
                q = rms_rope(product(part), norm_q, freqs[:, span], self.num_heads, self.eps)
                y = optimized_attention(q, k, v, heads=self.num_heads, transformer_options=transformer_options)
                for patch in patches:
                    y = patch(
                        {
                            "x": y,
                            "q": q.unflatten(-1, (self.num_heads, -1)),
                            "k": k.unflatten(-1, (self.num_heads, -1)),
                            "transformer_options": transformer_options,
                        }
                    )
                del q
                attended.append(as_input(y, self.o, done=part))
                del y
        del k, v
        with self.o.fetched(x.device, x.dtype) as product:
            for span, y in zip(parts, attended):
                gated_add_(x[:, span], product(y), gate)


class CrossAttention(WanI2VCrossAttention):
    """Wan's cross-attention over text and picture, or over the text alone where no picture features are given. Keys and
    values are computed separately, because they depend only on text and picture (see `prompt_cache`)."""

    def keys_values(self, text, image) -> KeysValues:
        """Keys and values of text [B,T,C] and image [B,I,C] (or None), both embedded."""
        k_img = None if image is None else self.norm_k_img(self.k_img(image))
        v_img = None if image is None else self.v_img(image)
        return KeysValues(self.norm_k(self.k(text)), self.v(text), k_img, v_img)

    def add_to(self, x, norm, kv: KeysValues, transformer_options):
        """x += attention(norm(x), kv), in place. x: [B,L,C]."""
        weight, bias = norm_weights(norm, x)
        scale, shift = (weight.float() - 1)[None, None], bias[None, None]  # type: ignore[index]
        norm_q = norm_weights(self.norm_q, x)[0]
        parts = [slice(0, x.shape[1])] if wants_whole_tensors(transformer_options) else spans(x.shape[1], CHUNK)
        attended = []
        with self.q.fetched(x.device, x.dtype) as product:
            for span in parts:
                h = normed(x[:, span], shift, scale, norm.eps, self.q)
                q = nn.functional.rms_norm(product(h), norm_q.shape, norm_q, self.eps)
                y = optimized_attention(q, kv.k, kv.v, heads=self.num_heads, transformer_options=transformer_options)
                if kv.k_img is not None:
                    y = y + optimized_attention(
                        q,
                        kv.k_img,
                        kv.v_img,
                        heads=self.num_heads,
                        transformer_options=transformer_options,
                        low_precision_attention=False,  # as core has it: SageAttention gives NaNs here
                    )
                attended.append(as_input(y, self.o))
        del h, q, y
        with self.o.fetched(x.device, x.dtype) as product:
            for span, y in zip(parts, attended):
                x[:, span] += product(y)


def add_feed_forward(
    ffn: nn.Sequential, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor, eps: float
) -> None:
    """x += gate · ffn(LayerNorm(x)·(1 + scale) + shift), in place. x: [B,L,C]; the others [B,1,C]."""
    if forward_is_replaced(ffn):
        gated_add_(x, ffn(layer_norm_modulate(x, shift, scale, eps)), gate)
        return
    first, _, second = ffn
    parts = spans(x.shape[1], CHUNK)
    hidden = []
    with first.fetched(x.device, x.dtype) as product:
        for span in parts:
            h = product(normed(x[:, span], shift, scale, eps, first))
            hidden.append(second.arithmetic(h.device).gelu(h))
            del h
    with second.fetched(x.device, x.dtype) as product:
        for span, h in zip(parts, hidden):
            gated_add_(x[:, span], product(h), gate)


class Block(WanAttentionBlock):
    """A backbone block over reference and target tokens; only the targets attend to text and picture."""

    def __init__(self, cross_attn_type, dim, ffn_dim, num_heads, *options, operation_settings={}):
        super().__init__(cross_attn_type, dim, ffn_dim, num_heads, *options, operation_settings=operation_settings)
        self.self_attn = SelfAttention(dim, num_heads, eps=self.eps, operation_settings=operation_settings)
        self.cross_attn = CrossAttention(dim, num_heads, eps=self.eps, operation_settings=operation_settings)

    def forward(
        self,
        x,
        e,
        freqs,
        kv: list[KeysValues] | None,
        ref_len=0,
        context=None,
        image_len=None,
        transformer_options={},
        targets_only=False,
    ):
        """x: [B, ref_len + F·n, C], references first; overwritten with the result. e: [B,1,6,C]. kv: of each sample.

        context: [B, I+T, C], picture and text embedded, and image_len I (None without a picture): for a replaced
        `cross_attn.forward`, which computes keys and values itself.
        targets_only: the references are attended to but not updated, because nothing reads them afterwards.

        A patch may keep a reference to tensors it was given or has returned, so these are copied before they are
        overwritten, here and in the model's forward.
        """
        patches = transformer_options.get("patches", {})
        modulation = cast_to(self.modulation, dtype=x.dtype, device=x.device).unsqueeze(0) + e
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(2)
        # One sample at a time, so that a batch (CFG) needs no more memory than one; patches get the whole batch.
        whole, each = [slice(0, len(x))], [slice(b, b + 1) for b in range(len(x))]
        first = ref_len if targets_only else 0
        for sample in whole if patches.get("attn1_patch") or forward_is_replaced(self.self_attn) else each:
            part = x[sample]
            h = self.self_attn.normed(part, shift[sample], scale[sample], self.eps)
            self.self_attn.add_to(
                part, h, gate[sample], freqs if len(freqs) == 1 else freqs[sample], transformer_options, first
            )
            del h
        if forward_is_replaced(self.cross_attn):
            targets = x[:, ref_len:]
            targets += self.cross_attn(
                self.norm3(targets), context, context_img_len=image_len, transformer_options=transformer_options
            )
        else:
            for b in range(len(x)):
                self.cross_attn.add_to(x[b : b + 1, ref_len:], self.norm3, kv[b], transformer_options)  # type: ignore[index]
        for patch in patches.get("attn2_patch", []):
            x = patch({"x": x, "transformer_options": transformer_options}).clone()
        for sample in whole if forward_is_replaced(self.ffn) else each:
            add_feed_forward(
                self.ffn, x[sample, first:], ffn_shift[sample], ffn_scale[sample], ffn_gate[sample], self.eps
            )
        return x
