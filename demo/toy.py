"""Toy models: files with the published layout and formats in which every part is small.

Their weights are random but for a few: those make the whole path visible. The toy VAE averages 8x8 pixels into a latent
and back. In the toy model the first layer takes the noisy latent into its tokens, the control branch takes the render's
latent in and subtracts it, and the head puts the difference out, so that sampling leads from noise to the render.
Attention, cross-attention, feed-forward and the camera embeddings are random and small: they disturb it a little.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from comfy.latent_formats import Wan21
from comfy.ldm.wan.vae import WanVAE
from safetensors.torch import save_file

from ..fp8 import recipe
from ..worldstereo.config import CAMERA, SCALE_MAP, WorldStereoConfig
from ..worldstereo.shapes import tensor_shapes

# Widths are multiples of 16, for FP8 matrix units. Those that come from the encoders and the VAE are the real ones.
CONFIG = WorldStereoConfig(
    dim=128,
    ffn_dim=256,
    num_heads=2,
    num_layers=3,
    camera_mlp_dim=64,
    control_dim=64,
    control_ffn_dim=128,
    control_num_heads=2,
    control_num_layers=2,
    mask_channels=16,
)
CAMERA_CONFIG = replace(CONFIG, model_type=CAMERA, camera_mlp_dim=0)
CONFIG_JSON = {  # without the model's type
    "num_attention_heads": CONFIG.num_heads,
    "attention_head_dim": CONFIG.dim // CONFIG.num_heads,
    "freq_dim": CONFIG.freq_dim,
    "eps": CONFIG.eps,
    "controlnet_cfg": {"num_heads": CONFIG.control_num_heads},
    "scale_map": [[height // 48 * 16, width // 48 * 16] for height, width in SCALE_MAP],  # a third of the real sizes
}
PATCH_VALUES = 64  # of a token: 16 channels of 2x2 latent pixels
CARRIER = 64.0  # one token channel holds it; against it the others are small, so that the LayerNorm is nearly linear
GAIN = 1 / 0.625  # Euler's last step, from sigma 0.625 to 0, then leaves nothing of the noise


def weights(config: WorldStereoConfig = CONFIG) -> dict[str, torch.Tensor]:
    """The toy model's tensors, BF16, by their published names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        elif len(shape) == 1:  # norms
            tensors[name] = torch.ones(shape)
        else:
            fan_in = math.prod(shape[1:])
            tensors[name] = torch.randn(shape, generator=generator) * 0.3 / math.sqrt(fan_in)

    token = torch.arange(PATCH_VALUES)
    row, column, channel = token // 32, token // 16 % 2, token % 16  # the order in which core unpatchifies
    for layer, first_channel in (("patch_embedding", 0), ("controlnet.controlnet_patch_embedding", 20)):
        tensors[f"{layer}.weight"][:PATCH_VALUES] = 0
        tensors[f"{layer}.weight"][token, first_channel + channel, 0, row, column] = 1
    tensors["patch_embedding.bias"][-1] = CARRIER
    tensors["controlnet.proj_in.weight"].zero_()[token, token] = 1
    tensors["controlnet.proj_out.0.weight"].zero_()[token, token] = -1
    mean = CARRIER / CONFIG.dim  # what the LayerNorm before the head takes away and divides by
    deviation = math.sqrt(CARRIER**2 / CONFIG.dim - mean**2)
    tensors["proj_out.weight"].zero_()[token, token] = GAIN * deviation
    tensors["proj_out.bias"] += GAIN * mean
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def save_model(path: Path, config: WorldStereoConfig = CONFIG) -> None:
    """Write the toy checkpoint in the published scaled-FP8 format, config.json's text in its metadata."""
    tensors = {recipe.MARKER: torch.zeros((), dtype=torch.bfloat16)}
    for name, tensor in weights(config).items():
        if recipe.is_quantised(name, tensor.shape):
            tensors[name], tensors[recipe.scale_name(name)] = recipe.quantise_weight(tensor, "published")
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"config": json.dumps({"model_type": config.model_type} | CONFIG_JSON)})


@torch.no_grad()
def save_vae(path: Path) -> None:
    """Write a Wan 2.1 VAE, 8 channels wide, that only averages, copies and interpolates.

    Its features are r, g, b, -r, -g, -b and a carrier. All residual branches and the attention are zero. The head's
    RMS norm is nearly linear thanks to the carrier, and silu(x) - silu(-x) = x undoes the activation.
    """
    carrier, latent_gain = 20.0, 1.5
    vae = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    colours, signed, features = torch.arange(3), torch.arange(6), torch.arange(7)
    latents, latent_colour = torch.arange(16), torch.arange(16) % 3
    mean, std = (statistic.flatten() for statistic in (Wan21().latents_mean, Wan21().latents_std))
    for parameter in vae.parameters():
        parameter.zero_()
    for name, module in vae.named_modules():
        if name.endswith(("shortcut", "time_conv")) and hasattr(module, "weight"):
            copies = module.weight.shape[0] // module.weight.shape[1] or 1  # upsampling in time makes two frames of one
            for copy in range(copies if name.endswith("time_conv") else 1):
                module.weight[copy * module.weight.shape[1] + features, features, -1] = 1
        elif name.startswith("encoder.") and name.endswith("resample.1"):  # the mean of 2x2
            module.weight[features, features, :2, :2] = 0.25
        elif name.startswith("decoder.") and name.endswith("resample.1"):  # bilinear, after the nearest neighbour's
            smooth = torch.tensor([1.0, 2.0, 1.0]) / 4
            module.weight[features, features] = smooth[:, None] * smooth
        elif name.endswith("head.0"):
            module.gamma.fill_(carrier / math.sqrt(module.gamma.shape[0]))

    def centre(conv: torch.nn.Conv3d, out: torch.Tensor, into: torch.Tensor, value) -> None:
        size = conv.weight.shape[2:]
        conv.weight[out, into, -1, size[1] // 2, size[2] // 2] = torch.as_tensor(value, dtype=torch.float32)

    encoder, decoder = vae.encoder, vae.decoder
    centre(encoder.conv1, signed, signed % 3, [1, 1, 1, -1, -1, -1])
    encoder.conv1.bias[6] = carrier
    centre(encoder.head[2], latents, latent_colour, latent_gain * std)
    centre(encoder.head[2], latents, latent_colour + 3, -latent_gain * std)
    encoder.head[2].bias[:16] = mean
    centre(vae.conv1, torch.arange(32), torch.arange(32), 1)
    centre(vae.conv2, latents, latents, 1)
    share = 1 / (latent_gain * std * latent_colour.bincount()[latent_colour])
    for sign, feature in ((1, latent_colour), (-1, latent_colour + 3)):
        centre(decoder.conv1, feature, latents, sign * share)
        decoder.conv1.bias.index_add_(0, feature, -sign * share * mean)
    decoder.conv1.bias[6] = carrier
    centre(decoder.head[2], colours, colours, 1)
    centre(decoder.head[2], colours, colours + 3, -1)
    save_file(vae.state_dict(), path)
