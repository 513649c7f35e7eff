"""Keyframes through ComfyUI's Wan VAE: each is coded on its own, as a picture and not as a frame of a video."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..core import TAEHV, HunyuanVideo, ProgressBar, WanVAE, synchronize
from ..scene.stop import pieces
from .config import LATENT_CHANNELS

BATCH = 7  # the most pictures that the VAE codes at a time: in between it can be interrupted; 21 keyframes take three
CALL = 4 * BATCH  # pictures per call of ComfyUI's VAE, which prepares its model at every call


def check_vae(vae: Any) -> None:
    """Raises ValueError for any VAE but Wan 2.1's and its tiny versions; others may accept the same shapes."""
    if getattr(vae.first_stage_model, "latent_format", None) is HunyuanVideo:
        raise ValueError(
            "vae is a tiny VAE in FP16, which ComfyUI takes for HunyuanVideo's. WorldStereo needs the Wan 2.1 "
            "VAE: choose wan_2.1_vae.safetensors in Load VAE, or lighttaew2_1."
        )
    if vae.latent_channels != LATENT_CHANNELS or not isinstance(vae.first_stage_model, WanVAE | TAEHV):
        raise ValueError(
            f"vae is {type(vae.first_stage_model).__name__} with {vae.latent_channels} latent channels; "
            "WorldStereo needs the Wan 2.1 VAE. Choose wan_2.1_vae.safetensors in Load VAE."
        )


class OneFrame(TorchFunctionMode):
    """Computes 3-D convolutions of one frame in 2-D, with the channels last in memory: on NVIDIA GPUs these kernels take
    less time and less memory, on CPUs less time."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is torch.conv3d:
            x, weight, bias, stride, padding, dilation, groups = arguments  # as `torch.nn.Conv3d` calls it
        elif function is torch.cudnn_convolution:  # core's way around a bug of cuDNN's; core adds the bias afterwards
            (x, weight, padding, stride, dilation, groups), bias = arguments, None
        else:
            return function(*arguments, **(named or {}))
        if not (x.ndim == 5 and x.shape[2] == weight.shape[2] == 1 and padding[0] == 0):
            return function(*arguments, **(named or {}))
        x = x.squeeze(2).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight.squeeze(2), bias, stride[1:], padding[1:], dilation[1:], groups).unsqueeze(2)


class _Interruptible:
    """A VAE's network that codes BATCH pictures at a time. ComfyUI would give it all that fit into the memory at once,
    and cannot interrupt that."""

    def __init__(self, network: Any, progress: ProgressBar):
        self.network, self.progress = network, progress

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        return self._coded(self.network.encode, pictures)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._coded(self.network.decode, latents)

    def _coded(self, code, batch):
        coded = []
        for part in pieces(len(batch), BATCH):
            with OneFrame():
                coded.append(code(batch[part]))
            synchronize()  # otherwise the GPU has all pieces before the stop button is looked at again
            self.progress.update(len(coded[-1]))
        return torch.cat(coded)


def _of_pictures(vae, progress):
    """A copy of the VAE that codes single pictures instead of a video's frames. Its results stay on its device."""
    of_pictures = copy.copy(vae)
    of_pictures.first_stage_model = _Interruptible(vae.first_stage_model, progress)
    of_pictures.not_video, of_pictures.output_device = True, vae.device
    return of_pictures


def encode_keyframes(vae: Any, pictures: torch.Tensor, progress: ProgressBar | None = None) -> torch.Tensor:
    """Pictures [N,H,W,3] in 0..1, each encoded on its own by the Wan VAE, as a latent [1,16,N,h,w]. Raises ValueError
    for another VAE."""
    check_vae(vae)
    of_pictures = _of_pictures(vae, progress or ProgressBar(len(pictures)))
    latents = [of_pictures.encode(pictures[part]) for part in pieces(len(pictures), CALL)]
    return torch.cat(latents).transpose(0, 2).to(vae.output_device)


def decode_keyframes(vae: Any, latent: torch.Tensor) -> torch.Tensor:
    """A latent [B,16,F,h,w], each frame decoded on its own by the Wan VAE, as pictures [B·F,H,W,3] in 0..1.

    Raises ValueError for a latent that is not a Wan video's, and for another VAE.
    """
    check_vae(vae)
    if latent.ndim != 5 or latent.shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"samples: The latent is {tuple(latent.shape)}; keyframes are (batch, {LATENT_CHANNELS}, frames, "
            "height, width), as the sampler returns them for the latent of WorldStereo Conditioning."
        )
    frames = latent.movedim(2, 1).flatten(0, 1).unsqueeze(2)
    of_pictures, pictures = _of_pictures(vae, ProgressBar(len(frames))), None
    for part in pieces(len(frames), CALL):
        decoded = of_pictures.decode(frames[part]).flatten(0, 1)
        if pictures is None:
            # Zeros for the reason that `scene.render.render` gives.
            size = len(frames), *decoded.shape[1:]
            pictures = torch.zeros(size, dtype=decoded.dtype, device=vae.output_device)
        pictures[part] = decoded
    return pictures
