"""ComfyUI's context windows: which part of the conditioning belongs to a window of keyframes.

A window is sampled as a clip of its own: its keyframes get the times 0, 1, 2 …, and its references are those that were
chosen for one of them.
"""

from typing import Any


def window_frames(window: Any, retained: list[int]) -> list[int]:
    """The keyframes of a window (core's IndexListContextWindow) in order: before them its anchor, which core drops from
    the result, and at the retained places the keyframes with those numbers."""
    anchor = getattr(window, "causal_anchor_index", None)
    frames = [*([anchor] if anchor is not None and anchor >= 0 else []), *window.index_list]
    for place in retained:
        frames[place] = place
    return frames


def pixel_frames(frames: list[int], mask_downsample: int) -> list[int]:
    """The frames of the render mask and the camera embedding that belong to F keyframes, d·(F − 1) + 1 of them for a
    `mask_downsample` of d: the first keyframe's own, and for each other keyframe its own and the d − 1 before it."""
    d = mask_downsample
    first, *others = frames
    return [first * d, *(max(d * (frame - 1) + 1 + i, 0) for frame in others for i in range(d))]


def references(chosen_for: list[int], frames: list[int]) -> tuple[list[int], list[int]]:
    """Which references a window keeps, and their `ref_index` in it.

    chosen_for: the keyframe that each reference was chosen for, its `ref_index` + 1. If none was chosen for a keyframe
    of the window, it keeps the one whose keyframe is nearest.
    """

    def distance(i: int) -> int:
        return min(abs(chosen_for[i] - frame) for frame in frames)

    kept = [i for i in range(len(chosen_for)) if chosen_for[i] in frames]
    kept = kept or [min(range(len(chosen_for)), key=distance)]
    nearest = [min(range(len(frames)), key=lambda place: abs(chosen_for[i] - frames[place])) for i in kept]
    return kept, [max(place - 1, 0) for place in nearest]
