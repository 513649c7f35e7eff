"""The configuration of a WorldStereo checkpoint: sizes from its tensors' shapes, the rest from its config.json or the
defaults."""

import codecs
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from .. import remap
from ..files import json
from ..files.json import CONFIG_LIMIT
from ..files.regular import read_regular
from ..files.text import shown
from ..fp8.files import TensorFiles
from ..fp8.recipe import is_side_tensor

CONFIG_FILE = "config.json"
CONFIG_TENSOR = "worldstereo_config"  # the same text as UTF-8, in files that ComfyUI's Save nodes write
CAMERA, MEMORY, MEMORY_DMD = MODEL_TYPES = ("worldstereo-camera", "worldstereo-memory", "worldstereo-memory-dmd")

REPOSITORY = "https://huggingface.co/hanshanxue/WorldStereo"  # of the published checkpoints and their config.json

# Assumed where there is no config.json, as height, width. Those after (640, 576) follow from the others by symmetry.
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

# Limits of a configuration, well above what the model was made for: they bound memory and time.
MAX_FRAMES = 81
MAX_SIZES = 64  # entries of scale_map
MAX_PIXELS = 2**20  # of one of them
MAX_STEPS = 100
MAX_PROMPT = 10_000  # characters
PATH = 300  # characters of a path in a message
MAX_MASK_KERNEL = 4  # frames
TIMESTEPS = 1000  # sigma = timestep / 1000

# The tensors that sizes are read from, and how many axes they have.
RANKS = {
    "patch_embedding.weight": 5,
    "blocks.0.ffn.0.weight": 2,
    "time_embedding.0.weight": 2,
    "text_embedding.0.weight": 2,
    "img_emb.proj.1.weight": 2,
    "camera_embedding.0.weight": 2,
    "controlnet.proj_in.weight": 2,
    "controlnet.controlnet_blocks.0.ffn.0.weight": 2,
    "controlnet.controlnet_mask_embedding.mask_proj.0.weight": 5,
}


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
    dmd_start_steps: float = 250.0
    dmd_end_steps: float = 1000.0

    @property
    def has_memory(self) -> bool:
        """Whether the model takes reference views and cameras as quaternions (the memory variants)."""
        return self.camera_mlp_dim > 0

    @property
    def is_dmd(self) -> bool:
        """Whether the model was distilled to a few steps without CFG."""
        return self.model_type == MEMORY_DMD

    @property
    def mask_kernel(self) -> tuple[int, int, int]:
        """The frames, rows and columns of the render mask that become one value a channel."""
        return self.mask_downsample, SPATIAL_DOWNSCALE, SPATIAL_DOWNSCALE

    @property
    def shift(self) -> float:
        """The flow shift of the noise schedule: `gen_shift` is the distilled variant's alone."""
        return self.gen_shift if self.is_dmd else WAN_480P_SHIFT


class ConfigMismatch(ValueError):
    """A configuration that a checkpoint cannot have."""


class WrongShapes(ValueError):
    """Tensors whose shapes do not fit any WorldStereo model, whatever the configuration."""


@dataclass(frozen=True)
class FoundConfig:
    """The configuration of a model file: its text (None without one), its JSON, and what was read from that."""

    text: str | None
    content: dict
    config: WorldStereoConfig


def find_config(path: Path, own: str | None, shapes: dict, given: Path | None = None) -> FoundConfig:
    """The configuration of a model file: the given one, else the config.json beside the file, else the file's own, else
    the defaults.

    own: the text in the file itself. shapes: as for `read_config`.

    A config.json beside the file may belong to another model in the same folder: if it is not WorldStereo's or does not
    fit the tensors it is ignored, and the log says so. A config.json that contradicts the file's own text is used, with
    a warning in the log. Raises ValueError for a configuration that is not a JSON object, for one that does not fit the
    tensors (the given one, the file's own or, without any, the defaults), and for tensors that no configuration fits;
    and OSError.
    """
    try:
        found = _belonging(path, own, shapes, given)
        if found is not None:
            return found
        return FoundConfig(None, {}, read_config(shapes, {}))
    except ConfigMismatch as e:
        raise ValueError(
            f"{shown(path.name)} has no configuration, and the defaults do not fit its tensors: {e}. Put the "
            f"{CONFIG_FILE} of the model beside it."
        ) from e
    except WrongShapes as e:
        raise ValueError(f"{shown(path.name)}: {e}. The file is damaged, or of another model.") from e


def config_to_embed(files: TensorFiles, given: Path | None = None) -> str | None:
    """The text of the configuration of a source with diffusers names; None without one.

    given: a config.json to use in any case. Raises ValueError as `find_config` does, but not if the defaults do not
    fit: a config.json can still be put beside the result.
    """
    shapes = {remap.to_native(n): tensor.shape for n, tensor in files.tensors.items() if not is_side_tensor(n)}
    try:
        found = _belonging(files.path, files.metadata.get("config"), shapes, given)
        if found is None:
            read_config(shapes, {})
    except ConfigMismatch:
        return None
    except WrongShapes as e:
        raise ValueError(f"{shown(files.path.name)}: {e}. The file is damaged, or of another model.") from e
    return None if found is None else found.text


def _belonging(path: Path, own: str | None, shapes: dict, given: Path | None) -> FoundConfig | None:
    """`find_config`, without the defaults."""
    if given is not None:
        return _fitting(_decoded(read_regular(given, CONFIG_LIMIT)), shown(given, PATH), shapes)
    beside = path.with_name(CONFIG_FILE)
    if beside.is_file():
        text, where = _decoded(read_regular(beside, CONFIG_LIMIT)), shown(beside, PATH)
        if "worldstereo" not in text:
            logging.info(f"{where} is not a WorldStereo configuration and is not used")
        else:
            try:
                found = FoundConfig(text, content := _parsed(text, where), read_config(shapes, content))
            except ConfigMismatch as e:
                logging.warning(f"{where} does not belong to {shown(path.name)} and is not used: {e}")
            else:
                _compare_types(path, where, found, own)
                return found
    return None if own is None else _fitting(own, f"{shown(path.name)}: its own config", shapes)


def _decoded(content: bytes) -> str:
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig", "replace")


def _fitting(text: str, where: str, shapes: dict) -> FoundConfig:
    content = _parsed(text, where)
    try:
        return FoundConfig(text, content, read_config(shapes, content))
    except ConfigMismatch as e:
        raise ValueError(f"{where} does not fit its tensors: {e}") from e


def _parsed(text: str, where: str) -> dict:
    try:
        content = json.parse(text, where)
    except ValueError as e:
        raise ValueError(f"{e}. Repair it, or remove it to use the defaults.") from e
    if not isinstance(content, dict):
        raise ValueError(f"{where} is not a JSON object. Repair it, or remove it to use the defaults.")
    return content


def _compare_types(path: Path, where: str, found: FoundConfig, own: str | None):
    other = _parsed(own or "{}", f"{shown(path.name)}: its own config").get("model_type")
    if other not in (None, found.config.model_type):
        logging.warning(
            f"{where} is used ({found.config.model_type}), but {shown(path.name)} says that it is {shown(other)}. "
            "If they do not belong together, give each model a folder of its own."
        )


def _is_int(value, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _setting(config: dict, key: str, default, valid, wanted: str):
    """The value of a key, or the default. Raises ConfigMismatch for a value that is not valid."""
    value = config.get(key)
    if value is None:
        value = default
    if not valid(value):
        raise ConfigMismatch(f"config: {key} is {shown(value)}, expected {wanted}")
    return value


def _integer(config: dict, key: str, default: int, low: int, high: int) -> int:
    return _setting(config, key, default, lambda v: _is_int(v, low, high), f"an integer from {low} to {high}")


def _number(config: dict, key: str, default: float, low: float, high: float) -> float:
    return float(_setting(config, key, default, lambda v: _is_number(v, low, high), f"a number from {low} to {high}"))


def _heads(config: dict, key: str, default: int, dim: int) -> int:
    """A head count. RoPE rotates pairs of channels along three axes, so a head has an even number of channels, at least
    6."""
    valid = lambda v: _is_int(v, 1, dim) and dim % v == 0 and dim // v % 2 == 0 and dim // v >= 6
    return _setting(config, key, default, valid, f"a divisor of {dim} that leaves heads of an even size of at least 6")


def _is_scale_map(value) -> bool:
    return (
        isinstance(value, list | tuple)
        and 0 < len(value) <= MAX_SIZES
        and all(
            isinstance(size, list | tuple)
            and len(size) == 2
            and all(_is_int(s, 16, MAX_PIXELS // 16) and s % 16 == 0 for s in size)
            and math.prod(size) <= MAX_PIXELS
            for size in value
        )
    )


def _is_text(value) -> bool:
    """Whether the value is a text that can be written and logged: without lone surrogates, and not too long."""
    return isinstance(value, str) and len(value) <= MAX_PROMPT and not any("\ud800" <= c <= "\udfff" for c in value)


def read_config(shapes: dict[str, tuple[int, ...]], config: dict) -> WorldStereoConfig:
    """The configuration of a checkpoint.

    shapes: the tensors' shapes by their native names, of backbone and control branch. Sizes whose tensors are missing,
    as in an overlay, are assumed to be the published model's.
    config: the content of config.json; {} without one, which gives the defaults.

    Sizes come from the shapes; the head counts, `update_ref`, the conditioning and the sampling settings from
    `config`. Without a `model_type`, a checkpoint with a camera MLP is taken for worldstereo-memory-dmd and one
    without for worldstereo-camera. Raises ConfigMismatch if the two contradict each other or a setting is out of range,
    and WrongShapes for shapes that no configuration fits.
    """

    def size(name: str, axis: int, default: int) -> int:
        shape = shapes.get(name)
        if shape is None:
            return default
        if len(shape) != RANKS[name] or 0 in shape:
            raise WrongShapes(f"{name} is {list(shape)}, expected {RANKS[name]} axes, none of them empty")
        return shape[axis]

    def count(prefix: str) -> int:
        last = max((int(n[len(prefix) :].split(".")[0]) for n in shapes if n.startswith(prefix)), default=-1)
        if last >= len(shapes):
            raise WrongShapes(f"there is a tensor of {prefix}{last}, but the file has {len(shapes)} tensors in all")
        return 1 + last

    default = WorldStereoConfig
    control = _setting(config, "controlnet_cfg", {}, lambda v: isinstance(v, dict), "an object")
    control_dim = size("controlnet.proj_in.weight", 0, default.control_dim)
    dim = size("patch_embedding.weight", 0, size("controlnet.proj_in.weight", 1, default.dim))
    mask_proj = "controlnet.controlnet_mask_embedding.mask_proj.0.weight"
    has_camera_mlp = "camera_embedding.0.weight" in shapes
    sizes = {
        "conv_out_dim": dim,
        "dim": control_dim,
        "ffn_dim": size("controlnet.controlnet_blocks.0.ffn.0.weight", 0, default.control_ffn_dim),
        "num_layers": count("controlnet.controlnet_blocks."),
        "mid_channels": size(mask_proj, 0, default.mask_channels),
        "mask_downsample": size(mask_proj, 2, default.mask_downsample),
        "main_camera_embedding": has_camera_mlp,
    }
    freq_dim = size("time_embedding.0.weight", 1, default.freq_dim)
    # Groups of 8 channels in the GroupNorm after the mask kernel; cosines and sines in the time embedding.
    if sizes["mid_channels"] % 8 or sizes["mask_downsample"] > MAX_MASK_KERNEL:
        raise WrongShapes(
            f"{mask_proj} is {list(shapes[mask_proj])}, expected a multiple of 8 channels and at most "
            f"{MAX_MASK_KERNEL} frames"
        )
    if freq_dim % 2:
        raise WrongShapes(f"time_embedding.0.weight has {freq_dim} columns, expected an even number")
    for key, value in sizes.items():
        if control.get(key) not in (None, value):
            raise ConfigMismatch(
                f"config: controlnet_cfg.{key} is {shown(control[key])}, but the tensors say {value!r}"
            )

    default_type = MEMORY_DMD if has_camera_mlp else CAMERA
    model_type = _setting(config, "model_type", default_type, MODEL_TYPES.__contains__, " or ".join(MODEL_TYPES))
    if (model_type == CAMERA) == has_camera_mlp:
        raise ConfigMismatch(
            f"config: model_type is {model_type}, but the checkpoint has "
            f"{'a' if has_camera_mlp else 'no'} camera MLP (camera_embedding.*)"
        )

    head_dim = _integer(config, "attention_head_dim", 128, 1, 4096)
    start = _number(config, "dmd_start_steps", default.dmd_start_steps, 1, TIMESTEPS)
    end = _number(config, "dmd_end_steps", default.dmd_end_steps, 1, TIMESTEPS)
    steps = _integer(config, "dmd_steps", default.dmd_steps, 1, MAX_STEPS)
    if end - start < steps - 1:  # steps are at least one timestep apart, so that the sigmas decrease
        raise ConfigMismatch(
            f"config: dmd_steps is {steps} from dmd_start_steps {start:g} to dmd_end_steps {end:g}; the steps must be "
            "at least one timestep apart"
        )
    sizes_wanted = (
        f"at most {MAX_SIZES} of [height, width] in multiples of 16, of at most {MAX_PIXELS} pixels each (1024×1024)"
    )
    text_wanted = f"a text of at most {MAX_PROMPT} characters"
    modes = " or ".join(LATENT_COND_MODES)
    scale_map = _setting(config, "scale_map", SCALE_MAP, _is_scale_map, sizes_wanted)
    return WorldStereoConfig(
        model_type=model_type,
        dim=dim,
        ffn_dim=size("blocks.0.ffn.0.weight", 0, default.ffn_dim),
        num_heads=_heads(config, "num_attention_heads", dim // head_dim or 1, dim),
        num_layers=count("blocks."),
        freq_dim=freq_dim,
        text_dim=size("text_embedding.0.weight", 1, default.text_dim),
        image_dim=size("img_emb.proj.1.weight", 1, default.image_dim),
        eps=_number(config, "eps", default.eps, 1e-12, 0.1),
        camera_mlp_dim=size("camera_embedding.0.weight", 0, 0),
        control_dim=control_dim,
        control_ffn_dim=sizes["ffn_dim"],
        control_num_heads=_heads(control, "num_heads", default.control_num_heads, control_dim),
        control_num_layers=sizes["num_layers"],
        mask_channels=sizes["mid_channels"],
        mask_downsample=sizes["mask_downsample"],
        update_ref=_setting(control, "update_ref", True, lambda v: isinstance(v, bool), "true or false"),
        nframe=_integer(config, "nframe", default.nframe, 1, MAX_FRAMES),
        scale_map=tuple(tuple(s) for s in scale_map),
        latent_cond_mode=_setting(
            config, "latent_cond_mode", LATENT_COND_MODES[0], LATENT_COND_MODES.__contains__, modes
        ),
        negative_prompt=_setting(config, "negative_prompt", "", _is_text, text_wanted),
        gen_shift=_number(config, "gen_shift", default.gen_shift, 0.1, 100),
        dmd_steps=steps,
        dmd_start_steps=start,
        dmd_end_steps=end,
    )


def config_content(config: WorldStereoConfig) -> dict:
    """The content of a config.json from which `read_config` reads this configuration, given the same shapes."""
    settings = (
        "model_type", "eps", "nframe", "scale_map", "latent_cond_mode", "negative_prompt",
        "gen_shift", "dmd_steps", "dmd_start_steps", "dmd_end_steps",
    )  # fmt: skip
    return {name: getattr(config, name) for name in settings} | {
        "num_attention_heads": config.num_heads,
        "controlnet_cfg": {"num_heads": config.control_num_heads, "update_ref": config.update_ref},
    }


def assumptions(name: str, content: dict, config: WorldStereoConfig) -> str:
    """One line that lists the settings a file's configuration lacks, with the defaults assumed; empty if it lacks none.

    name: the file's name. content: what `config` was read from, {} without a config.json.
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
        f"No {CONFIG_FILE} gives these settings of {name}, so they are assumed: {', '.join(assumed)}. The model's own "
        f"{CONFIG_FILE} is in its folder of {REPOSITORY}: put it beside the file."
    )
