"""From picture, render and cameras to the model's conditions, as in WorldStereo's pipeline: sizes, thinning, condition
latent, cameras, references."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..core import ProgressBar, throw_exception_if_processing_interrupted
from ..files.text import shown
from ..scene.cameras import Cameras, check_lengths, normalise, quaternions_and_translations, thin
from ..scene.pictures import resize_pictures, stretches
from .config import LATENT_CHANNELS, SPATIAL_DOWNSCALE, WorldStereoConfig
from .keyframe_vae import check_vae, encode_keyframes

GREY = 0.5  # 0 in the VAE's −1..1
TEMPORAL_DOWNSCALE = 4  # of the Wan VAE on a video
MASK_THRESHOLD = 0.5
NO_MASK = 0.05  # the share of a mask that may be neither black nor white; in compressed video far less is
FIRST_HOLES = 0.01  # the share of frame 0 that may be holes


@dataclass(frozen=True)
class References:
    """Reference views. images: [R,H,W,3] in 0..1. cameras: R of them. indices: WorldStereo's ref_index (0 to F−2), one
    less than the keyframe each view was matched with; keyframe 0 is the picture itself and is not matched."""

    images: torch.Tensor
    cameras: Cameras
    indices: tuple[int, ...]

    @classmethod
    def of(
        cls, images: torch.Tensor | None, cameras: Cameras | None, index: str, chosen: "References | None" = None
    ) -> "References | None":
        """References from the node's inputs: images [R,H,W,C] in 0..1, R cameras, and keyframe numbers from 1 separated
        by commas; or those chosen from a scene; or None without any.

        Raises ValueError if both kinds or only some of the three are given, and for numbers that are not whole.
        """
        given = {
            "reference_images": images is not None,
            "reference_cameras": cameras is not None,
            "reference_index": bool(index.strip()),
        }
        if chosen is not None and any(given.values()):
            twice = ", ".join(name for name, there in given.items() if there)
            raise ValueError(f"references and {twice} are both given: disconnect or empty one of them.")
        if not any(given.values()):
            return chosen
        if not all(given.values()):
            missing = ", ".join(name for name, there in given.items() if not there)
            raise ValueError(f"{missing} missing: references need pictures, cameras and keyframe numbers.")
        try:
            indices = tuple(int(number) - 1 for number in index.split(","))
        except ValueError as e:
            raise ValueError(
                f"reference_index is {shown(repr(index))}: give keyframe numbers separated by commas, such as 1, 5, 12."
            ) from e
        return cls(images, cameras, indices)  # type: ignore[arg-type]  # all are given


def keyframe_size(config: WorldStereoConfig, height: int, width: int) -> tuple[int, int]:
    """The entry (height, width) of the model's size table whose ratio is nearest to the picture's."""
    return min(config.scale_map, key=lambda size: abs(size[0] / size[1] - height / width))


def _frames(config: WorldStereoConfig, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of `count` given frames become keyframes, and which are used for render mask and cameras.

    A mask kernel over d frames needs d·(F−1) + 1 of them for F keyframes. If fewer were given, each keyframe is
    repeated d times.
    """
    keyframes = thin(count, config.nframe)
    seen = config.mask_downsample * (len(keyframes) - 1) + 1
    if count >= seen:
        return keyframes, thin(count, seen)
    return keyframes, keyframes[torch.arange(seen) // config.mask_downsample]


def _check(config: WorldStereoConfig, vae, image, render, mask, cameras, references):
    check_vae(vae)
    for name, value in (("image", image), ("render_video", render), ("render_mask", mask)):
        if value.numel() == 0:
            raise ValueError(f"{name} is empty ({'×'.join(map(str, value.shape))}).")
    if len(image) != 1:
        raise ValueError(
            f"image holds {len(image)} pictures; WorldStereo starts from one. Other views go to reference_images."
        )
    counts = {"render_video": len(render), "render_mask": len(mask), "cameras": len(cameras)}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"The frame counts differ: {listed}. Each frame of the render has one mask and one camera.")
    if references is None:
        return
    if not config.has_memory:
        raise ValueError(
            f"reference_images: {config.model_type} takes no reference views. Disconnect them, or load a "
            "memory variant."
        )
    check_lengths(
        "The reference counts differ: {}. Each reference has one picture, camera and index.",
        reference_images=references.images,
        reference_cameras=references.cameras,
        reference_index=references.indices,
    )
    frames = len(_frames(config, len(render))[0])
    if len(references.indices) > frames - 1:
        raise ValueError(
            f"reference_images holds {len(references.indices)} views for {frames} keyframes; give at "
            "most one for each after the first."
        )
    outside = [i + 1 for i in references.indices if not 0 <= i < frames - 1]
    if outside:
        raise ValueError(
            f"reference_index {outside[0]} is not a keyframe that a reference can be matched with: those are 1 to "
            f"{frames - 1}; keyframe 0 is the picture itself."
        )


def remarks(
    config: WorldStereoConfig,
    image: torch.Tensor,
    render: torch.Tensor,
    mask: torch.Tensor,
    cameras: Cameras,
    references: References | None = None,
) -> list[str]:
    """Remarks on inputs that may be mistakes: shapes that `condition` stretches, a mask that is not a hole mask. The
    arguments are those of `condition`."""
    height, width = keyframe_size(config, *image.shape[1:3])
    sizes = {"image": image.shape[1:3], "render_video": render.shape[1:3], "render_mask": mask.shape[1:3]}
    sizes["cameras' picture"] = cameras.height, cameras.width
    if references is not None:
        sizes["reference_images"] = references.images.shape[1:3]
    lines = stretches(height, width, **sizes)
    grey = 0.0
    for frame in mask:
        throw_exception_if_processing_interrupted()
        grey += ((frame > 0.1) & (frame < 0.9)).float().mean().item() / len(mask)
    if grey > NO_MASK:
        lines.append(
            f"render_mask is not a hole mask: {grey:.0%} of it is neither black nor white. It must be white where the "
            "render has no point, black elsewhere"
        )
    first = (mask[0] >= MASK_THRESHOLD).float().mean().item()
    if first > FIRST_HOLES:
        lines.append(
            f"render_mask has holes in {first:.0%} of frame 0, which is the picture itself and has none: does it "
            "belong to another path, or is it white where there are points?"
        )
    return lines


def condition(
    config: WorldStereoConfig,
    vae: Any,
    image: torch.Tensor,
    render: torch.Tensor,
    mask: torch.Tensor,
    cameras: Cameras,
    references: References | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The conditions, and the empty latent to sample.

    image: [1,H,W,3] in 0..1. render: [N,Hr,Wr,3] in 0..1. mask: [N,Hm,Wm], 1 where nothing was rendered. cameras: N.
    More frames than the model takes are thinned. Frame 0 is the picture, whatever render and mask hold there. Without
    references, a memory variant gets the picture as its only one, with ref_index 0.

    Returns the conditions by the names that `WorldStereo.extra_conds` reads, and zeros [1,16,F,h,w].
    Raises ValueError, naming the input, before anything is encoded.
    """
    _check(config, vae, image, render, mask, cameras, references)
    keyframes, dense = _frames(config, len(render))
    height, width = keyframe_size(config, *image.shape[1:3])
    image = resize_pictures(image, height, width)
    pictures = [image]
    # Frame by frame: 21 frames in 4K are 2 GB, and a copy of those that are kept would be as large.
    for frame in keyframes[1:].tolist():
        pictures.append(resize_pictures(render[frame, None], height, width, antialias=False))
    resized = (F.interpolate(mask[frame, None, None].float(), (height, width)) for frame in dense.tolist())
    mask = torch.cat([(frame >= MASK_THRESHOLD).float() for frame in resized])
    mask[dense == 0] = 0
    cameras = cameras.scaled_to(width, height)
    seen, repeated = dense.unique(return_inverse=True)
    values = {
        "render_mask": mask.movedim(1, 0)[None],
        "camera_w2c": normalise(cameras.w2c[seen])[repeated][None],
        "camera_K": cameras.K[dense][None],
    }
    frames = len(keyframes)
    if config.has_memory:
        targets = cameras[keyframes].w2c
        indices: tuple[int, ...] = (0,)
        reference_w2c = targets[:1]
        if references is not None:
            pictures.append(resize_pictures(references.images, height, width, antialias=False))
            reference_w2c, indices = references.cameras.w2c, references.indices
        poses = normalise(torch.cat([targets, reference_w2c]), targets=frames)
        camera_qt = quaternions_and_translations(poses)[None]
        values |= {
            "camera_qt": camera_qt[:, :frames],
            "camera_qt_ref": camera_qt[:, frames:],
            "ref_index": torch.tensor([indices]),
        }

    grey = torch.full_like(image, GREY)
    after_first = TEMPORAL_DOWNSCALE * (frames - 1) if config.latent_cond_mode == "full_vae" else 0
    if not after_first:
        pictures.append(grey)
    progress = ProgressBar(sum(map(len, pictures)) + after_first)
    # Moved first, because core prepares pictures for the VAE on the device where they are.
    latents = encode_keyframes(vae, torch.cat([picture.to(vae.device) for picture in pictures]), progress)
    values["render_latent"] = latents[:, :, :frames]
    if config.has_memory:
        of_references = slice(0, 1) if references is None else slice(frames, frames + len(indices))
        values["reference_latent"] = latents[:, :, of_references]
    if after_first:
        values["concat_latent_image"] = vae.encode(torch.cat([image, grey.expand(after_first, -1, -1, -1)]))
        progress.update(after_first)
    else:
        after = latents[:, :, -1:].expand(-1, -1, frames - 1, -1, -1)
        values["concat_latent_image"] = torch.cat([latents[:, :, :1], after], dim=2)

    shape = (1, 1, frames, height // SPATIAL_DOWNSCALE, width // SPATIAL_DOWNSCALE)
    values["concat_mask"] = torch.ones(shape)  # core's masks are 0 where the latent is known
    values["concat_mask"][:, :, 0] = 0
    return values, torch.zeros(1, LATENT_CHANNELS, *shape[2:])
