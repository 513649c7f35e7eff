"""The preview while sampling: all keyframes, side by side.

Core previews only the first latent frame of a video, which here is the picture the user already has. Its preview calls
the latent format's `latent_rgb_factors_reshape`, so `KeyframeLatents` lays out the keyframes there. If core's previews
are off, which is the default, `show_keyframes` sends the same preview itself.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..core import Latent2RGBPreviewer, LatentPreviewMethod, ProgressBar, Wan21, args


def tiled(x0: torch.Tensor) -> torch.Tensor:
    """The frames of [B, C, F, h, w] in reading order on one sheet, [B, C, 1, rows·h, columns·w], as nearly square as
    possible. Empty tiles are 0."""
    batch, channels, frames, height, width = x0.shape
    columns = min(range(1, frames + 1), key=lambda n: max(n * width, math.ceil(frames / n) * height))
    rows = math.ceil(frames / columns)
    sheet = x0.new_zeros(batch, channels, rows * columns, height, width)
    sheet[:, :, :frames] = x0
    sheet = sheet.view(batch, channels, rows, columns, height, width).transpose(3, 4)
    return sheet.reshape(batch, channels, 1, rows * height, columns * width)


class KeyframeLatents(Wan21):
    """Wan 2.1's latents, previewed as a sheet of all frames."""

    latent_rgb_factors_reshape = staticmethod(tiled)

    def __init__(self):
        super().__init__()
        self.taesd_decoder_name = None  # with a decoder, core would preview the first frame alone


def show_keyframes(
    executor: Callable,
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    sampler: Any,
    sigmas: torch.Tensor,
    denoise_mask: torch.Tensor | None = None,
    callback: Callable | None = None,
    *rest,
    **named,
) -> torch.Tensor:
    """A wrapper of core's OUTER_SAMPLE that shows the keyframes at every step, unless core's own preview does. The
    arguments and the result are those of the sampler it wraps."""
    if args.preview_method != LatentPreviewMethod.NoPreviews:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *rest, **named)
    latents = KeyframeLatents
    previewer = Latent2RGBPreviewer(
        latents.latent_rgb_factors, latents.latent_rgb_factors_bias, latents.latent_rgb_factors_reshape
    )
    bar = ProgressBar(len(sigmas) - 1)

    def show(step, x0, x, total_steps):
        if callback is not None:
            callback(step, x0, x, total_steps)
        bar.update_absolute(step + 1, total_steps, previewer.decode_latent_to_preview_image("JPEG", x0))

    return executor(noise, latent_image, sampler, sigmas, denoise_mask, show, *rest, **named)
