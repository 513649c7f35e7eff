"""Pictures, [N, H, W, C] in 0..1: resizing and comparing their shapes."""

import logging

import torch

from .cameras import Cameras

SHAPE_TOLERANCE = 0.05  # relative, of height/width: what rounding sides to whole pixels or patches may change


def resize_pictures(pictures: torch.Tensor, height: int, width: int, antialias: bool = True) -> torch.Tensor:
    """[N,H,W,C] in 0..1, bicubic to [N,height,width,3]. WorldStereo resizes the picture with Pillow, which filters what
    is made smaller (antialias), and renders and references with PyTorch, which does not."""
    pictures = pictures[..., :3].movedim(-1, 1).float()  # --fp16-intermediates gives what no CPU filters
    resized = torch.nn.functional.interpolate(pictures, (height, width), mode="bicubic", antialias=antialias)
    return resized.clamp(0, 1).movedim(1, -1)


def same_shape(height: int, width: int, other_height: int, other_width: int) -> bool:
    """Whether two pictures have the same height to width, but for rounding."""
    return abs(height / width / (other_height / other_width) - 1) <= SHAPE_TOLERANCE


def warn_of_stretch(cameras: Cameras, image: torch.Tensor):
    """Logs a warning where the cameras are of a picture of another shape than image [N,H,W,C]."""
    height, width = image.shape[1:3]
    if not same_shape(cameras.height, cameras.width, height, width):
        logging.warning(
            "cameras are of a %dx%d picture and image is %dx%d: the shapes differ, so the intrinsics are "
            "stretched to the image. Give the cameras of this very picture, or crop it as they expect.",
            cameras.width,
            cameras.height,
            width,
            height,
        )
