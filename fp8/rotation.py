"""The rotation of ConvRot: groups of neighbouring channels multiplied by a regular Hadamard matrix, which spreads an
outlier over its group, so that INT8's uniform steps suit all values.

The matrix is the Kronecker power of [[1,1,1,−1], [1,1,−1,1], [1,−1,1,1], [−1,1,1,1]] over √size, symmetric and its own
inverse. Source: ConvRot (arXiv 2512.03673), in the form that comfy-kitchen's `int8_tensorwise` has.
"""

import torch

GROUP = 256  # channels, as in the community's files and comfy-kitchen's kernels


def group_refusal(group: int, width: int) -> str | None:
    """Why `width` channels cannot be rotated in groups of this size, or None if they can."""
    if group < 4 or group & (group - 1) or group.bit_length() % 2 == 0:
        return f"a group of {group} channels, which is not a power of 4"
    return f"{width} channels, not a multiple of {group}" if width % group else None


def rotate(x: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """x [..., K] with each group of channels rotated, in x's dtype; K is a multiple of `group`. Applied twice it gives
    x.

    The order of additions does not depend on the device, so the CPU and CUDA give the same bits.
    """
    y, step = x.unflatten(-1, (-1, group)), group
    while step > 1:
        step //= 4
        a, b, c, d = y.unflatten(-1, (-1, 4, step)).unbind(-2)
        total, difference, right, left = a + b, a - b, c + d, c - d
        y = torch.stack([total + left, total - left, difference + right, right - difference], dim=-2).flatten(-3)
    return y.mul_(group**-0.5).flatten(-2)
