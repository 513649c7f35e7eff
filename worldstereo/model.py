"""WorldStereo as a ComfyUI Wan model: the backbone with reference views, the control branch beside it.

Source: WorldStereo (CVPR 2026) on Wan2.1-I2V-14B. Wan's own modules are ComfyUI's (`comfy.ldm.wan.model`).

Letters in the shapes: B batch, F keyframes, R reference views, h×w latent size, n = h/2·w/2 tokens a frame, C backbone
width, D control width.
"""

import dataclasses
import functools
import math
import weakref

import comfy.conds
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.flux.layers import EmbedND
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.wan.model import (
    MLPProj,
    WanAttentionBlock,
    WanI2VCrossAttention,
    WanModel,
    WanSelfAttention,
    sinusoidal_embedding_1d,
)
from comfy.model_base import convert_tensor
from comfy.model_management import cast_to
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..fp8.activations import (
    QuantisedTokens,
    gated_add_,
    gelu_quantise,
    layer_norm_modulate,
    layer_norm_quantise,
    quantise,
    rms_rope,
)
from .attention import prefer_cudnn
from .config import CAMERA_QT, IN_CHANNELS, LATENT_CHANNELS, MASK_CAM_CHANNELS, PATCH, SPATIAL_DOWNSCALE, WorldStereoConfig
from .constants import COMING_TIMESTEPS, WEIGHTS, Constants, KeysValues, Prompt, Time

NORM_EPS = 1e-5  # LayerNorms of the control branch
CONTROL_QK_EPS = 1e-6  # and the RMSNorms of its queries and keys
ROPE_THETA = 10000.0
CHUNK = 16384  # tokens that wide intermediates are made for at once
UPCAST_QUERIES = CHUNK // 2  # queries at once where normed tokens and weights are not in FP8 and take twice the room
TEXT_TOKENS, IMAGE_TOKENS = 512, 257
WORKSPACE = 150 * 2**20  # bytes, of cuBLAS, cuDNN and what is too small to count

Tokens = torch.Tensor | QuantisedTokens  # [1, L, C]


def _rope_embedder(head_dim: int) -> EmbedND:
    """Wan's split of a head's channels over time, height and width."""
    side = 2 * (head_dim // 6)
    return EmbedND(dim=head_dim, theta=ROPE_THETA, axes_dim=[head_dim - 2 * side, side, side])


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """[B, C, F, h/2, w/2] to [B, F·n, C]."""
    return x.flatten(2).transpose(1, 2)


def _spans(length: int, chunk: int) -> list[slice]:
    """Parts of at most `chunk` tokens, about equal, in whole tiles of 128."""
    count = max(math.ceil(length / chunk), 1)
    step = math.ceil(length / count / 128) * 128
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _part(x: Tokens, span: slice) -> Tokens:
    """A span of a single sample's tokens, [1, span, C]."""
    if isinstance(x, QuantisedTokens):
        return dataclasses.replace(x.rows(span.start, span.stop), shape=(1, span.stop - span.start, x.shape[-1]))
    return x[:, span]


def _norm_weights(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A norm's weight and bias on x's device, copied: they outlive the next layer's turn in core's offload buffers."""
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    copies = weight.clone(), None if bias is None else bias.clone()
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return copies


def _normed(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, layer: nn.Module) -> Tokens:
    """LayerNorm(x)·(1 + scale) + shift for `layer`: in FP8 if it multiplies so. shift, scale: [1, 1, C]."""
    function = layer_norm_quantise if layer.takes_fp8(x.device) else layer_norm_modulate
    return function(x, shift, scale, eps)


def _for(x: torch.Tensor, layer: nn.Module, done: Tokens | None = None) -> Tokens:
    """x as `layer` takes it, kept until its turn comes: FP8 is half as large. done: tokens of x's size, which are
    written over where they are of the kind that `layer` takes."""
    if layer.takes_fp8(x.device):
        return quantise(x, into=done if isinstance(done, QuantisedTokens) else None)
    return done.copy_(x) if isinstance(done, torch.Tensor) else x


class SelfAttention(WanSelfAttention):
    """Wan's self-attention, added to the residual stream in spans of queries."""

    def add_to(self, x, h: Tokens, gate, freqs, transformer_options):
        """x += gate · attention(h), in place. x: [1,L,C], h: its normed tokens, gate: [1,1,C], freqs: [1,L,1,d/2,2,2].

        With an `attn1_patch`, which wants whole tensors, x may have a batch and is not split.
        """
        patches = transformer_options.get("patches", {}).get("attn1_patch", [])
        norm_q, norm_k = _norm_weights(self.norm_q, x)[0], _norm_weights(self.norm_k, x)[0]
        with self.k.held(x.device, x.dtype) as product:
            k = rms_rope(product(h), norm_k, freqs, self.num_heads, self.eps)
        with self.v.held(x.device, x.dtype) as product:
            v = product(h)
        queries = CHUNK if isinstance(h, QuantisedTokens) else UPCAST_QUERIES
        spans = [slice(0, x.shape[1])] if patches else _spans(x.shape[1], queries)
        attended = []
        with self.q.held(x.device, x.dtype) as product:
            for span in spans:
                part = h if len(spans) == 1 else _part(h, span)
                q = rms_rope(product(part), norm_q, freqs[:, span], self.num_heads, self.eps)
                y = optimized_attention(q, k, v, heads=self.num_heads, transformer_options=transformer_options)
                for patch in patches:
                    y = patch({"x": y, "q": q.unflatten(-1, (self.num_heads, -1)),
                               "k": k.unflatten(-1, (self.num_heads, -1)), "transformer_options": transformer_options})
                del q
                attended.append(_for(y, self.o, done=part))
                del y
        del k, v
        with self.o.held(x.device, x.dtype) as product:
            for span, y in zip(spans, attended):
                gated_add_(x[:, span], product(y), gate)


class CrossAttention(WanI2VCrossAttention):
    """Wan's cross-attention over text and picture, or over the text alone where no picture features are given. Keys
    and values come apart from the queries: they are the prompt's (see `constants`)."""

    def keys_values(self, text, image) -> KeysValues:
        """text: [B,T,C]; image: [B,I,C] or None, both embedded."""
        k_img = None if image is None else self.norm_k_img(self.k_img(image))
        v_img = None if image is None else self.v_img(image)
        return KeysValues(self.norm_k(self.k(text)), self.v(text), k_img, v_img)

    def add_to(self, x, norm, kv: KeysValues, transformer_options):
        """x += attention(norm(x), kv), in place. x: [B,L,C]."""
        weight, bias = _norm_weights(norm, x)
        scale, shift = (weight.float() - 1)[None, None], bias[None, None]
        norm_q = _norm_weights(self.norm_q, x)[0]
        spans = _spans(x.shape[1], CHUNK)
        attended = []
        with self.q.held(x.device, x.dtype) as product:
            for span in spans:
                h = _normed(x[:, span], shift, scale, norm.eps, self.q)
                q = nn.functional.rms_norm(product(h), norm_q.shape, norm_q, self.eps)
                y = optimized_attention(q, kv.k, kv.v, heads=self.num_heads, transformer_options=transformer_options)
                if kv.k_img is not None:
                    y = y + optimized_attention(q, kv.k_img, kv.v_img, heads=self.num_heads,
                                                transformer_options=transformer_options)
                attended.append(_for(y, self.o))
        del h, q, y
        with self.o.held(x.device, x.dtype) as product:
            for span, y in zip(spans, attended):
                x[:, span] += product(y)


def add_feed_forward(ffn: nn.Sequential, x, shift, scale, gate, eps: float):
    """x += gate · ffn(LayerNorm(x)·(1 + scale) + shift), in place. x: [B,L,C]; the others [B,1,C]."""
    first, _, second = ffn
    spans = _spans(x.shape[1], CHUNK)
    hidden = []
    with first.held(x.device, x.dtype) as product:
        for span in spans:
            h = product(_normed(x[:, span], shift, scale, eps, first))
            # In place where it stays as wide: all spans' hidden tokens are there at once.
            hidden.append(gelu_quantise(h) if second.takes_fp8(h.device) else torch.ops.aten.gelu_(h, approximate="tanh"))
            del h
    with second.held(x.device, x.dtype) as product:
        for span, h in zip(spans, hidden):
            gated_add_(x[:, span], product(h), gate)


class Block(WanAttentionBlock):
    """A backbone block over reference and target tokens; only the targets look at text and picture."""

    def __init__(self, cross_attn_type, dim, ffn_dim, num_heads, window_size, qk_norm, cross_attn_norm, eps,
                 operation_settings={}):
        super().__init__(cross_attn_type, dim, ffn_dim, num_heads, window_size, qk_norm, cross_attn_norm, eps,
                         operation_settings=operation_settings)
        self.self_attn = SelfAttention(dim, num_heads, eps=eps, operation_settings=operation_settings)
        self.cross_attn = CrossAttention(dim, num_heads, eps=eps, operation_settings=operation_settings)

    def forward(self, x, e, freqs, kv: list[KeysValues], ref_len=0, transformer_options={}):
        """x: [B, ref_len + F·n, C], references first; overwritten with the result. e: [B,1,6,C]. kv: of each sample.

        What a patch has seen or returned is its own, here and in the model's forward: it is copied before it is
        overwritten.
        """
        patches = transformer_options.get("patches", {})
        modulation = cast_to(self.modulation, dtype=x.dtype, device=x.device).unsqueeze(0) + e
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(2)
        # One sample at a time, so that a batch (CFG) needs no more memory than one; patches want the batch whole.
        samples = [slice(0, len(x))] if patches.get("attn1_patch") else [slice(b, b + 1) for b in range(len(x))]
        for sample in samples:
            part = x[sample]
            h = _normed(part, shift[sample], scale[sample], self.eps, self.self_attn.q)
            self.self_attn.add_to(part, h, gate[sample], freqs if len(freqs) == 1 else freqs[sample], transformer_options)
            del h
        for b in range(len(x)):
            self.cross_attn.add_to(x[b:b + 1, ref_len:], self.norm3, kv[b], transformer_options)
        for patch in patches.get("attn2_patch", []):
            x = patch({"x": x, "transformer_options": transformer_options}).clone()
        for b in range(len(x)):
            sample = slice(b, b + 1)
            add_feed_forward(self.ffn, x[sample], ffn_shift[sample], ffn_scale[sample], ffn_gate[sample], self.eps)
        return x


class AdaptiveNorm(nn.Module):
    """LayerNorm whose shift, scale and gate come from the time embedding."""

    def __init__(self, dim, time_dim, operation_settings):
        super().__init__()
        ops, factory = operation_settings["operations"], {k: operation_settings[k] for k in ("device", "dtype")}
        self.linear = ops.Linear(time_dim, 3 * dim, **factory)
        self.norm = ops.LayerNorm(dim, eps=NORM_EPS, **factory)

    def forward(self, temb):
        """temb: [S,1,C], SiLU applied. Returns shift, scale (FP32) and gate, [S,1,D] each, for a LayerNorm without
        weights of its own: (LN·w + b)·(1 + scale) + shift = LN·(1 + [w·(1 + scale) − 1]) + [b·(1 + scale) + shift]."""
        weight, bias = _norm_weights(self.norm, temb)
        shift, scale, gate = self.linear(temb).chunk(3, dim=-1)
        scale = 1 + scale.float()
        return bias.float() * scale + shift.float(), weight.float() * scale - 1, gate


class ControlBlock(nn.Module):
    """A block of the control branch: self-attention and feed-forward, their norms modulated by the time embedding."""

    def __init__(self, config: WorldStereoConfig, operation_settings):
        super().__init__()
        ops, factory = operation_settings["operations"], {k: operation_settings[k] for k in ("device", "dtype")}
        dim = config.control_dim
        self.norm1 = AdaptiveNorm(dim, config.dim, operation_settings)
        self.self_attn = SelfAttention(dim, config.control_num_heads, eps=CONTROL_QK_EPS, operation_settings=operation_settings)
        self.norm2 = AdaptiveNorm(dim, config.dim, operation_settings)
        self.ffn = nn.Sequential(ops.Linear(dim, config.control_ffn_dim, **factory), nn.GELU(approximate="tanh"),
                                 ops.Linear(config.control_ffn_dim, dim, **factory))

    def modulation(self, temb) -> tuple[torch.Tensor, ...]:
        """Shift, scale and gate of the attention, then of the FFN: [S,1,D] each."""
        return *self.norm1(temb), *self.norm2(temb)

    def forward(self, x, modulation, freqs, transformer_options):
        """x: [1, F·n, D]; overwritten with the result."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        h = _normed(x, shift, scale, NORM_EPS, self.self_attn.q)
        self.self_attn.add_to(x, h, gate, freqs, transformer_options)
        add_feed_forward(self.ffn, x, ffn_shift, ffn_scale, ffn_gate, NORM_EPS)
        return x


class MaskCamEmbedding(nn.Module):
    """Tokens of the render mask and the camera embedding."""

    def __init__(self, config: WorldStereoConfig, operation_settings):
        super().__init__()
        ops, factory = operation_settings["operations"], {k: operation_settings[k] for k in ("device", "dtype")}
        # Weights in FP32, as core's patch embedding has them: an FP8 value times its scale has more than BF16's 8 bits,
        # which counts where the model computes in FP32.
        factory["dtype"] = torch.float32
        kernel = (config.mask_downsample, SPATIAL_DOWNSCALE, SPATIAL_DOWNSCALE)
        self.padding = config.mask_downsample - 1
        self.mask_proj = nn.Sequential(
            ops.Conv3d(MASK_CAM_CHANNELS, config.mask_channels, kernel_size=kernel, stride=kernel, **factory),
            ops.GroupNorm(config.mask_channels // 8, config.mask_channels, **factory),
            nn.SiLU(),
        )
        self.mask_zero_proj = ops.Conv3d(config.mask_channels, config.dim, kernel_size=PATCH, stride=PATCH, **factory)

    def forward(self, render_mask, camera_embedding):
        """render_mask [B,1,Fm,8h,8w], camera_embedding [B,6,Fm,8h,8w]. Returns [B, C, F, h/2, w/2]."""
        x = torch.cat([render_mask, camera_embedding], dim=1)
        return self.mask_zero_proj(self.mask_proj(nn.functional.pad(x, (0, 0, 0, 0, self.padding, 0))))


class ControlBranch(nn.Module):
    """The branch that looks at the render. Its i-th residual is asked for after the i-th backbone block, so that no
    two exist at once."""

    def __init__(self, config: WorldStereoConfig, operation_settings):
        super().__init__()
        ops, factory = operation_settings["operations"], {k: operation_settings[k] for k in ("device", "dtype")}
        self.controlnet_patch_embedding = ops.Conv3d(IN_CHANNELS, config.dim, kernel_size=PATCH, stride=PATCH, **factory)
        self.controlnet_mask_embedding = MaskCamEmbedding(config, operation_settings)
        self.proj_in = ops.Linear(config.dim, config.control_dim, **factory)
        self.controlnet_blocks = nn.ModuleList(
            ControlBlock(config, operation_settings) for _ in range(config.control_num_layers))
        self.proj_out = nn.ModuleList(
            ops.Linear(config.control_dim, config.dim, **factory) for _ in range(config.control_num_layers))
        self.rope_embedder = _rope_embedder(config.control_dim // config.control_num_heads)

    def embed(self, x, render_latent, render_mask, camera_embedding):
        """x [B,20,F,h,w]: noisy latent and mask. Returns the branch's first tokens, [B, F·n, D]."""
        x = self.controlnet_patch_embedding(torch.cat([x, render_latent], dim=1))
        return self.proj_in(_tokens(x + self.controlnet_mask_embedding(render_mask, camera_embedding)))


def add_control(block: ControlBlock, proj_out: nn.Linear, x, modulations, freqs, transformer_options, target):
    """Runs a block of the control branch on its tokens x [B, F·n, D], in place, and adds its residual to the backbone's
    target tokens [B, F·n, C], in place. modulations: of each sample."""
    for b, modulation in enumerate(modulations):
        block(x[b:b + 1], modulation, freqs, transformer_options)
    with proj_out.held(x.device, x.dtype) as product:
        for span in _spans(x.shape[1], CHUNK):
            target[:, span] += product(x[:, span])


@torch.compiler.disable
def _untraced(function, *args, **kwargs):
    return function(*args, **kwargs)


def _runs_others_code(transformer_options) -> bool:
    """Whether patches or an attention override run inside the blocks. They may look at the block's number, and core's
    TorchCompileModel traces without regard to transformer_options: the first block's number would stand for all."""
    override = transformer_options.get("optimized_attention_override", prefer_cudnn)
    return override is not prefer_cudnn or any(transformer_options.get(key) for key in ("patches", "patches_replace"))


class WorldStereoModel(WanModel):
    """The diffusion model: noisy latent and conditions to velocity."""

    def __init__(self, config: WorldStereoConfig, image_model=None, device=None, dtype=None, operations=None):
        super().__init__(
            model_type="i2v", patch_size=PATCH, in_dim=IN_CHANNELS, dim=config.dim, ffn_dim=config.ffn_dim,
            freq_dim=config.freq_dim, text_dim=config.text_dim, out_dim=LATENT_CHANNELS, num_heads=config.num_heads,
            num_layers=config.num_layers, eps=config.eps, wan_attn_block_class=Block, device=device, dtype=dtype,
            operations=operations)
        self.config = config
        settings = {"operations": operations, "device": device, "dtype": dtype}
        self.img_emb = MLPProj(config.image_dim, config.dim, operation_settings=settings)
        if config.has_memory:
            factory = {"device": device, "dtype": dtype}
            self.camera_embedding = nn.Sequential(
                operations.Linear(CAMERA_QT, config.camera_mlp_dim, **factory), nn.SiLU(),
                operations.Linear(config.camera_mlp_dim, config.dim, **factory), nn.SiLU(),
                operations.Linear(config.dim, config.dim, **factory))
        self.controlnet = ControlBranch(config, settings)
        self.constants = Constants()

    def _positions(self, times, height, width, first_column=0):
        """Rotary positions of whole frames. times: [b, frames]. Returns [b, frames·height·width, 3] (t, y, x)."""
        rows = torch.arange(height, device=times.device, dtype=times.dtype)
        columns = torch.arange(width, device=times.device, dtype=times.dtype) + first_column
        shape = (*times.shape, height, width)
        return torch.stack([times[:, :, None, None].expand(shape), rows[:, None].expand(shape),
                            columns.expand(shape)], dim=-1).flatten(1, 3)

    def _embed_frames(self, x, camera_qt):
        """Latent frames [B,36,F,h,w] and their cameras [B,F,7] (or None) to tokens [B, F·n, C]."""
        tokens = _tokens(self.patch_embedding(x.float()).to(x.dtype)).contiguous()
        if camera_qt is None:
            return tokens
        camera = self.camera_embedding(camera_qt)
        return tokens + camera.repeat_interleave(tokens.shape[1] // camera.shape[1], dim=1)

    def _check(self, x, render_latent, render_mask, camera_embedding, reference_latent, ref_index, camera_qt,
               camera_qt_ref):
        b, _, frames, height, width = x.shape
        if height % PATCH[1] or width % PATCH[2]:
            raise ValueError(f"WorldStereo: the latent is {width}×{height}; both must be even "
                             "(pictures whose sides are multiples of 16)")
        control = {"render_latent": render_latent, "render_mask": render_mask, "camera_embedding": camera_embedding}
        missing = [name for name, value in control.items() if value is None]
        if missing and len(missing) < len(control):
            raise ValueError(f"WorldStereo: {', '.join(missing)} missing: render_latent, render_mask and "
                             "camera_embedding are given together, or none of them for no control branch")
        references = {"reference_latent": reference_latent, "ref_index": ref_index}
        missing = [name for name, value in references.items() if value is None]
        if len(missing) == 1:
            raise ValueError(f"WorldStereo: {missing[0]} missing: reference_latent and ref_index are given together")
        if not self.config.has_memory and any(v is not None for v in (reference_latent, camera_qt, camera_qt_ref)):
            raise ValueError(f"WorldStereo: {self.config.model_type} takes no references and no camera_qt")
        if reference_latent is not None:
            count = reference_latent.shape[2]
            if count > frames:
                raise ValueError(f"WorldStereo: {count} references for {frames} frames; give at most one a frame")
            if ref_index.shape[-1] != count:
                raise ValueError(f"WorldStereo: {count} references but {ref_index.shape[-1]} in ref_index")
            if (camera_qt is None) != (camera_qt_ref is None):
                raise ValueError("WorldStereo: camera_qt and camera_qt_ref are given together with references")
        count = ref_index.shape[-1] if reference_latent is not None else 0
        mask_frames = (frames - 1) * self.config.mask_downsample + 1
        pixels = (mask_frames, SPATIAL_DOWNSCALE * height, SPATIAL_DOWNSCALE * width)
        for name, value, shape in (
            ("render_latent", render_latent, (b, LATENT_CHANNELS, frames, height, width)),
            ("render_mask", render_mask, (b, 1, *pixels)),
            ("camera_embedding", camera_embedding, (b, MASK_CAM_CHANNELS - 1, *pixels)),
            ("camera_qt", camera_qt, (b, frames, CAMERA_QT)),
            ("reference_latent", reference_latent, (b, IN_CHANNELS, count, height, width)),
            ("camera_qt_ref", camera_qt_ref, (b, count, CAMERA_QT)),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"WorldStereo: {name} is {tuple(value.shape)}, expected {shape} for a latent of "
                                 f"{tuple(x.shape)}")

    @torch.compiler.disable(recursive=False)  # torch.compile takes a block, once for all of them, not their loop
    def _forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={},
                 render_latent=None, render_mask=None, camera_embedding=None, reference_latent=None, ref_index=None,
                 camera_qt=None, camera_qt_ref=None, **kwargs):
        """The forward pass.

        x: [B,36,F,h,w] noisy latent, mask, condition latent. timestep: [B], sigma·1000. context: [B,512,text_dim].
        clip_fea: [B,257,image_dim]; without it only the text is attended to.
        render_latent [B,16,F,h,w], render_mask [B,1,Fm,8h,8w], camera_embedding [B,6,Fm,8h,8w]: all three, or none
        for no control branch. Fm = F, or d(F−1)+1 where the mask kernel's time size is d.
        reference_latent [B,36,R,h,w], ref_index [R] or [B,R], camera_qt [B,F,7], camera_qt_ref [B,R,7]: the memory
        variants' alone; without references the targets attend to themselves only.
        Returns the velocity, [B,16,F,h,w]. Raises ValueError on inputs that don't fit together.
        """
        self._check(x, render_latent, render_mask, camera_embedding, reference_latent, ref_index, camera_qt,
                    camera_qt_ref)
        frames, rows, columns = x.shape[2], x.shape[3] // PATCH[1], x.shape[4] // PATCH[2]
        grid = transformer_options["grid_sizes"] = (frames, rows, columns)

        freqs = self.rope_encode(*x.shape[2:], device=x.device, dtype=torch.float32,
                                 transformer_options=transformer_options)
        constants = self._constants(transformer_options)
        times = self._times(constants, timestep.flatten().expand(len(x)), x.dtype, x.device, transformer_options)
        prompts = constants.prompts_of([(context[b:b + 1], None if clip_fea is None else clip_fea[b:b + 1])
                                        for b in range(len(x))], self._prompt)
        e, temb = (torch.cat([getattr(time, name) for time in times]) for name in ("e", "temb"))

        control = None
        if render_latent is not None:
            control = self.controlnet.embed(x[:, :LATENT_CHANNELS + 4], render_latent, render_mask, camera_embedding)
            frame_times = torch.arange(frames, device=x.device, dtype=torch.float32)[None]
            control_freqs = self.controlnet.rope_embedder(self._positions(frame_times, rows, columns)).movedim(1, 2)

        model_input = x
        x = self._embed_frames(x, camera_qt)
        ref_len, references = 0, None
        if reference_latent is not None:
            references = self._embed_frames(reference_latent, camera_qt_ref)
            ref_len = references.shape[1]
            ref_times = torch.atleast_2d(ref_index).to(device=x.device, dtype=torch.float32) + 1
            ref_freqs = self.rope_embedder(self._positions(ref_times, rows, columns, first_column=columns)).movedim(1, 2)
            freqs = torch.cat([ref_freqs, freqs.expand(len(ref_freqs), *freqs.shape[1:])], dim=1)
            x = torch.cat([references, x], dim=1)
            if self.config.update_ref:
                references = None

        patches = transformer_options.get("patches", {})
        blocks_replace = transformer_options.get("patches_replace", {}).get("dit", {})
        transformer_options["total_blocks"] = len(self.blocks)
        transformer_options["block_type"] = "double"
        # Patches are written for the backbone's tokens; an attention override serves both.
        control_options = {k: v for k, v in transformer_options.items() if not k.startswith("patches")}
        untraced = _runs_others_code(transformer_options)
        run_control = functools.partial(_untraced, add_control) if untraced else add_control
        for i, block in enumerate(self.blocks):
            run_block = functools.partial(_untraced, block) if untraced else block
            transformer_options["block_index"] = control_options["block_index"] = i
            if references is not None and i > 0:
                x[:, :ref_len] = references

            if ("double_block", i) in blocks_replace:
                txt = torch.cat([prompt.context for prompt in prompts])

                def run(args):
                    kv = self._keys_values(block, args["txt"], clip_fea)
                    return {"img": run_block(args["img"].clone(), args["vec"], args["pe"], kv, ref_len=ref_len,
                                             transformer_options=args["transformer_options"])}

                args = {"img": x, "txt": txt, "vec": e, "pe": freqs, "transformer_options": transformer_options}
                x = blocks_replace[("double_block", i)](args, {"original_block": run})["img"].clone()
            else:
                x = run_block(x, e, freqs, [prompt.blocks[i] for prompt in prompts], ref_len=ref_len,
                              transformer_options=transformer_options)

            if control is not None and i < len(self.controlnet.controlnet_blocks):
                run_control(self.controlnet.controlnet_blocks[i], self.controlnet.proj_out[i], control,
                            [time.control[i] for time in times], control_freqs, control_options, x[:, ref_len:])

            for patch in patches.get("double_block", []):
                x = patch({"img": x, "x": model_input, "vec": temb, "block_index": i, "img_offset": ref_len,
                           "transformer_options": transformer_options})["img"].clone()

        return self.unpatchify(self.head(x[:, ref_len:], temb), grid)

    def _constants(self, transformer_options) -> Constants:
        """The kept constants if the sampling model vouches for the weights, else fresh ones for this call alone."""
        weights = transformer_options.get(WEIGHTS)
        if weights is None:
            return Constants()
        self.constants.use_weights(weights)
        return self.constants

    @torch.compiler.disable
    def _times(self, constants: Constants, timestep, dtype, device, transformer_options) -> list[Time]:
        """The constants of each sample's timestep."""

        def compute(timesteps: list[float]) -> list[Time]:
            t = torch.tensor(timesteps, device=device)
            temb = self.time_embedding(sinusoidal_embedding_1d(self.freq_dim, t).to(dtype)).unsqueeze(1)
            e = self.time_projection(temb).unflatten(2, (6, self.dim))
            activated = nn.functional.silu(temb)
            control = [block.modulation(activated) for block in self.controlnet.controlnet_blocks]
            return [Time(temb[s:s + 1], e[s:s + 1], [tuple(m[s:s + 1] for m in block) for block in control])
                    for s in range(len(timesteps))]

        return constants.timesteps(timestep.float().tolist(), transformer_options.get(COMING_TIMESTEPS, []), (dtype, device), compute)

    def _prompt(self, context, clip_fea) -> Prompt:
        """The constants of one sample's text [1,512,text_dim] and picture [1,257,image_dim] or None."""
        text = self.text_embedding(context)
        image = None if clip_fea is None else self.img_emb(clip_fea)
        embedded = text if image is None else torch.cat([image, text], dim=1)
        return Prompt(embedded, [block.cross_attn.keys_values(text, image) for block in self.blocks])

    def _keys_values(self, block: Block, context, clip_fea) -> list[KeysValues]:
        """Of a patched, embedded context [B, I+T, C], for each sample."""
        image_len = 0 if clip_fea is None else clip_fea.shape[1]
        return [block.cross_attn.keys_values(sample[:, image_len:], sample[:, :image_len] if image_len else None)
                for sample in context.split(1)]


CONDITION_LATENTS = ("render_latent", "reference_latent")


class OnDevice(comfy.conds.CONDRegular):
    """A condition that is moved to the GPU once a run, where core would copy it at every step, and that is not copied
    when it is alone in its batch."""

    def concat(self, others):
        return super().concat(others) if others else self.cond


class WorldStereo(comfy.model_base.WAN21):
    """The model with its sampling: what ComfyUI's samplers see.

    Beyond core's I2V conditioning it reads from the conditioning, each with a batch axis of 1: `render_latent`
    [1,16,F,h,w] and `reference_latent` [1,16,R,h,w] (of the VAE, not normalised), `render_mask`, `camera_embedding`,
    `ref_index`, `camera_qt`, `camera_qt_ref` as the diffusion model takes them.
    """

    def __init__(self, model_config, device=None):
        super(comfy.model_base.WAN21, self).__init__(model_config, comfy.model_base.ModelType.FLOW, device=device,
                                                     unet_model=WorldStereoModel)
        self.image_to_video = True
        self.keep_constants = True  # see constants.py
        self._moved = WeakTensorKeyDictionary()
        self.memory_usage_factor_conds = ("reference_latent",)

    # Core's own signature; beside core's it tells the diffusion model which weights it runs with.
    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        if self.keep_constants and self.current_patcher is not None and not _changes_the_model(self.current_patcher):
            sigmas = transformer_options.get("sample_sigmas", t)
            coming = self.model_sampling.timestep(sigmas[sigmas > 0]).float().tolist()
            transformer_options = transformer_options | {WEIGHTS: self.current_weight_patches_uuid, COMING_TIMESTEPS: coming}
        return super()._apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def extra_conds(self, **kwargs):
        """Core's I2V conditions and WorldStereo's, for the diffusion model. Raises ValueError where the latent to sample
        is not of the size that the conditioning was made for."""
        out = super().extra_conds(**kwargs)
        noise = kwargs["noise"]
        latents = {name: self.process_latent_in(kwargs[name]) for name in CONDITION_LATENTS if name in kwargs}
        for name, latent in latents.items():
            if latent.shape[-2:] != noise.shape[-2:] or (name == "render_latent" and latent.shape[2] != noise.shape[2]):
                raise ValueError(f"The latent to sample is {tuple(noise.shape[2:])} (frames, height, width), but the "
                                 f"conditioning was made for {tuple(latent.shape[2:])}: use the latent that "
                                 "WorldStereo Conditioning returns")
        if "reference_latent" in latents:
            latent = latents["reference_latent"]
            latents["reference_latent"] = torch.cat([latent, torch.ones_like(latent[:, :4]), latent], dim=1)
        rest = {name: kwargs[name] for name in ("render_mask", "camera_embedding", "ref_index", "camera_qt",
                                                "camera_qt_ref") if name in kwargs}
        return out | {name: OnDevice(self._on_device(value, kwargs["device"])) for name, value in (latents | rest).items()}

    def _on_device(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """value in the inference dtype on the device; what positive and negative share is there once."""
        moved = self._moved[value]() if value in self._moved else None
        if moved is None or moved.device != device:
            moved = convert_tensor(value, self.get_dtype_inference(), device)
            self._moved[value] = weakref.ref(moved)
        return moved

    def extra_conds_shapes(self, **kwargs):
        if "reference_latent" not in kwargs:
            return {}
        return {"reference_latent": list(kwargs["reference_latent"].shape)}

    def memory_required(self, input_shape, cond_shapes={}):
        """Bytes a step needs beside the weights, in its widest moment, which is in self-attention.

        For each sample every token's residual, its control tokens, its render's pixels, and its prompt's keys and
        values; for one sample at a time all keys and values, the normed tokens (whose memory serves for the attended
        ones too; half as much in FP8), a span's queries and result, an upcast weight. What was measured stands in the
        README.
        """
        if not (comfy.model_management.xformers_enabled() or comfy.model_management.pytorch_attention_flash_attention()):
            return super().memory_required(input_shape, cond_shapes)
        config, (batch, _, frames, height, width) = self.diffusion_model.config, input_shape
        size = comfy.model_management.dtype_size(self.get_dtype_inference())
        references = max((shape[2] for shape in cond_shapes.get("reference_latent", [])), default=0)
        per_frame = (height // PATCH[1]) * (width // PATCH[2])
        tokens, targets = (frames + references) * per_frame, frames * per_frame
        rope = 4 * 2 * sum((config.dim // config.num_heads, config.control_dim // config.control_num_heads))
        pixels = MASK_CAM_CHANNELS * frames * config.mask_downsample * SPATIAL_DOWNSCALE**2 * height * width * size
        prompt = 2 * config.num_layers * (TEXT_TOKENS + IMAGE_TOKENS) * config.dim * size
        native = self.diffusion_model.blocks[0].self_attn.q.takes_fp8(comfy.model_management.get_torch_device())
        normed, queries, weight = (0.5, CHUNK, 0) if native else (1, UPCAST_QUERIES, config.dim**2)
        one = tokens * ((2 + normed) * config.dim * size + rope) + (2 * queries * config.dim + weight) * size
        each = tokens * config.dim * size + targets * config.control_dim * size + pixels + prompt
        return WORKSPACE + one + batch * each


def _changes_the_model(patcher) -> bool:
    """Whether it runs another model than its weights' uuid says: hooks, injections (bypass LoRAs), patched modules."""
    patched = any(name.startswith("diffusion_model") for name in patcher.object_patches)
    return patched or bool(patcher.current_hooks or patcher.injections)


def config_of(patcher) -> WorldStereoConfig:
    """The configuration of a loaded MODEL. Raises ValueError for any model but WorldStereo."""
    if not isinstance(patcher.model, WorldStereo):
        raise ValueError(f"model is {type(patcher.model).__name__}, not WorldStereo. Connect Load WorldStereo FP8.")
    return patcher.model.diffusion_model.config


class WorldStereoModelConfig(comfy.supported_models.WAN21_I2V):
    """ComfyUI's model configuration: which class, which noise schedule, how much memory."""

    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, config: WorldStereoConfig):
        super().__init__({"image_model": "wan2.1", "config": config})
        self.sampling_settings["shift"] = config.gen_shift
        self.memory_usage_factor = config.dim / 2222  # as core estimates Wan 2.1

    def get_model(self, state_dict, prefix="", device=None):
        return WorldStereo(self, device=device)
