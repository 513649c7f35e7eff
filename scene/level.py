"""The pitch of a picture's camera, estimated from the surface normals of floors, table tops and ceilings."""

import math

import torch

STEEPEST = 60.0  # degrees; beyond that a floor cannot be distinguished from a wall
UPRIGHT = math.sin(math.radians(15))  # |x| of a level surface's normal, where the camera is not rolled
WINDOW = 4.0  # degrees around the commonest pitch
ENOUGH = 0.03  # the share of the picture that must agree
PIXELS = 1 << 20  # of a larger picture, only every n-th row and column is used


def guess_pitch(normal: torch.Tensor) -> float | None:
    """The pitch in degrees (up is positive) of the camera that took a picture with these normals [H, W, 3], unit
    vectors in OpenCV axes towards the camera, 0 where there are none. None if too little of the picture is level.

    A level surface votes for the pitch that makes its normal vertical; the commonest pitch wins. The camera is assumed
    not to be rolled.
    """
    height, width = normal.shape[:2]
    step = max(1, math.ceil(math.sqrt(height * width / PIXELS)))
    x, y, z = normal[::step, ::step].reshape(-1, 3).float().cpu().unbind(1)
    up = -y.sign()  # a floor's normal looks up, a ceiling's down
    pitch = torch.rad2deg(torch.atan2(up * z, -up * y))
    votes = pitch[(x.abs() < UPRIGHT) & (y != 0) & (pitch.abs() <= STEEPEST)]
    if not len(votes):
        return None
    bins = torch.histc(votes, bins=int(2 * STEEPEST), min=-STEEPEST, max=STEEPEST)
    width = 2 * int(WINDOW) + 1
    smooth = bins[None]
    for _ in range(2):  # twice: a single pass leaves a plateau around an isolated bin
        smooth = torch.nn.functional.avg_pool1d(smooth, width, 1, width // 2)
    mode = smooth.argmax().item() + 0.5 - STEEPEST
    agreeing = votes[(votes - mode).abs() <= WINDOW]
    if len(agreeing) < ENOUGH * len(x):
        return None
    return agreeing.median().item()
