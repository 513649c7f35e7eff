"""MoGe 2 (ViT-L, with normals) with random weights, at full size or as a toy."""

import torch
from comfy.ldm.moge.model import MoGeModel, MoGeModelV2

LAYERS, WIDTH = 24, 1024
TOY_LAYERS, TOY_WIDTH, TOY_TOKENS = 4, 64, (100, 100)
HEAD_WIDTH = 64


def random_moge(toy: bool = False) -> MoGeModel:
    """Core's MoGe with random weights that keep activations near unit size. At full size the shapes are those of
    configs/train/v2.json in MoGe's repository."""
    layers, width = (TOY_LAYERS, TOY_WIDTH) if toy else (LAYERS, WIDTH)
    widths = [width, width // 4, width // 8, width // 16, width // 32]
    stack = {
        "dim_res_blocks": widths,
        "resamplers": ["conv_transpose"] * 3 + ["bilinear"],
        "res_block_in_norm": "none",
        "res_block_hidden_norm": "none",
    }
    heads = {
        name: stack | {"dim_in": widths, "dim_out": [None] * 4 + [channels], "num_res_blocks": [0, 1, 1, 1, 0]}
        for name, channels in (("points_head", 3), ("normal_head", 3), ("mask_head", 1))
    }
    backbone = {
        "hidden_size": width,
        "num_attention_heads": width // HEAD_WIDTH,
        "num_hidden_layers": layers,
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
    }
    quarters = [layers * quarter // 4 - 1 for quarter in range(1, 5)]
    model = MoGeModelV2(
        encoder={"backbone": backbone, "intermediate_layers": quarters, "dim_out": width},
        neck=stack | {"dim_in": [width + 2, 2, 2, 2, 2], "dim_out": [None] * 5, "num_res_blocks": [0, 2, 2, 2, 0]},
        scale_head={"dims": [width, width, width, 1]},
        **heads,
        operations=torch.nn,  # with dynamic VRAM, core's own layers have no weights until a file is loaded
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        deviation = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
        parameter.data.normal_(0, deviation, generator=generator)
    moge = MoGeModel(model.state_dict())
    if toy:
        moge.num_tokens_range = TOY_TOKENS
    if moge.load_device.type == "cpu":  # where PyTorch cannot resize pictures in half precision
        moge.dtype = torch.float32
        moge.model.float()
    return moge


def run_moge(model: MoGeModel, picture: torch.Tensor) -> None:
    """Runs MoGe on one picture [1, H, W, 3] in 0..1 as core's node does for the start picture."""
    for values in model.infer(picture.movedim(-1, 1)).values():
        values.cpu()
