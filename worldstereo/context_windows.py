"""ComfyUI's context windows: which part of the conditioning belongs to a window of keyframes.

A window is a clip of its own: its keyframes stand at times 0, 1, 2 …, and its references are those that were chosen for
one of them.
"""

from typing import Any


def window_frames(window: Any, retained: list[int]) -> list[int]:
    """The keyframe at each place of a window (core's IndexListContextWindow): an anchor before it, which core drops
    from the result, and in the retained places the keyframes of those numbers."""
    anchor = getattr(window, "causal_anchor_index", None)
    frames = [*([anchor] if anchor is not None and anchor >= 0 else []), *window.index_list]
    for place in retained:
        frames[place] = place
    return frames


def pixel_frames(frames: list[int], mask_downsample: int) -> list[int]:
    """Which frames of the render mask and the camera embedding the keyframes see: d·(F − 1) + 1 of them, the first
    keyframe its own and each other its own and the d − 1 before it."""
    d = mask_downsample
    first, *others = frames
    return [first * d, *(max(d * (frame - 1) + 1 + i, 0) for frame in others for i in range(d))]


def references(chosen_for: list[int], frames: list[int]) -> tuple[list[int], list[int]]:
    """Which references a window keeps, and their `ref_index` in it.

    chosen_for: the keyframe each was chosen for, which is `ref_index` + 1. Where none was chosen for a keyframe of the
    window, it keeps the one whose keyframe is nearest.
    """

    def distance(i: int) -> int:
        return min(abs(chosen_for[i] - frame) for frame in frames)

    kept = [i for i in range(len(chosen_for)) if chosen_for[i] in frames]
    kept = kept or [min(range(len(chosen_for)), key=distance)]
    nearest = [min(range(len(frames)), key=lambda place: abs(chosen_for[i] - frames[place])) for i in kept]
    return kept, [max(place - 1, 0) for place in nearest]
