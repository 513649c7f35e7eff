"""The noise schedule of the distilled (DMD) variant."""

import torch

from .config import TIMESTEPS, WorldStereoConfig


def dmd_sigmas(config: WorldStereoConfig) -> torch.Tensor:
    """The sigmas of the distilled sampler, [steps + 1] float32, the last of them 0.

    t = linspace(dmd_start_steps, dmd_end_steps, dmd_steps) reversed, /1000; sigma = s·t / (1 + (s−1)·t), s = gen_shift.
    Raises ValueError for a variant that was not distilled.
    """
    if not config.is_dmd:
        raise ValueError(
            f"The model is {config.model_type}, which was not distilled, so it has no DMD schedule. Sample it with "
            "SamplerCustom: BasicScheduler (simple, 40 steps), KSamplerSelect uni_pc_bh2, cfg 5."
        )
    t = torch.linspace(config.dmd_start_steps, config.dmd_end_steps, config.dmd_steps, dtype=torch.float64)
    t = t.flip(0) / TIMESTEPS
    sigmas = config.gen_shift * t / (1 + (config.gen_shift - 1) * t)
    return torch.cat([sigmas, torch.zeros(1)]).float()
