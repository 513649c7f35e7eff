"""`explore_picture` at full size on the real ComfyUI server: seconds of each path and of its parts, VRAM taken.

    python dev.py bench explore [--paths 3] [--vram 15.5] [--folder DIR]

The 14 B model and the VAE have random weights of the published shapes; text encoder, CLIP vision and MoGe are the demo's
stand-ins, so that what those take is missing. --vram: how many GiB of VRAM are free before ComfyUI starts (0: all).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from workflow import MODEL, LeastFree, prepare  # makes ComfyUI and the pack importable

# isort: split
import torch
from card import Card
from worldstereo_fp8.demo import job, server

EXAMPLE = Path(__file__).resolve().parent.parent / "example_workflows" / "explore_picture.json"
STAND_INS = job.STAND_INS | {"LoadMoGeModel": "WorldStereoDemoMoGeModel"}
EXPLORER = "WorldStereoExploreScene"


def example(object_info: dict, paths: int) -> dict:
    """The workflow in API form: stand-ins for the encoders, the first `paths` paths of its longer list."""
    prompt = server.to_api(json.loads(EXAMPLE.read_text("utf-8")), object_info)
    for number, node in prompt.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in STAND_INS:
            prompt[number] = {"class_type": STAND_INS[kind], "inputs": {}}
        elif kind == "LoadWorldStereoFP8":
            inputs["model_name"] = MODEL
        elif kind == "VAELoader":
            inputs["vae_name"] = job.VAE
        elif kind == "LoadImage":
            inputs["image"] = "image.png"
        elif kind == EXPLORER:
            inputs |= {"paths": "picture: left, right, up, loop", "stop_after": paths}
    return prompt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", type=int, default=3)
    parser.add_argument("--vram", type=float, default=15.5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("The benchmark explore needs a CUDA GPU.")
    base = args.folder / "worldstereo_workflow"
    prepare(base, args.folder)
    torch.cuda.empty_cache()
    spent: dict[str, dict[str, float]] = {}  # by path, then by step
    at = ["", "", time.perf_counter()]

    def event(message):
        if message["type"] != "executing":
            return
        now = time.perf_counter()
        path, step, since = at
        spent.setdefault(path, {}).setdefault(step, 0.0)
        spent[path][step] += now - since
        parts = (message["data"].get("node") or "").split(".")
        at[:] = [parts[-2] if len(parts) > 2 else "", parts[-1] if len(parts) > 2 else "other", now]

    with Card() as card:
        free = card.leave_free(args.vram)
        with LeastFree() as least, server.Server(Path(os.environ["COMFYUI_PATH"]), base) as comfyui:
            comfyui.run(example(comfyui.object_info(), args.paths), event=event)
        taken = free - least.bytes / 2**30
    print(f"{torch.cuda.get_device_name()}, {free:.1f} GiB free, at most {taken:.2f} taken; before the paths and after: "
          f"{sum(spent.get('', {}).values()):.1f} s\n\n| path | s | sampling s | the rest | its parts, s |\n|---|---:|---:|---:|---|")  # fmt: skip
    for path, steps in spent.items():
        if path:
            total, sampling = sum(steps.values()), steps.get("sample", 0.0)
            rest = ", ".join(f"{step} {s:.2f}" for step, s in steps.items() if step != "sample" and s >= 0.05)
            print(f"| {path} | {total:.1f} | {sampling:.1f} | {(total - sampling) / total:.0%} | {rest} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
