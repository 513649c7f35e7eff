"""Pictures, [N, H, W, C] in 0..1: resizing, comparing shapes, and laying them out to look at."""

import math
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..core import throw_exception_if_processing_interrupted
from .cameras import thin
from .stop import stoppable

SHAPE_TOLERANCE = 0.05  # relative, of height/width: what rounding sides to whole pixels or patches may change
SMALLEST_STRETCH = 0.01  # relative: a smaller one is not reported
MAX_PICTURE = 1 << 26  # pixels of one picture: photos of 50 megapixels, panoramas of 8192x4096
MOST_PIXELS = 1 << 19  # of a render without a given size
SHEET_WIDTH, SHEET_HEIGHT = 1680, 8192  # pixels; a sheet that would be higher is made narrower


def resize_pictures(pictures: torch.Tensor, height: int, width: int, antialias: bool = True) -> torch.Tensor:
    """Pictures [N,H,W,C] in 0..1, resized bicubically to [N,height,width,3]. WorldStereo resizes the picture with
    Pillow, which antialiases, and renders and references with PyTorch, which does not."""
    resized = torch.empty(len(pictures), height, width, 3, device=pictures.device)
    for picture, part in zip(pictures, resized):  # one by one: a batch of large ones would fill the memory
        throw_exception_if_processing_interrupted()
        # ComfyUI's --fp16-intermediates gives FP16 pictures, which the CPU cannot resize.
        picture = picture[..., :3].float()
        if picture.shape[:2] != (height, width):
            bicubic = partial(F.interpolate, size=(height, width), mode="bicubic", antialias=antialias)
            picture = stoppable(bicubic, picture.movedim(-1, 0)[None])[0].movedim(0, -1)
        torch.clamp(picture, 0, 1, out=part)
    return resized


def as_bytes(colors: torch.Tensor) -> torch.Tensor:
    """Colours in 0..1 (clipped), of any shape, rounded to uint8 in 0..255."""
    return (colors * 255).round_().clamp_(0, 255).byte()


def write_png(path: Path, picture: torch.Tensor) -> None:
    """Writes a picture, uint8 [H, W, 3], as a PNG. Can be interrupted, because a large one takes seconds. Raises
    OSError."""
    with open(path, "wb") as file:
        Image.fromarray(picture.numpy()).save(StoppableFile(file), "PNG")


class StoppableFrames:
    """Frames [N, H, W, C] whose iteration checks for ComfyUI's interrupt before each frame, for loops that do not.
    size: the height and width that each is resized to, or None."""

    def __init__(self, frames: torch.Tensor, size: tuple[int, int] | None = None):
        self.frames, self.size = frames, size or frames.shape[1:3]
        self.shape = torch.Size([len(frames), *self.size, frames.shape[3]])

    def __iter__(self):
        for frame in self.frames:
            throw_exception_if_processing_interrupted()
            yield frame if frame.shape[:2] == self.size else resize_pictures(frame[None], *self.size)[0]


class StoppableFile:
    """A file for Pillow and PyAV to write to, which checks for ComfyUI's interrupt at every write."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content: bytes) -> int:
        throw_exception_if_processing_interrupted()
        return self.file.write(content)


def same_shape(height: int, width: int, other_height: int, other_width: int) -> bool:
    """Whether two pictures have the same aspect ratio, except for rounding."""
    return abs(height / width / (other_height / other_width) - 1) <= SHAPE_TOLERANCE


def stretch(height: int, width: int, own_height: int, own_width: int) -> str:
    """By how much a picture of own_height x own_width is stretched when it is resized to height x width, such as "16%
    wider"; empty if it hardly is."""
    wider = (width / height) / (own_width / own_height) - 1
    if abs(wider) <= SMALLEST_STRETCH:
        return ""
    return f"{wider:.0%} wider" if wider > 0 else f"{1 / (1 + wider) - 1:.0%} taller"


def stretches(height: int, width: int, **sizes: tuple[int, int]) -> list[str]:
    """One line for each size (height, width) that is stretched when resized to height x width, with the names of the
    inputs that have it."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, size in sizes.items():
        names.setdefault(tuple(size), []).append(name)
    return [
        f"{', '.join(named)} {own_width}×{own_height} stretched to {width}×{height}: {by}"
        for (own_height, own_width), named in names.items()
        if (by := stretch(height, width, own_height, own_width))
    ]


def within(height: int, width: int, pixels: int = MOST_PIXELS) -> tuple[int, int]:
    """A picture's height and width, reduced to at most about `pixels` pixels with the same shape."""
    scale = min(1.0, (pixels / (height * width)) ** 0.5)
    return max(1, round(height * scale)), max(1, round(width * scale))


def side_by_side(frames: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    """Each of the frames [N, H, W, 3] to the right of a picture of `beside` [M, h, w, C], M >= N, of which N are taken
    evenly and resized to the frames: [N, H, 2·W, 3]. Raises ValueError for fewer."""
    if len(beside) < len(frames):
        raise ValueError(f"images holds {len(frames)} pictures and render_video {len(beside)}: give at least as many.")
    count, height, width = frames.shape[:3]
    pairs = torch.empty(count, height, 2 * width, 3)
    for number, place in enumerate(thin(len(beside), count).tolist()):
        pairs[number, :, :width] = resize_pictures(beside[place, None], height, width)[0]
        pairs[number, :, width:] = frames[number, ..., :3]
    return pairs


def _tile(frame, size):
    return Image.fromarray(as_bytes(frame[..., :3]).cpu().numpy()).resize(size, Image.Resampling.LANCZOS)


def contact_sheet(frames: torch.Tensor, width: int = SHEET_WIDTH) -> torch.Tensor:
    """All frames [N, H, W, 3], numbered from 0, in reading order on one sheet [1, h, w, 3]. The sheet is about `width`
    pixels wide, and as close to twice as wide as high as possible."""
    count, height, across = frames.shape[:3]
    columns = min(range(1, count + 1), key=lambda n: max(n * across, 2 * math.ceil(count / n) * height))
    tile_width = max(1, width // columns)
    tile_height = max(1, round(tile_width * height / across))
    rows = math.ceil(count / columns)
    if rows * tile_height > SHEET_HEIGHT:
        tile_height = max(1, SHEET_HEIGHT // rows)
        tile_width = max(1, round(tile_height * across / height))
    sheet = Image.new("RGB", (columns * tile_width, rows * tile_height))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(10, tile_width // 14))
    for number, frame in enumerate(StoppableFrames(frames)):
        row, column = divmod(number, columns)
        corner = (column * tile_width, row * tile_height)
        sheet.paste(stoppable(_tile, frame, (tile_width, tile_height)), corner)
        place = (corner[0] + tile_width // 32, corner[1] + tile_width // 64)
        draw.text(place, str(number), fill="white", font=font, stroke_width=2, stroke_fill="black")
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]
