"""The demo's job: toy files for the example workflow, and what becomes of its outputs."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from . import toy
from .scene import read_video
from .server import to_api

WORKFLOW = Path(__file__).resolve().parent.parent / "example_workflows" / "your_own_render_and_mask.json"
MODEL, VAE = "worldstereo_toy.safetensors", "wan_toy_vae.safetensors"
STAND_INS = {"CLIPLoader": "WorldStereoDemoTextEncoder", "CLIPVisionLoader": "WorldStereoDemoVisionEncoder"}
SHEET_FRAMES = 7


def prepare(base: Path) -> None:
    """Make `base` a ComfyUI base directory that holds the toy models."""
    for folder in ("models/diffusion_models", "models/vae", "input"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    toy.save_model(base / "models" / "diffusion_models" / MODEL)
    toy.save_vae(base / "models" / "vae" / VAE)


def example_prompt(object_info: dict) -> dict:
    """The API form of the example workflow."""
    return to_api(json.loads(WORKFLOW.read_text("utf-8")), object_info)


def demo_prompt(object_info: dict, files: dict[str, str]) -> dict:
    """The example workflow in API form, with the toy models, the input files {"image", "camera", "render", "mask"} and
    the two stand-ins for the encoders."""
    prompt = example_prompt(object_info)
    for node in prompt.values():
        inputs = node["inputs"]
        match node["class_type"]:
            case "LoadWorldStereoFP8":
                inputs["model_name"] = MODEL
            case "VAELoader":
                inputs["vae_name"] = VAE
            case "LoadImage":
                inputs["image"] = files["image"]
            case "WorldStereoLoadCamera":
                inputs["camera"] = files["camera"]
            case "LoadVideo":
                inputs["file"] = files["mask" if "mask" in inputs["file"] else "render"]
            case loader if loader in STAND_INS:
                node["class_type"] = STAND_INS[loader]
                node["inputs"] = {}
                node["_meta"]["title"] = object_info[STAND_INS[loader]]["display_name"]
    return prompt


def saved_video(base: Path, outputs: dict) -> Path:
    """Where SaveVideo put the video, by what the server said of its outputs."""
    for output in outputs.values():
        for saved in output.get("images", []):
            if saved["type"] == "output":
                return base / "output" / saved["subfolder"] / saved["filename"]
    raise ValueError(f"The workflow saved no video; its outputs are {outputs}.")


def contact_sheet(render: Path, mask: Path, video: Path, sheet: Path) -> None:
    """Three rows of the same moments: the render, the hole mask, the keyframes."""
    rows = []
    width, height = Image.fromarray(read_video(video)[0]).size
    for frames in map(read_video, (render, mask, video)):
        moments = np.linspace(0, len(frames) - 1, SHEET_FRAMES).astype(int)
        rows.append([np.asarray(Image.fromarray(frames[moment]).resize((width, height))) for moment in moments])
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows])).save(sheet)
