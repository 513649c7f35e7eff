"""The control branch, which follows the render beside the backbone. Letters as in `blocks`."""

import torch
from torch import nn

from .blocks import CHUNK, SelfAttention, add_feed_forward, norm_weights, rope_embedder, spans, to_tokens
from .config import IN_CHANNELS, MASK_CAM_CHANNELS, PATCH, WorldStereoConfig

NORM_EPS = 1e-5  # LayerNorms of the control branch
CONTROL_QK_EPS = 1e-6  # and the RMSNorms of its queries and keys


class AdaptiveNorm(nn.Module):
    """LayerNorm whose shift, scale and gate come from the time embedding."""

    def __init__(self, dim, time_dim, operation_settings):
        super().__init__()
        ops, factory = operation_settings["operations"], {k: operation_settings[k] for k in ("device", "dtype")}
        self.linear = ops.Linear(time_dim, 3 * dim, **factory)
        self.norm = ops.LayerNorm(dim, eps=NORM_EPS, **factory)

    def forward(self, temb):
        """temb: [S,1,C], after SiLU. Returns shift, scale (FP32) and gate, [S,1,D] each, with the norm's weight and
        bias
        folded in: (LN·w + b)·(1 + scale) + shift = LN·(1 + [w·(1 + scale) − 1]) + [b·(1 + scale) + shift]."""
        weight, bias = norm_weights(self.norm, temb)
        shift, scale, gate = self.linear(temb).chunk(3, dim=-1)
        scale = 1 + scale.float()
        return bias.float() * scale + shift.float(), weight.float() * scale - 1, gate  # type: ignore[union-attr]


class ControlBlock(nn.Module):
    """A block of the control branch: self-attention and feed-forward, their norms modulated by the time embedding."""

    def __init__(self, config: WorldStereoConfig, operation_settings):
        super().__init__()
        ops, factory = operation_settings["operations"], {k: operation_settings[k] for k in ("device", "dtype")}
        dim = config.control_dim
        self.norm1 = AdaptiveNorm(dim, config.dim, operation_settings)
        self.self_attn = SelfAttention(
            dim, config.control_num_heads, eps=CONTROL_QK_EPS, operation_settings=operation_settings
        )
        self.norm2 = AdaptiveNorm(dim, config.dim, operation_settings)
        self.ffn = nn.Sequential(
            ops.Linear(dim, config.control_ffn_dim, **factory),
            nn.GELU(approximate="tanh"),
            ops.Linear(config.control_ffn_dim, dim, **factory),
        )

    def modulation(self, temb) -> tuple[torch.Tensor, ...]:
        """Shift, scale and gate of the attention, then of the FFN: [S,1,D] each."""
        return *self.norm1(temb), *self.norm2(temb)

    def forward(self, x, modulation, freqs, transformer_options):
        """x: [1, F·n, D]; overwritten with the result."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        h = self.self_attn.normed(x, shift, scale, NORM_EPS)
        self.self_attn.add_to(x, h, gate, freqs, transformer_options)
        add_feed_forward(self.ffn, x, ffn_shift, ffn_scale, ffn_gate, NORM_EPS)
        return x


class MaskCamEmbedding(nn.Module):
    """Tokens of the render mask and the camera embedding."""

    def __init__(self, config: WorldStereoConfig, operation_settings):
        super().__init__()
        ops, factory = operation_settings["operations"], {k: operation_settings[k] for k in ("device", "dtype")}
        # Weights in FP32, as in core's patch embedding: an FP8 value times its scale needs more than BF16's 8 bits,
        # which matters if the model computes in FP32.
        factory["dtype"] = torch.float32
        kernel = config.mask_kernel
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
    """The branch that follows the render. Its i-th residual is computed after the i-th backbone block, so that only one
    exists at a time."""

    def __init__(self, config: WorldStereoConfig, operation_settings):
        super().__init__()
        ops, factory = operation_settings["operations"], {k: operation_settings[k] for k in ("device", "dtype")}
        self.controlnet_patch_embedding = ops.Conv3d(
            IN_CHANNELS, config.dim, kernel_size=PATCH, stride=PATCH, **factory
        )
        self.controlnet_mask_embedding = MaskCamEmbedding(config, operation_settings)
        self.proj_in = ops.Linear(config.dim, config.control_dim, **factory)
        self.controlnet_blocks = nn.ModuleList(
            ControlBlock(config, operation_settings) for _ in range(config.control_num_layers)
        )
        self.proj_out = nn.ModuleList(
            ops.Linear(config.control_dim, config.dim, **factory) for _ in range(config.control_num_layers)
        )
        self.rope_embedder = rope_embedder(config.control_dim // config.control_num_heads)

    def embed(self, x, render_latent, render_mask, camera_embedding):
        """x [B,20,F,h,w]: noisy latent and mask. Returns the branch's first tokens, [B, F·n, D]."""
        x = self.controlnet_patch_embedding(torch.cat([x, render_latent], dim=1))
        return self.proj_in(to_tokens(x + self.controlnet_mask_embedding(render_mask, camera_embedding)))


def add_control(
    block: ControlBlock,
    proj_out: nn.Linear,
    x: torch.Tensor,
    modulations: list[tuple],
    freqs: torch.Tensor,
    transformer_options: dict,
    target: torch.Tensor,
) -> None:
    """Runs a block of the control branch on its tokens x [B, F·n, D], in place, and adds its residual to the backbone's
    target tokens [B, F·n, C], in place. modulations: one per sample."""
    for b, modulation in enumerate(modulations):
        block(x[b : b + 1], modulation, freqs, transformer_options)
    with proj_out.fetched(x.device, x.dtype) as product:
        for span in spans(x.shape[1], CHUNK):
            target[:, span] += product(x[:, span])
