"""`python dev.py demo`: the example workflow at toy size, on the real ComfyUI server.

Builds toy models, draws the inputs (or takes yours), starts ComfyUI, posts example_workflows/your_own_render_and_mask.json and
leaves a video and a contact sheet in .dev/demo/output.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import standalone

INPUTS = {"image": "image.png", "camera": "camera.json", "render": "render.mp4", "mask": "render_mask.mp4"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py demo", description="Run the example workflow at toy size.")
    parser.add_argument("--image", type=Path, help="a picture")
    parser.add_argument("--camera", type=Path, help="camera.json: its world-to-camera matrices and intrinsics")
    parser.add_argument("--render", type=Path, help="a video: the point-cloud render of each camera")
    parser.add_argument("--mask", type=Path, help="a video: white where nothing was rendered")
    arguments = parser.parse_args()
    own = {name: getattr(arguments, name) for name in INPUTS}
    if any(own.values()) and not all(own.values()):
        parser.error("give all of --image, --camera, --render and --mask, or none: they belong together")
    for path in filter(None, own.values()):
        if not path.is_file():
            parser.error(f"there is no file {path}")

    started = time.monotonic()
    comfyui = standalone.import_all(dynamic_vram=False)  # it makes files; the server runs the model
    from worldstereo_fp8.demo import job, scene, server

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", flush=True)

    def show_progress(title: str, value: int, maximum: int) -> None:
        if value in (0, maximum):
            say(f"{title}: {value} of {maximum}" if maximum else title)

    base = standalone.ROOT / ".dev" / "demo"
    say("Building the toy models")
    job.prepare(base)
    if all(own.values()):
        files = {name: f"{name}{path.suffix}" for name, path in own.items()}
        for name, path in own.items():
            shutil.copyfile(path, base / "input" / files[name])
    else:
        say("Drawing a picture, a camera path, its render and its hole mask")
        scene.draw(base / "input")
        files = INPUTS
    say("Starting ComfyUI")
    try:
        with server.Server(comfyui, base) as running:
            prompt = job.demo_prompt(running.object_info(), files)
            outputs = running.run(prompt, show_progress)
    except server.ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    video = job.saved_video(base, outputs)
    sheet = video.with_suffix(".png")
    job.contact_sheet(base / "input" / files["render"], base / "input" / files["mask"], video, sheet)
    say("Done. The model is a toy that paints the render's blurred colours; the real files make the real pictures.")
    print(f"Video:         {video}\nContact sheet: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
