"""Pictures [N, H, W, C] in 0..1: cropped, padded or stretched to another shape, and blended with a colour where they
are transparent."""

import torch
import torch.nn.functional as F

from .pictures import resize_pictures, stretch, within

FITS = ("crop", "pad", "stretch")
LEFT_OUT = 0.35  # brightness, in the preview, of what a crop leaves out


def lay_on(pictures: torch.Tensor, transparency: torch.Tensor | None, colour: tuple) -> tuple[torch.Tensor, bool]:
    """Pictures [N, H, W, 3 or 4] over a background colour, [N, H, W, 3], and whether any of them was transparent.

    transparency: [1 or N, h, w], 1 where the picture is transparent, as core's Load Image gives it; a fourth channel is
    the opacity. Raises ValueError for another number of masks.
    """
    if transparency is not None and not transparency.any():
        transparency = None
    if transparency is not None and len(transparency) not in (1, len(pictures)):
        raise ValueError(
            f"transparency holds {len(transparency)} masks for {len(pictures)} pictures: give one, or one each."
        )
    if pictures.shape[-1] < 4 and transparency is None:
        return pictures, False
    laid, transparent = torch.empty_like(pictures[..., :3]), False
    for number, picture in enumerate(pictures):  # one by one: a batch of large ones would fill the memory
        opacity = picture[..., 3:] if picture.shape[-1] == 4 else torch.ones_like(picture[..., :1])
        if transparency is not None:
            mask = transparency[number % len(transparency), None, None].float()
            mask = F.interpolate(mask, picture.shape[:2], mode="bilinear", antialias=True)
            opacity = opacity * (1 - mask.clamp(0, 1))[0].movedim(0, -1).to(opacity)
        laid[number] = picture[..., :3] * opacity + picture.new_tensor(colour) * (1 - opacity)
        transparent |= bool((opacity < 1).any())
    return laid, transparent


def fit_pictures(
    pictures: torch.Tensor,
    height: int,
    width: int,
    fit: str,
    position: float = 0.5,
    colour: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Pictures [N, H, W, 3] resized to [N, height, width, 3], a preview [1, h, w, 3], and a line saying what was done.

    fit: "crop" leaves out what is too wide or too high, "pad" adds borders of `colour`, "stretch" keeps everything and
    changes the shape. position: from 0 (left, top) to 1, where the part that is kept lies in the picture, or the
    picture in the padded one.
    """
    own_height, own_width = pictures.shape[1:3]
    line = f"{own_width}×{own_height} to {width}×{height}: "
    if fit == "stretch":
        fitted = resize_pictures(pictures, height, width)
        return fitted, fitted[:1], line + (stretch(height, width, own_height, own_width) or "not stretched")
    if fit == "pad":
        scale = min(height / own_height, width / own_width)
        inner_height, inner_width = max(1, round(own_height * scale)), max(1, round(own_width * scale))
        rows, columns, amount = _place(inner_height, inner_width, height, width, position)
        fitted = pictures.new_tensor(colour).float().repeat(len(pictures), height, width, 1)
        fitted[:, rows, columns] = resize_pictures(pictures, inner_height, inner_width)
        return fitted, fitted[:1], line + (f"padded with {amount}" if amount else "nothing padded")
    scale = min(own_height / height, own_width / width)
    kept_height, kept_width = max(1, round(height * scale)), max(1, round(width * scale))
    rows, columns, amount = _place(kept_height, kept_width, own_height, own_width, position)
    preview = pictures[:1] * LEFT_OUT
    preview[:, rows, columns] = pictures[:1, rows, columns]
    preview = resize_pictures(preview, *within(own_height, own_width))
    fitted = resize_pictures(pictures[:, rows, columns], height, width)
    return fitted, preview, line + (f"cropped by {amount}" if amount else "nothing cropped")


def _place(height: int, width: int, outer_height: int, outer_width: int, position: float) -> tuple[slice, slice, str]:
    """The rows and columns of a rectangle in a larger one, and how many pixels lie outside it on each side."""
    top, left = (round((outer - inner) * position) for outer, inner in ((outer_height, height), (outer_width, width)))
    outside = {"left": left, "right": outer_width - width - left, "top": top, "bottom": outer_height - height - top}
    amount = ", ".join(f"{pixels} px {side}" for side, pixels in outside.items() if pixels)
    return slice(top, top + height), slice(left, left + width), amount
