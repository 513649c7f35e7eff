"""The names and shapes of every tensor of a WorldStereo checkpoint, at any size."""

import math

from .. import remap
from .config import CAMERA_QT, IN_CHANNELS, LATENT_CHANNELS, MASK_CAM_CHANNELS, PATCH, WorldStereoConfig


def _linear(name: str, out_features: int, in_features: int) -> dict:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _norm(name: str, dim: int) -> dict:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _conv(name: str, out_channels: int, in_channels: int, kernel: tuple) -> dict:
    return {f"{name}.weight": (out_channels, in_channels, *kernel), f"{name}.bias": (out_channels,)}


def _attention(name: str, dim: int, image: bool = False) -> dict:
    shapes: dict[str, tuple[int, ...]] = {}
    for projection in ("q", "k", "v", "o") + (("k_img", "v_img") if image else ()):
        shapes |= _linear(f"{name}.{projection}", dim, dim)
    for norm in ("norm_q", "norm_k") + (("norm_k_img",) if image else ()):
        shapes[f"{name}.{norm}.weight"] = (dim,)
    return shapes


def _feed_forward(name: str, dim: int, ffn_dim: int) -> dict:
    return _linear(f"{name}.0", ffn_dim, dim) | _linear(f"{name}.2", dim, ffn_dim)


def backbone_shapes(c: WorldStereoConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the Wan2.1-I2V backbone alone, by native name."""
    shapes = {"head.modulation": (1, 2, c.dim)}
    shapes |= _conv("patch_embedding", c.dim, IN_CHANNELS, PATCH)
    shapes |= _linear("time_embedding.0", c.dim, c.freq_dim) | _linear("time_embedding.2", c.dim, c.dim)
    shapes |= _linear("time_projection.1", 6 * c.dim, c.dim)
    shapes |= _linear("text_embedding.0", c.dim, c.text_dim) | _linear("text_embedding.2", c.dim, c.dim)
    shapes |= _norm("img_emb.proj.0", c.image_dim) | _linear("img_emb.proj.1", c.image_dim, c.image_dim)
    shapes |= _linear("img_emb.proj.3", c.dim, c.image_dim) | _norm("img_emb.proj.4", c.dim)
    for i in range(c.num_layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, c.dim)
        shapes |= _attention(f"{block}.self_attn", c.dim) | _attention(f"{block}.cross_attn", c.dim, image=True)
        shapes |= _norm(f"{block}.norm3", c.dim) | _feed_forward(f"{block}.ffn", c.dim, c.ffn_dim)
    return shapes | _linear("head.head", math.prod(PATCH) * LATENT_CHANNELS, c.dim)


def native_shapes(c: WorldStereoConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a whole checkpoint by native name: backbone, camera MLP, control branch."""
    shapes = backbone_shapes(c)
    if c.has_memory:
        shapes |= _linear("camera_embedding.0", c.camera_mlp_dim, CAMERA_QT)
        shapes |= _linear("camera_embedding.2", c.dim, c.camera_mlp_dim) | _linear("camera_embedding.4", c.dim, c.dim)
    control = "controlnet"
    shapes |= _conv(f"{control}.controlnet_patch_embedding", c.dim, IN_CHANNELS, PATCH)
    mask = f"{control}.controlnet_mask_embedding"
    shapes |= _conv(f"{mask}.mask_proj.0", c.mask_channels, MASK_CAM_CHANNELS, c.mask_kernel)
    shapes |= _norm(f"{mask}.mask_proj.1", c.mask_channels)
    shapes |= _conv(f"{mask}.mask_zero_proj", c.dim, c.mask_channels, PATCH)
    shapes |= _linear(f"{control}.proj_in", c.control_dim, c.dim)
    for i in range(c.control_num_layers):
        block = f"{control}.controlnet_blocks.{i}"
        for norm in ("norm1", "norm2"):
            shapes |= _linear(f"{block}.{norm}.linear", 3 * c.control_dim, c.dim)
            shapes |= _norm(f"{block}.{norm}.norm", c.control_dim)
        shapes |= _attention(f"{block}.self_attn", c.control_dim)
        shapes |= _feed_forward(f"{block}.ffn", c.control_dim, c.control_ffn_dim)
        shapes |= _linear(f"{control}.proj_out.{i}", c.dim, c.control_dim)
    return shapes


def tensor_shapes(c: WorldStereoConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a whole checkpoint by the published (diffusers) names."""
    return {remap.to_diffusers(name): shape for name, shape in native_shapes(c).items()}
