"""Keyframes through ComfyUI's Wan VAE: each is coded on its own, as a picture and not as a frame of a video."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ..core import TAEHV, HunyuanVideo, ProgressBar, RMS_norm, WanVAE, synchronize
from ..fp8.activations import rms_silu
from ..fp8.channels_last import ChannelsLast
from ..scene.stop import pieces
from .config import LATENT_CHANNELS

BATCH = 7  # the most pictures that the VAE codes at a time: in between it can be interrupted; 21 keyframes take three
CALL = 4 * BATCH  # pictures per call of ComfyUI's VAE, which prepares its model at every call
NORM_EPS = 1e-24  # added to the mean square, so that zeros stay zeros; ComfyUI divides by a length of at least 1e-12


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


@contextlib.contextmanager
def fused_norms(network: torch.nn.Module) -> Iterator[None]:
    """Within it, each norm of the Wan VAE's network and the SiLU that follows it are one operation. ComfyUI's take eleven
    passes over the memory, 30 % of the VAE's time on an H200. Layers whose `forward` was replaced stay as they are."""
    norms = [
        pair
        for layers in network.modules()
        if isinstance(layers, torch.nn.Sequential)
        for pair in itertools.pairwise(layers)
        if isinstance(pair[0], RMS_norm) and isinstance(pair[1], torch.nn.SiLU)
        if not any("forward" in vars(layer) for layer in pair)
    ]
    try:
        for norm, silu in norms:
            norm.forward = functools.partial(_norm_and_silu, norm)
            silu.forward = _same
        yield
    finally:
        for pair in norms:
            for layer in pair:
                del layer.forward


def _norm_and_silu(norm, x):
    return rms_silu(x.movedim(1, -1), norm.gamma.flatten().to(x), NORM_EPS).movedim(-1, 1)


def _same(x):
    return x


@contextlib.contextmanager
def _faster(network):
    # A tiny VAE reshapes what its convolutions return, which works only with the channels first.
    if isinstance(network, WanVAE):
        with ChannelsLast(), fused_norms(network):
            yield
    else:
        yield


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
        with _faster(self.network):
            for part in pieces(len(batch), BATCH):
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
