"""The example workflow at full size on the real ComfyUI server, as its user runs it: seconds of each node, VRAM taken.

    python dev.py bench workflow [--vram 5.5 7.5 15.5 0] [--runs 2]

The 14 B model and the VAE have random weights of the published shapes; text encoder and CLIP vision are the demo's
stand-ins. It needs everything that ComfyUI itself requires; where something is missing, `bench explore` measures the
same parts without a server. --vram: how many GiB of VRAM are free before ComfyUI starts (0: all); another process takes the rest.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import dev

if missing := dev.missing_packages(sys.executable, Path(os.environ["COMFYUI_PATH"]) / "requirements.txt"):
    sys.exit(
        f"The benchmark workflow starts ComfyUI's server, which requires packages that are not installed here: "
        f"{', '.join(missing)}. `bench explore` needs none of them."
    )

from step import make_checkpoint, make_vae  # makes ComfyUI and the pack importable

# isort: split
import torch
from card import Ballast
from worldstereo_fp8.demo import job, scene, server

MODEL = "worldstereo_fp8.safetensors"


def prepare(base: Path, models: Path):
    """Makes `base` a ComfyUI base directory with the models and the demo's picture, cameras, render and mask."""
    job.prepare(base)
    make_checkpoint(models / MODEL)
    link = base / "models" / "diffusion_models" / MODEL
    link.unlink(missing_ok=True)
    link.symlink_to(models / MODEL)
    make_vae(base / "models" / "vae" / job.VAE)
    scene.draw(base / "input")


class LeastFree:
    """The least VRAM that was free while the `with` block lasted, in bytes."""

    def __enter__(self):
        self.bytes, self.stop = torch.cuda.mem_get_info()[0], threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(0.02):
            self.bytes = min(self.bytes, torch.cuda.mem_get_info()[0])

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def run(comfyui: server.Server, prompt: dict) -> dict[str, float]:
    """The seconds from one node to the next, by title; those that were cached are not there."""
    stamps = [("start", time.perf_counter())]

    def progress(title: str, value: int, maximum: int):
        if title != stamps[-1][0]:
            stamps.append((title, time.perf_counter()))

    comfyui.run(prompt, progress)
    stamps.append(("end", time.perf_counter()))
    return {title: after - at for (title, at), (_, after) in zip(stamps[1:], stamps[2:])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vram", type=float, nargs="+", default=[5.5, 7.5, 15.5, 0])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("The benchmark workflow needs a CUDA GPU.")
    base = args.folder / "worldstereo_workflow"
    prepare(base, args.folder)
    torch.cuda.empty_cache()
    files = dict(image="image.png", camera="camera.json", render="render.mp4", mask="render_mask.mp4")
    with Ballast() as card:
        for vram in args.vram:
            free = card.leave_free(vram)
            with LeastFree() as least, server.Server(Path(os.environ["COMFYUI_PATH"]), base) as comfyui:
                prompt = job.demo_prompt(comfyui.object_info(), files)
                for node in prompt.values():
                    if node["class_type"] == "LoadWorldStereoFP8":
                        node["inputs"]["model_name"] = MODEL
                for seed in range(args.runs):
                    for node in prompt.values():
                        if "noise_seed" in node["inputs"]:
                            node["inputs"]["noise_seed"] = seed
                    seconds = run(comfyui, prompt)
                    print(
                        f"{free:.1f} GiB free, run {seed + 1}: {sum(seconds.values()):.1f} s, of it "
                        + ", ".join(f"{title} {s:.1f}" for title, s in seconds.items() if s >= 0.1),
                        flush=True,
                    )
            print(f"{free:.1f} GiB free: at most {free - least.bytes / 2**30:.2f} GiB taken")
            print(
                "\n".join(
                    line
                    for line in comfyui.log_tail(200).splitlines()
                    if ("VRAM" in line or "FP8" in line) and "prepared" not in line
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
