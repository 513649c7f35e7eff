"""The depth of a clip's keyframes, from the MoGe model that ComfyUI loads."""

from collections.abc import Callable
from typing import Any

import torch

from ..core import free_memory, get_free_memory, should_use_fp16, throw_exception_if_processing_interrupted
from ..fp8.channels_last import ChannelsLast
from .cameras import Cameras
from .memory import frames_to_remember

MOGE_LEVEL, MOGE_BATCH = 9, 8  # resolution level, and the most pictures at a time
# At most: 1.04 GiB a picture of 832x480 with the 3600 tokens of the highest level, measured on an H200 in half precision
# with the channels first in memory. With them last it is less.
TOKEN_BYTES = 310_000


def keyframe_geometry(
    model: Any,
    images: torch.Tensor,
    cameras: Cameras,
    count: int,
    level: int,
    batch: int,
    progress: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    """Depth of the `count` frames of a clip [N, H, W, C] in 0..1 that a scene remembers (`memory.frames_to_remember`).

    model: core's MoGeModel. cameras: of the clip's frames; if there are more, they are thinned as the conditioning
    thins them. MoGe is told the lens of each. level: MoGe's resolution level, 0 to 9; batch: the most pictures that it
    sees at a time. They are fewer where VRAM is short: other models are offloaded for MoGe and four pictures, not for
    more. progress(frames) is called after each batch.

    Returns core's MOGE_GEOMETRY of those M frames: depth [M, H, W] in metres, infinite where there is none, mask
    [M, H, W], and intrinsics [M, 3, 3] for pictures of width and height 1. It has neither points nor normals.

    Computed in half precision where the device is faster with it, which is the default of MoGe's own `infer` (use_fp16
    in moge/model/v2.py, github.com/microsoft/MoGe), and with the channels last in memory (`fp8.channels_last`). Core's
    node computes in float32. Raises ValueError for fewer cameras than frames, and as `frames_to_remember` does.
    """
    fov = cameras.of_frames(len(images)).fov
    frames = frames_to_remember(len(images), count)
    device = model.load_device
    half = should_use_fp16(device) and torch.amp.autocast_mode.is_autocast_available(device.type)
    fewest, most = model.num_tokens_range
    picture = (fewest + level * (most - fewest) // 9) * TOKEN_BYTES
    free_memory(5 * picture, device)  # four pictures, and one's room for MoGe's weights (0.65 GB)
    batch = min(batch, max(1, int(get_free_memory(device) // picture) - 1))
    found: dict[str, list[torch.Tensor]] = {"depth": [], "mask": [], "intrinsics": []}
    for start in range(0, len(frames), batch):
        throw_exception_if_processing_interrupted()
        some = frames[start : start + batch]
        pictures = images[some, ..., :3].movedim(-1, 1)
        # Points are not asked for: in half precision they would be less exact than the depth.
        with torch.autocast(device.type, torch.float16, enabled=half), ChannelsLast():
            answer = model.infer(pictures, resolution_level=level, fov_x=fov[some], force_projection=False)
        for name, parts in found.items():
            parts.append(answer[name].cpu())
        progress(len(some))
    return {name: torch.cat(parts) for name, parts in found.items()}
