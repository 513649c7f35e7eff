"""What a WorldStereo checkpoint is: sizes from its tensors' shapes, the rest from its config.json or the defaults."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

CONFIG_FILE = "config.json"
CAMERA, MEMORY, MEMORY_DMD = MODEL_TYPES = ("worldstereo-camera", "worldstereo-memory", "worldstereo-memory-dmd")

REPOSITORY = "https://huggingface.co/hanshanxue/WorldStereo"  # of the published checkpoints and their config.json

# What is assumed where there is no config.json. Height, width; those below 640x576 by symmetry with the ones above.
SCALE_MAP = (
    (480, 832), (480, 768), (512, 784), (512, 720), (576, 704), (576, 640), (640, 640), (640, 576), (704, 576),
    (720, 512), (784, 512), (768, 480), (832, 480),
)  # fmt: skip
LATENT_COND_MODES = ("first_frame_only", "full_vae")  # the first is assumed
LATENT_CHANNELS = 16
IN_CHANNELS = 2 * LATENT_CHANNELS + 4  # noisy latent, mask, condition latent
MASK_CAM_CHANNELS = 7  # render mask and the 6 of the camera embedding
CAMERA_QT = 7  # quaternion and translation
PATCH = (1, 2, 2)
WAN_480P_SHIFT = 3.0  # flow shift Wan 2.1 recommends at 480p; for the variants that were not distilled
SPATIAL_DOWNSCALE = 8  # of the Wan VAE


@dataclass(frozen=True)
class WorldStereoConfig:
    """Sizes and settings of one checkpoint. The defaults are the published worldstereo-memory-dmd's."""

    model_type: str = MEMORY_DMD
    # backbone
    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    freq_dim: int = 256
    text_dim: int = 4096
    image_dim: int = 1280
    eps: float = 1e-6
    camera_mlp_dim: int = 2560  # 0: no camera MLP and no references (worldstereo-camera)
    # control branch
    control_dim: int = 1024
    control_ffn_dim: int = 4096
    control_num_heads: int = 16
    control_num_layers: int = 20
    mask_channels: int = 256
    mask_downsample: int = 1  # time size of the mask kernel
    update_ref: bool = True
    # conditioning
    nframe: int = 21
    scale_map: tuple = SCALE_MAP
    latent_cond_mode: str = LATENT_COND_MODES[0]
    negative_prompt: str = ""
    # sampling
    gen_shift: float = 5.0  # flow shift that the distilled variant was made with
    dmd_steps: int = 4
    dmd_start_steps: int = 250
    dmd_end_steps: int = 1000

    @property
    def has_memory(self) -> bool:
        """Whether the model takes reference views and cameras as quaternions (the memory variants)."""
        return self.camera_mlp_dim > 0

    @property
    def is_dmd(self) -> bool:
        """Whether the model was distilled to a few steps without CFG."""
        return self.model_type == MEMORY_DMD

    @property
    def shift(self) -> float:
        """The flow shift of the noise schedule: `gen_shift` is the distilled variant's alone."""
        return self.gen_shift if self.is_dmd else WAN_480P_SHIFT


class ConfigMismatch(ValueError):
    """A configuration that a checkpoint cannot have."""


def parse_config(text: str, where: str) -> dict:
    """The content of a config.json. Raises ValueError, naming `where` it stands, if it is not a JSON object."""
    try:
        config = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON: {e}. Repair it, or remove it to use the defaults.") from e
    if not isinstance(config, dict):
        raise ValueError(f"{where} is not a JSON object. Repair it, or remove it to use the defaults.")
    return config


def config_beside(path: Path) -> str | None:
    """The text of the config.json in a model file's folder; None if there is none, or if it is another model's: a
    folder of models is shared."""
    file = path.with_name(CONFIG_FILE)
    if not file.is_file():
        return None
    content = file.read_bytes()
    if b"worldstereo" not in content:
        logging.info(f"{file} is not a WorldStereo configuration and is not used")
        return None
    return content.decode("utf-8", "replace")


def config_to_embed(path: Path, metadata: dict[str, str], given: Path | None = None) -> str | None:
    """The text of the configuration that goes with a model file: the given file, the config.json beside it, or that of
    its metadata. Raises ValueError for one that is not a JSON object."""
    if given is not None:
        text, where = given.read_text(encoding="utf-8", errors="replace"), str(given)
    else:
        text, where = config_beside(path), str(path.with_name(CONFIG_FILE))
    if text is None:
        return metadata.get("config")
    parse_config(text, where)
    return text


def _positive_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _setting(config: dict, key: str, default, valid, wanted: str):
    value = config.get(key)
    if value is None:
        return default
    if not valid(value):
        raise ConfigMismatch(f"config: {key} is {value!r}, expected {wanted}")
    return value


def _is_scale_map(value) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(size, list | tuple) and len(size) == 2 and all(_positive_int(s) and s % 16 == 0 for s in size)
            for size in value
        )
    )


def read_config(shapes: dict[str, tuple[int, ...]], config: dict) -> WorldStereoConfig:
    """The configuration of a checkpoint.

    shapes: the tensors' shapes by their native names (of a whole model: backbone and control branch).
    config: the content of config.json, {} where there is none (then the documented defaults hold).

    Sizes come from the shapes; the head counts, `update_ref`, the conditioning and the sampling settings from
    `config`. Without a `model_type`, a checkpoint with a camera MLP is taken for worldstereo-memory-dmd and one
    without for worldstereo-camera. Raises ConfigMismatch where the two contradict each other or a setting is out of range.
    """

    def count(prefix: str) -> int:
        last = max((int(n[len(prefix) :].split(".")[0]) for n in shapes if n.startswith(prefix)), default=-1)
        if last >= len(shapes):
            raise ConfigMismatch(
                f"config: there is a tensor of {prefix}{last}, but the file has {len(shapes)} tensors in all"
            )
        return 1 + last

    control = _setting(config, "controlnet_cfg", {}, lambda v: isinstance(v, dict), "an object")
    dim = shapes["patch_embedding.weight"][0]
    control_dim = shapes["controlnet.proj_in.weight"][0]
    mask_proj = shapes["controlnet.controlnet_mask_embedding.mask_proj.0.weight"]
    has_camera_mlp = "camera_embedding.0.weight" in shapes
    sizes = {
        "conv_out_dim": dim,
        "dim": control_dim,
        "ffn_dim": shapes["controlnet.controlnet_blocks.0.ffn.0.weight"][0],
        "num_layers": count("controlnet.controlnet_blocks."),
        "mid_channels": mask_proj[0],
        "mask_downsample": mask_proj[2],
        "main_camera_embedding": has_camera_mlp,
    }
    for key, size in sizes.items():
        if control.get(key) not in (None, size):
            raise ConfigMismatch(f"config: controlnet_cfg.{key} is {control[key]!r}, but the tensors say {size!r}")

    default_type = MEMORY_DMD if has_camera_mlp else CAMERA
    model_type = _setting(config, "model_type", default_type, MODEL_TYPES.__contains__, " or ".join(MODEL_TYPES))
    if (model_type == CAMERA) == has_camera_mlp:
        raise ConfigMismatch(
            f"config: model_type is {model_type}, but the checkpoint has "
            f"{'a' if has_camera_mlp else 'no'} camera MLP (camera_embedding.*)"
        )

    head_dim = _setting(config, "attention_head_dim", 128, _positive_int, "a positive integer")
    heads = _setting(
        config,
        "num_attention_heads",
        dim // head_dim or 1,
        lambda v: _positive_int(v) and dim % v == 0,
        f"a divisor of {dim}",
    )
    control_heads = _setting(
        control, "num_heads", 16, lambda v: _positive_int(v) and control_dim % v == 0, f"a divisor of {control_dim}"
    )
    number = "a positive number"
    is_number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v > 0
    return WorldStereoConfig(
        model_type=model_type,
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_heads=heads,
        num_layers=count("blocks."),
        freq_dim=shapes["time_embedding.0.weight"][1],
        text_dim=shapes["text_embedding.0.weight"][1],
        image_dim=shapes["img_emb.proj.1.weight"][1],
        eps=_setting(config, "eps", WorldStereoConfig.eps, is_number, number),
        camera_mlp_dim=shapes["camera_embedding.0.weight"][0] if has_camera_mlp else 0,
        control_dim=control_dim,
        control_ffn_dim=sizes["ffn_dim"],
        control_num_heads=control_heads,
        control_num_layers=sizes["num_layers"],
        mask_channels=sizes["mid_channels"],
        mask_downsample=sizes["mask_downsample"],
        update_ref=_setting(control, "update_ref", True, lambda v: isinstance(v, bool), "true or false"),
        nframe=_setting(config, "nframe", WorldStereoConfig.nframe, _positive_int, "a positive integer"),
        scale_map=tuple(
            tuple(s)
            for s in _setting(
                config, "scale_map", SCALE_MAP, _is_scale_map, "a list of [height, width] in multiples of 16"
            )
        ),
        latent_cond_mode=_setting(
            config,
            "latent_cond_mode",
            LATENT_COND_MODES[0],
            LATENT_COND_MODES.__contains__,
            " or ".join(LATENT_COND_MODES),
        ),
        negative_prompt=_setting(config, "negative_prompt", "", lambda v: isinstance(v, str), "a text"),
        gen_shift=float(_setting(config, "gen_shift", WorldStereoConfig.gen_shift, is_number, number)),
        dmd_steps=_setting(config, "dmd_steps", WorldStereoConfig.dmd_steps, _positive_int, "a positive integer"),
        dmd_start_steps=_setting(config, "dmd_start_steps", WorldStereoConfig.dmd_start_steps, is_number, number),
        dmd_end_steps=_setting(config, "dmd_end_steps", WorldStereoConfig.dmd_end_steps, is_number, number),
    )


def assumptions(name: str, content: dict, config: WorldStereoConfig) -> str:
    """One line about what the configuration of a file does not say and the defaults stand for; empty where it says all.

    name: the file's. content: what `config` was read from, {} where there was no config.json.
    """
    control = content.get("controlnet_cfg") or {}
    low, high = config.scale_map[0], config.scale_map[-1]
    settings = [
        (content, "model_type", config.model_type),
        (content, "nframe", config.nframe),
        (content, "scale_map", f"{len(config.scale_map)} sizes from {low[1]}×{low[0]} to {high[1]}×{high[0]}"),
        (content, "latent_cond_mode", config.latent_cond_mode),
        (control, "num_heads", f"{config.control_num_heads} in the control branch"),
    ]
    if config.has_memory:
        settings.append((control, "update_ref", str(config.update_ref).lower()))
    if config.is_dmd:
        keys = ("gen_shift", "dmd_steps", "dmd_start_steps", "dmd_end_steps")
        settings += [(content, key, f"{getattr(config, key):g}") for key in keys]
    else:
        settings.append((content, "negative_prompt", "none"))
    assumed = [f"{key} {value}" for where, key, value in settings if where.get(key) is None]
    if not assumed:
        return ""
    return (
        f"No {CONFIG_FILE} says these settings of {name}, so they are assumed: {', '.join(assumed)}. The model's own {CONFIG_FILE} is in its folder "
        f"of {REPOSITORY}: put it beside the file."
    )
