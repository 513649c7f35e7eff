"""`explore_picture` at full size: seconds of each path and of its parts, VRAM taken, and what a scene of 33 paths would take.

    python dev.py bench explore [--paths 4] [--runs 1] [--vram 0] [--folder DIR]
    python dev.py bench explore --toy        at toy size, on a machine without a GPU too

What the workflow's nodes call is called here, in their order and in one process: it needs neither ComfyUI's server and page
nor PyAV. The 14 B model, the VAE and MoGe have random weights of the published shapes. Such a MoGe finds no depth: it is
timed, and the scene gets the drawn room's exact depth. Text and CLIP vision are missing: random embeddings take their place,
and their time is not in the figures.
--runs: how often the picture is explored. The first time also starts CUDA's libraries, compiles kernels unless they are
found compiled, and moves the weights, as in a server that was just started.
--vram: how many GiB of VRAM the process can have beside its CUDA context (0: all); another process takes the rest.
"""

import argparse
import contextlib
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

MISSING = [name for name in ("torch", "numpy", "scipy", "PIL", "safetensors") if importlib.util.find_spec(name) is None]
if MISSING:
    sys.exit(f"The benchmark explore needs these packages, which are not installed here: {', '.join(MISSING)}.")

from step import file_of, make_checkpoint, make_vae, peak_bytes  # makes ComfyUI and the pack importable

# isort: split
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from card import GIB, Ballast
from moge import random_moge, run_moge
from worldstereo_fp8.demo import toy
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.scene import sample
from worldstereo_fp8.scene.camera_path import Move, depth_of_scene, move_on
from worldstereo_fp8.scene.cameras import Cameras
from worldstereo_fp8.scene.explore import LISTS, read_walks
from worldstereo_fp8.scene.fuse import POINTS_LIMIT
from worldstereo_fp8.scene.keyframe_depth import MOGE_BATCH, MOGE_LEVEL, keyframe_geometry
from worldstereo_fp8.scene.memory import REFERENCES, REMEMBERED, frames_to_remember
from worldstereo_fp8.scene.render import RADIUS
from worldstereo_fp8.scene.start import scene_of_picture
from worldstereo_fp8.scene.walk import prepare_path, remember_clip, start_view
from worldstereo_fp8.worldstereo.comfy_model import config_of
from worldstereo_fp8.worldstereo.conditioning import References, condition, keyframe_size
from worldstereo_fp8.worldstereo.keyframe_vae import decode_keyframes
from worldstereo_fp8.worldstereo.schedule import dmd_sigmas

LIST = "picture: left, right, up, loop"
SAMPLING, MOGE, EXACT_DEPTH = "sampling", "MoGe", "exact depth"
TOY_KEYFRAMES = 5
SCENE_PATHS, WANTED_MINUTES = 33, 10  # a published panorama scene's paths
CUDA = torch.cuda.is_available()


class Clock:
    """The seconds of each part of a path; the GPU's work is waited for."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str):
        start = time.perf_counter()
        yield
        if CUDA:
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Vision:
    """What CLIP vision gives of a picture."""

    penultimate_hidden_states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(3))


def exact_depths(cameras: Cameras) -> list[torch.Tensor]:
    """The drawn room's depth [H, W] in each camera."""
    depths = []
    for number in range(len(cameras)):
        origin, rays = sample.rays_of(cameras[number])
        device = "cuda" if CUDA else "cpu"
        distance = sample.cast(origin.to(device), rays.reshape(-1, 3).to(device))[0]
        depths.append(distance.view(rays.shape[:2]).float().cpu())
    return depths


def take_path(scene, walk, patcher, vae, moge, text, seed, keyframes, device):
    """One path, as Explore Scene's nodes take it: the scene with it, and the seconds of its parts."""
    clock, nothing = Clock(), lambda count: None
    with clock.part("start and cameras"):
        view = start_view(scene, walk.view)
        image, camera = scene.picture(view), scene.cameras[view]
        move = Move(walk.preset, walk.degrees, walk.distance, keyframes, "linear", "auto")
        cameras = move_on(camera, move, depth_of_scene(scene.cloud, camera))
    with clock.part("render and references"):
        path = (image, cameras, keyframes, REFERENCES, walk.ask, walk.asked, None, RADIUS, device, nothing)
        prepared = prepare_path(scene, *path)
    with clock.part("conditioning"):
        references = References(prepared.pictures, scene.cameras[list(prepared.views)], prepared.ref_index)
        values, latent = condition(config_of(patcher), vae, image, prepared.video, prepared.holes, cameras, references)
        conditions = [[text, values | {"clip_vision_output": Vision}]]
    with clock.part(SAMPLING):
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
        euler, sigmas = comfy.samplers.sampler_object("euler"), dmd_sigmas(config_of(patcher))
        sampled = comfy.sample.sample_custom(
            patcher, noise, 1.0, euler, sigmas, conditions, conditions, latent, disable_pbar=True, seed=seed
        )
    with clock.part("decoding"):
        images = decode_keyframes(vae, sampled)
    if not images.isfinite().all():
        sys.exit("The result is not finite.")
    with clock.part(MOGE):
        keyframe_geometry(moge, images, cameras, REMEMBERED, MOGE_LEVEL, MOGE_BATCH, nothing)
    with clock.part(EXACT_DEPTH):
        depths = exact_depths(cameras[frames_to_remember(len(images), REMEMBERED)])
    with clock.part("adding to the scene"):
        scene, report = remember_clip(
            scene, images, cameras, walk.name, REMEMBERED, depths, POINTS_LIMIT, device, nothing
        )
    refused = [frame.name for frame in report.frames if frame.refused]
    if refused:
        sys.exit(f"Exact depth was refused: {', '.join(refused)}.")
    exact = clock.seconds.pop(EXACT_DEPTH)  # the workflow has no such part
    return scene, clock.seconds, exact, len(prepared.views)


def share_not_sampling(rows):
    """Of the seconds of paths and of their sampling, [(whole, sampling)], the share that is not sampling."""
    return 1 - sum(sampling for _, sampling in rows) / sum(whole for whole, _ in rows)


def picture_size(patcher):
    """The width and height of the drawn room's picture for the model."""
    height, width = keyframe_size(config_of(patcher), sample.HEIGHT, sample.WIDTH)
    return width, height


def explore(patcher, vae, moge, text, paths, keyframes, device):
    """The picture's depth and the first `paths` paths of LIST, with a table of their times. Returns the seconds of the
    depth, and [(whole, sampling)] of the paths."""
    geometry = sample.geometry(sample.start_camera())
    clock = Clock()
    with clock.part(MOGE):
        run_moge(moge, geometry["image"])
    of_picture = clock.seconds[MOGE]
    scene = scene_of_picture(geometry["image"], geometry, None, "", 0, 0, *picture_size(patcher))
    print(
        f"MoGe of the picture {of_picture:.2f} s\n\n"
        "| path | references | points after | s | sampling s | the rest | its parts, s | exact depth, not counted, s |\n"
        "|---|---:|---:|---:|---:|---:|---|---:|"
    )
    rows = []
    for number, walk in enumerate(read_walks(LISTS[LIST])[:paths]):
        scene, seconds, exact, references = take_path(scene, walk, patcher, vae, moge, text, number, keyframes, device)
        whole, sampling = sum(seconds.values()), seconds[SAMPLING]
        rows.append((whole, sampling))
        parts = ", ".join(f"{part} {s:.2f}" for part, s in seconds.items() if part != SAMPLING)
        print(
            f"| {walk.name} | {references} | {len(scene.cloud):,} | {whole:.2f} | {sampling:.2f} | "
            f"{1 - sampling / whole:.1%} | {parts} | {exact:.2f} |",
            flush=True,
        )
    print()
    return of_picture, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", type=int, default=4)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--vram", type=float, default=0.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if args.paths < 2:
        parser.error("--paths must be at least 2: the first also compiles kernels.")
    if args.runs < 1:
        parser.error("--runs must be at least 1.")
    if not (CUDA or args.toy):
        sys.exit("The benchmark explore needs a CUDA GPU; --toy runs without one.")
    if args.toy:
        args.folder = args.folder / "worldstereo_toy"
        args.folder.mkdir(exist_ok=True)
    model_file, vae_file = file_of(args.folder, "fp8"), args.folder / "wan_vae.safetensors"
    if args.toy:
        toy.save_model(model_file)
        toy.save_vae(vae_file)
    else:
        make_checkpoint(model_file)
        make_vae(vae_file)
    device = torch.device("cuda" if CUDA else "cpu")
    total = torch.cuda.get_device_properties(0).total_memory / GIB if CUDA else 0
    with contextlib.ExitStack() as stack, torch.inference_mode():
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.mem_get_info()  # makes the CUDA context, which is not counted
            stack.enter_context(Ballast()).leave_free(args.vram)
            torch.cuda.set_per_process_memory_fraction(min((args.vram or total) / total, 1.0))
        began = time.perf_counter()
        patcher = load_worldstereo(model_file)
        dtype = None if CUDA else torch.float32  # 3-D convolutions in half precision are slow on most CPUs
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(vae_file)), dtype=dtype)
        loaded = time.perf_counter() - began
        moge = random_moge(args.toy)
        width_of_text = patcher.model.diffusion_model.text_embedding[0].in_features
        text = torch.randn(1, 512, width_of_text, generator=torch.Generator().manual_seed(1))
        keyframes = TOY_KEYFRAMES if args.toy else config_of(patcher).nframe
        width, height = picture_size(patcher)
        name = torch.cuda.get_device_name() if CUDA else "CPU"
        print(
            f"{name}, {width}x{height}, {keyframes} keyframes, {'toy' if args.toy else '14 B'} model; read in {loaded:.1f} s"
        )
        for run in range(1, args.runs + 1):
            print(f"\nExploration {run} of {args.runs} in this process:")
            of_picture, rows = explore(patcher, vae, moge, text, args.paths, keyframes, device)
            (first, _), *later = rows
            print(
                f"{len(rows)} paths and MoGe of the picture: {of_picture + sum(s for s, _ in rows):.2f} s, of it not "
                f"sampling {share_not_sampling([(of_picture, 0), *rows]):.1%}. A path after the first: "
                f"{sum(s for s, _ in later) / len(later):.2f} s, of it not sampling {share_not_sampling(later):.1%}."
            )
            if run == 1:
                first_paths = loaded + of_picture + first
        peak = f"Peak VRAM {peak_bytes(patcher) / GIB:.2f} GiB. " if CUDA else ""
    whole = sum(s for s, _ in later) / len(later)
    print(
        f"\n{peak}{SCENE_PATHS} paths: {(first_paths + (SCENE_PATHS - 1) * whole) / 60:.1f} minutes (at most "
        f"{WANTED_MINUTES} are wanted)."
    )
    if args.toy:
        print("These are a toy's figures: they show no more than that the benchmark runs.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
