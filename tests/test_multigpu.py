"""Core's MultiGPU CFG Split gives the same bits as one GPU."""

import comfy.multigpu
import comfy.sample
import pytest
import torch
from toy import cooked, golden_inputs, golden_weights, save
from worldstereo_fp8.loaders import load_worldstereo


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two CUDA GPUs, here are {torch.cuda.device_count()}")
def test_two_gpus_give_the_bits_of_one(tmp_path):
    path = save(cooked("camera"), tmp_path / "model.safetensors", golden_weights("camera")[1])
    inputs, _ = golden_inputs("camera")
    frames, height, width = inputs["hidden_states"].shape[2:]
    torch.manual_seed(0)

    def conditioning(seed: int):
        generator = torch.Generator().manual_seed(seed)
        values = {name: inputs[name] for name in ("render_latent", "render_mask", "camera_embedding")}
        return [[torch.randn(inputs["encoder_hidden_states"].shape, generator=generator), values]]

    def sample(patcher) -> torch.Tensor:
        latent = torch.zeros(1, 16, frames, height, width)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
        return comfy.sample.sample(
            patcher,
            noise,
            2,
            5.0,
            "euler",
            "simple",
            conditioning(0),
            conditioning(1),
            latent,
            seed=0,
            disable_pbar=True,
        )

    patcher = load_worldstereo(path, disable_dynamic=True)
    with torch.inference_mode():
        one = sample(patcher)
        both = comfy.multigpu.create_multigpu_deepclones(patcher, 2, reuse_loaded=True)
        assert both.get_additional_models_with_key("multigpu")
        assert torch.equal(sample(both), one)
