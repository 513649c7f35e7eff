"""What comes into every node: values of wrong types, out of range, of odd shapes, not finite; each through its execute."""

import functools
import math
from pathlib import Path
from random import Random
from types import SimpleNamespace

import folder_paths
import torch
from comfy.ldm.wan.vae import WanVAE
from comfy_api.latest import io
from toy import GOLDEN
from worldstereo_fp8.comfy_nodes.show import WorldStereoPreviewClip
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.nodes import available
from worldstereo_fp8.scene.camera_path import pinhole
from worldstereo_fp8.scene.cameras import Cameras, write_camera_json
from worldstereo_fp8.scene.depth import DEPTH_PICTURES
from worldstereo_fp8.scene.pointcloud import PointCloud
from worldstereo_fp8.scene.start import scene_of_picture

from . import VALUES, Case

HEIGHT, WIDTH, FRAMES = 24, 32, 4
SLOW_AT_MOST = {"width", "height"}  # the largest are legal, and take longer than a case may
TEXTS = (
    "",
    "x" * 70_000,
    "a\0b",
    "\ud800",
    "../../x",
    "/etc/passwd",
    "a/b",
    "\x1b[31m",
    "1, 2, 3",
    "0",
    "-1",
    "1,,2",
    "first",
    "%date%",
)
LISTS = (
    "left from first: orbit left 25", "left: orbit left " + "9" * 400, "a" * 300 + ": dolly in 1", "a: orbit left 1\n" * 3,
    "x: dolly in 1e9", "a from \ud800: dolly in 1", "a: dolly in 1 asks b", ":" * 60_000, "\n".join(f"p{n}: dolly in 1" for n in range(101)),
)  # fmt: skip
COLOURS = ("#808080", "#fff", "red", "#12345", "", "hsl(9,9,9)", "rgb(999999,0,0)", "#" + "f" * 5000, "\ud800")


@functools.cache
def model():
    patcher = load_worldstereo(GOLDEN / "memory_dmd.weights.safetensors")
    object.__setattr__(patcher.model.diffusion_model.config, "scale_map", ((32, 48), (48, 32)))
    return patcher


def cameras(count: int = FRAMES) -> Cameras:
    w2c = torch.eye(4).repeat(count, 1, 1)
    w2c[:, 0, 3] = torch.arange(count) * 0.05
    return Cameras(w2c, pinhole(WIDTH, HEIGHT, 30).K.expand(count, 3, 3), WIDTH, HEIGHT)


def geometry(panorama: bool = False) -> dict:
    depth = 1 + torch.rand(1, HEIGHT, WIDTH)
    parts = {"depth": depth, "mask": torch.ones_like(depth, dtype=torch.bool), "image": torch.rand(1, HEIGHT, WIDTH, 3)}
    lens = {"intrinsics": torch.tensor([[[0.9, 0, 0.5], [0, 1.2, 0.5], [0, 0, 1]]])}
    return parts if panorama else parts | lens


def scene():
    image = torch.rand(1, HEIGHT, WIDTH, 3)
    start = scene_of_picture(image, geometry(), None, DEPTH_PICTURES[0], 1, 10, WIDTH, HEIGHT)
    return start.with_path("path_1", cameras(), [2, 3], [torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8)] * 2)


class Network(WanVAE):
    """A VAE's network without weights, whose results are zeros of the right shapes."""

    def __init__(self):
        torch.nn.Module.__init__(self)

    def encode(self, pixels):
        return pixels.new_zeros(len(pixels), 16, 1, pixels.shape[3] // 8, pixels.shape[4] // 8)

    def decode(self, latent):
        return latent.new_zeros(len(latent), 3, 1, 8 * latent.shape[3], 8 * latent.shape[4])


class Vae:
    """ComfyUI's VAE around it."""

    latent_channels = 16
    device = output_device = torch.device("cpu")

    def __init__(self):
        self.first_stage_model = Network()

    def encode(self, pixels):
        return self.first_stage_model.encode(pixels.movedim(-1, 1).unsqueeze(2))

    def decode(self, latent):
        return self.first_stage_model.decode(latent).movedim(1, -1)


class Depths:
    """A MoGe model that finds a flat wall."""

    load_device, num_tokens_range = torch.device("cpu"), (1200, 3600)

    def infer(self, pictures, **_):
        count, _, height, width = pictures.shape
        depth = torch.ones(count, height, width)
        return {"depth": depth, "mask": depth > 0, "intrinsics": torch.eye(3).expand(count, 3, 3)}


def fitting(node, declared, random: Random):
    """A value that the node takes."""
    name, io_type = declared.id, declared.get_io_type().split(",")[0]
    if declared.rawLink:
        return ["1", 0]
    if io_type in ("INT", "FLOAT", "STRING", "BOOLEAN", "COLOR"):
        if name == "reference_index":
            return "1"
        return (
            2
            if name == "keyframes"
            else WIDTH
            if name in ("width", "height")
            else declared.default
            if declared.default is not None
            else ""
        )
    if io_type == "COMBO":
        return random.choice(declared.options) if declared.options else "none.safetensors"
    frames = FRAMES if name in ("images", "render_video", "render_mask", "pixels") else 1
    if name == "depth" and node.__name__ == "WorldStereoAddToScene":
        return None
    if name == "references":
        return None
    return {
        "IMAGE": lambda: torch.rand(frames, HEIGHT, WIDTH, 3),
        "MASK": lambda: torch.rand(frames, HEIGHT, WIDTH).round(),
        "LATENT": lambda: {"samples": torch.randn(1, 16, 2, 4, 6)},
        "CONDITIONING": lambda: [[torch.zeros(1, 2, 8), {}]],
        "MODEL": model,
        "VAE": Vae,
        "CLIP": lambda: SimpleNamespace(
            tokenize=lambda text: {"umt5xxl": [[(1, 1.0)] * min(len(text) + 1, 600)]},
            encode_from_tokens_scheduled=lambda tokens: [[torch.zeros(1, 2, 8), {}]],
        ),
        "CLIP_VISION": lambda: SimpleNamespace(
            encode_image=lambda pictures: SimpleNamespace(image_embeds=torch.rand(len(pictures), 8))
        ),
        "CLIP_VISION_OUTPUT": lambda: SimpleNamespace(penultimate_hidden_states=torch.zeros(1, 257, 8)),
        "MOGE_MODEL": Depths,
        "MOGE_GEOMETRY": lambda: geometry(panorama=node.__name__ == "WorldStereoPanorama"),
        "WORLDSTEREO_CAMERAS": lambda: cameras(1 if name == "reference_cameras" else FRAMES),
        "WORLDSTEREO_POINTS": lambda: PointCloud(torch.rand(50, 3) + torch.tensor([0, 0, 1.0]), torch.rand(50, 3)),
        "WORLDSTEREO_SCENE": scene,
    }[io_type]()


def odd_tensor(random: Random, whole: torch.Tensor) -> torch.Tensor:
    whole = whole.clone()
    kind = random.randrange(12)
    if kind < 3:
        whole.view(-1)[random.randrange(whole.numel())] = random.choice((math.nan, math.inf, -math.inf))
    elif kind == 3:
        return whole * random.choice((1e30, 255.0, -1.0, 0.0))
    elif kind == 4:
        return random.choice((whole[:0], whole[:, :0], whole[None], whole[0], whole.int(), whole > 0.5, whole.half()))
    elif kind == 5:
        return whole[..., :1].expand(*whole.shape[:-1], random.choice((1, 2, 4, 5)))
    elif kind == 6:
        return whole.new_zeros(1).expand(random.choice(((10**6, 24, 32, 3), (1, 70_000, 2, 3), (1, 20_000, 20_000, 3))))
    elif kind == 7:
        return torch.rand(random.choice(((1, 1, 1, 3), (1, 1, 3000, 3), (2, 3000, 1, 3), (4, 1, 1, 3), (1, 2, 2, 3))))
    elif kind == 8:
        return whole.repeat(2, *[1] * (whole.ndim - 1))
    elif kind == 9:
        return torch.rand(
            random.choice(
                ((1, HEIGHT, WIDTH), (FRAMES, 7, 5), (FRAMES, 1, 1), (1, 0, 0), (2, 2, 2, 2), (HEIGHT, WIDTH))
            )
        )
    else:
        return whole[..., : max(1, whole.shape[-1] // 2)]
    return whole


def odd(random: Random, declared, value):
    """A value in the place of one that fits."""
    if random.random() < 0.3:
        return random.choice(VALUES)
    if isinstance(value, torch.Tensor):
        return odd_tensor(random, value)
    if isinstance(declared, io.Int.Input | io.Float.Input):
        ends = [declared.min] if declared.id in SLOW_AT_MOST else [declared.min, declared.max]
        return random.choice([*ends, declared.min - 1, declared.max + 1, math.nan, math.inf, 10**400, 0, -1, 1e-300])
    if declared.id == "own_list":
        return random.choice(LISTS)
    if isinstance(declared, io.Color.Input):
        return random.choice(COLOURS)
    if isinstance(value, str):
        return random.choice(TEXTS)
    if isinstance(value, dict):
        key = random.choice(list(value))
        kind = random.random()
        spoilt = odd_tensor(random, value[key].float()) if kind < 0.5 else random.choice(VALUES)
        return value | {key: spoilt} if kind < 0.8 else {k: v for k, v in value.items() if k != key}
    if isinstance(value, Cameras):
        w2c, K = value.w2c.double(), value.K.double()
        kind = random.randrange(5)
        if kind == 0:
            w2c[random.randrange(len(w2c)), random.randrange(3), 3] = random.choice((1e11, -1e11, 1e6))
        elif kind == 1:
            K[:, 0, 0] = random.choice((0.002, 1e11))
        elif kind == 2:
            return Cameras(w2c[:1].expand(10_001, 4, 4), K[:1].expand(10_001, 3, 3), WIDTH, HEIGHT)
        elif kind == 3:
            return value[0]
        else:
            return Cameras(w2c, K, random.choice((1, 65536)), random.choice((1, 65536)))
        return Cameras(w2c, K, value.width, value.height)
    if isinstance(value, PointCloud):
        count = random.choice((0, 1, 2, 50))
        return PointCloud(torch.rand(count, 3) * random.choice((0.0, 1.0, -1.0, 1e30)), torch.rand(count, 3))
    return random.choice(VALUES)


@functools.cache
def nodes() -> tuple:
    return tuple(available())


def case(random: Random, folder: Path) -> Case:
    place = folder / "ComfyUI"
    for kind in ("input", "output", "temp"):
        (place / kind).mkdir(parents=True)
        setattr(folder_paths, f"{kind}_directory", str(place / kind))
    write_camera_json(place / "input" / "camera.json", cameras())
    node = random.choice(nodes())
    hidden = SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None)
    node = type(node.__name__, (node,), {"hidden": hidden})
    declared = node.define_schema().inputs
    given = {}
    for entry in declared:
        if not entry.optional or random.random() < 0.5:
            value = fitting(node, entry, random)
            if value is not None or not entry.optional:
                given[entry.id] = value
    for entry in random.sample(declared, min(len(declared), random.choice((0, 1, 1, 1, 2)))):
        given[entry.id] = odd(random, entry, given.get(entry.id, ""))
    if random.random() < 0.03:
        given["\ud800"] = 1

    def wrong(result) -> str | None:
        for value in result.args or ():
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                return "a result is not finite"
        if node.__base__ is WorldStereoPreviewClip and not list((place / "temp").iterdir()):
            return "nothing to play"
        return None

    names = [entry.id for entry in declared]
    return Case(
        lambda: node.execute(**given),
        (*names, "Camera ", "path", "depth", "names", "not an input", "diffusion_models", "MoGe geometry"),
        wrong,
    )
