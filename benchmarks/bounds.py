"""What the nodes take at the largest legal inputs: memory beside the result, and how long the stop button may wait.

    python dev.py bench bounds [case ...]

Each case runs in a process of its own, with one thread and without a GPU. Gap is the longest time between two looks at
the stop button: by the clock; without the time that the thread waited for a core, which other programs had; and the CPU
time in it. Memory is the peak of the resident set less what was there before (the inputs) and less what the node returns.
A row passes up to 1 s without the wait, and 2 GiB. It needs Linux's /proc.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]  # the tests' stand-ins for a model and a VAE

import standalone

standalone.import_all()

# isort: split
import comfy.model_management as management
import folder_paths
import torch
from fuzz import inputs as stand_ins
from worldstereo_fp8.comfy_nodes import camera, fly, sample, save, scene_files, show
from worldstereo_fp8.comfy_nodes import model as model_nodes
from worldstereo_fp8.comfy_nodes import picture as picture_nodes
from worldstereo_fp8.comfy_nodes import scene as scene_nodes
from worldstereo_fp8.comfy_nodes.limits import MAX_POINTS
from worldstereo_fp8.scene.camera_path import pinhole
from worldstereo_fp8.scene.cameras import MAX_CAMERAS, Cameras, write_camera_json
from worldstereo_fp8.scene.folder import write_scene
from worldstereo_fp8.scene.pointcloud import PointCloud
from worldstereo_fp8.scene.scene import MAX_POINTS as MAX_SCENE_POINTS
from worldstereo_fp8.scene.scene import Scene, TakenPath

SECONDS, GIB, MOST_GIB = 1.0, 1 << 30, 2.0
WIDTH, HEIGHT = 4096, 2048  # a frame of MOST_PIXELS
SIDE = 8192  # of a picture of MAX_PICTURE
CASES = {}


def case(words):
    """Declares a case: a function of a temporary folder that gives a node's class and the inputs that differ from its
    defaults. words: what the table says of it."""

    def declare(function):
        CASES[function.__name__] = (words, function)
        return function

    return declare


def wavy(height, width):
    """A depth map without edges."""
    y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 5, width)
    return 1 + 0.3 * torch.sin(x) * torch.cos(y)


def pictures(count, height, width):
    """One noisy picture, counted `count` times."""
    return torch.rand(1, height, width, 3).expand(count, -1, -1, -1)


def geometry(height, width, panorama=False):
    depth = wavy(height, width)[None]
    parts = {"depth": depth, "mask": depth > 0, "image": pictures(1, height, width)}
    return parts if panorama else parts | {"intrinsics": torch.tensor([[[0.9, 0, 0.5], [0, 1.2, 0.5], [0, 0, 1]]])}


def cloud(count):
    """Points that fill the view of `cameras`."""
    return PointCloud(
        torch.rand(count, 3) * torch.tensor([2, 1.5, 0.5]) + torch.tensor([-1, -0.75, 1]), torch.rand(count, 3)
    )


def cameras(count, width, height, step=0.002):
    """Cameras beside each other."""
    w2c = torch.eye(4).repeat(count, 1, 1)
    w2c[:, 0, 3] = torch.arange(count) * step
    return Cameras(w2c, pinhole(width, height, 0.9 * width).K.expand(count, 3, 3), width, height)


def scene(views, width, height, points, paths=1, deep=True):
    seen = tuple(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8) for _ in range(views))
    depths = tuple(wavy(height, width) + 0.001 * view if deep else None for view in range(views))
    taken = cameras(21, width, height), tuple(range(views))[-8:]
    names = tuple(f"view {view}" for view in range(views))
    paths = tuple(TakenPath(f"path {number}", *taken) for number in range(paths))
    return Scene(seen, cameras(views, width, height), names, depths, cloud(points), paths)


@case("Render, 33 million points, 2 frames of 4096x2048")
def render_points(folder):
    given = dict(image=pictures(1, HEIGHT, WIDTH), depth=cloud(MAX_POINTS), cameras=cameras(2, WIDTH, HEIGHT))
    return camera.WorldStereoRender, given | dict(width=WIDTH, height=HEIGHT)


@case("Render, 31 frames of 4096x2048")
def render_frames(folder):
    given = dict(image=pictures(1, HEIGHT, WIDTH), depth=cloud(100_000), cameras=cameras(31, WIDTH, HEIGHT))
    return camera.WorldStereoRender, given | dict(width=WIDTH, height=HEIGHT)


@case("Render, a frame of 4096x2048, 200 wide splats per pixel")
def render_per_pixel(folder):
    given = dict(image=pictures(1, HEIGHT, WIDTH), depth=cloud(200_000), cameras=cameras(2, WIDTH, HEIGHT))
    return camera.WorldStereoRender, given | dict(width=WIDTH, height=HEIGHT, points_per_pixel=200, radius=0.05)


@case("Render, from a picture of 8192x8192 and its depth")
def render_picture(folder):
    depth = geometry(SIDE, SIDE)
    given = dict(image=depth.pop("image"), depth=depth, cameras=cameras(2, 2880, 2880))
    return camera.WorldStereoRender, given | dict(width=2880, height=2880)


@case("Panorama of 8192x4096, a view of 4096x2048")
def panorama(folder):
    return camera.WorldStereoPanorama, dict(moge_geometry=geometry(4096, SIDE, True), width=WIDTH, height=HEIGHT)


@case("Start Scene from a picture of 8192x8192")
def start_picture(folder):
    depth = geometry(SIDE, SIDE)
    return scene_nodes.WorldStereoStartScene, dict(image=depth["image"], depth=depth, width=2880, height=2880)


@case("Start Scene from a panorama of 8192x4096, 27 views of 4096x2048")
def start_panorama(folder):
    depth = geometry(4096, SIDE, True)
    return scene_nodes.WorldStereoStartScene, dict(image=depth["image"], depth=depth, width=WIDTH, height=HEIGHT)


def path_through(views, width, height, frames, step):
    vision = SimpleNamespace(encode_image=lambda seen: SimpleNamespace(image_embeds=seen.mean((1, 2))))
    given = dict(scene=scene(views, width, height, MAX_SCENE_POINTS), image=pictures(1, height, width), references=20)
    return scene_nodes.WorldStereoScenePath, given | dict(
        cameras=cameras(frames, width, height, step), clip_vision=vision
    )


@case("Scene Path, 1000 views of 832x480, 161 cameras")
def path_views(folder):
    return path_through(1000, 832, 480, 161, 0.02)


@case("Scene Path, 47 views of 4096x2048, 21 cameras")
def path_large(folder):
    return path_through(47, WIDTH, HEIGHT, 21, 0.1)


def add(frames, width, height):
    start = scene(1, width, height, MAX_SCENE_POINTS, paths=0)
    start.cloud.points[:, 2] = 1
    depth = {
        "depth": torch.ones(1, height, width).expand(frames, -1, -1),
        "mask": torch.ones(1, height, width, dtype=torch.bool).expand(frames, -1, -1),
        "intrinsics": torch.eye(3).expand(frames, 3, 3),
    }
    given = dict(scene=start, images=pictures(frames, height, width), remember=100, max_points=MAX_SCENE_POINTS)
    return scene_nodes.WorldStereoAddToScene, given | dict(
        cameras=cameras(frames, width, height, 0.9 / frames), depth=depth
    )


@case("Add to Scene, 31 frames of 4096x2048")
def add_large(folder):
    return add(31, WIDTH, HEIGHT)


@case("Add to Scene, 600 frames of 832x480")
def add_many(folder):
    return add(600, 832, 480)


@case("Continue, views of 4096x2048")
def go_on(folder):
    return scene_nodes.WorldStereoContinue, dict(scene=scene(2, WIDTH, HEIGHT, MAX_SCENE_POINTS))


@case("Scene to Splat, 1000 views of 832x480, 4 million Gaussians")
def splat_many(folder):
    return scene_files.WorldStereoSceneToSplat, dict(scene=scene(1000, 832, 480, 1000), gaussians=MAX_SCENE_POINTS)


@case("Scene to Splat, 47 views of 4096x2048, 4 million Gaussians")
def splat_large(folder):
    return scene_files.WorldStereoSceneToSplat, dict(scene=scene(47, WIDTH, HEIGHT, 1000), gaussians=MAX_SCENE_POINTS)


@case("Scene to Splat, 4 million points, no depth")
def splat_points(folder):
    given = scene(1, 832, 480, MAX_SCENE_POINTS, deep=False)
    return scene_files.WorldStereoSceneToSplat, dict(scene=given, gaussians=MAX_SCENE_POINTS)


@case("Save Scene, 1000 views of 832x480, 50 paths")
def save_scene(folder):
    return scene_files.WorldStereoSaveScene, dict(scene=scene(1000, 832, 480, MAX_SCENE_POINTS, paths=50))


@case("Save Scene, 47 views of 4096x2048")
def save_scene_large(folder):
    return scene_files.WorldStereoSaveScene, dict(scene=scene(47, WIDTH, HEIGHT, MAX_SCENE_POINTS))


def load(folder, *saved):
    if not (child := os.fork()):  # its memory would be counted as there before
        write_scene(folder / "output" / "saved", scene(*saved))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("The scene could not be saved.")
    return scene_files.WorldStereoLoadScene, dict(folder="saved [output]")


@case("Load Scene, 1000 views of 832x480, 50 paths")
def load_scene(folder):
    return load(folder, 1000, 832, 480, MAX_SCENE_POINTS, 50)


@case("Load Scene, 47 views of 4096x2048")
def load_scene_large(folder):
    return load(folder, 47, WIDTH, HEIGHT, MAX_SCENE_POINTS)


@case("Save Camera, 10,000 cameras")
def save_camera(folder):
    return save.WorldStereoSaveCamera, dict(cameras=cameras(MAX_CAMERAS, 832, 480))


@case("Load Camera, 10,000 cameras")
def load_camera(folder):
    write_camera_json(folder / "input" / "camera.json", cameras(MAX_CAMERAS, 832, 480))
    return camera.WorldStereoLoadCamera, dict(camera="camera.json")


@case("Load Camera, a transforms.json of 40 MB")
def load_transforms(folder):
    frame = {"transform_matrix": torch.eye(4).tolist(), "file_path": "x" * 3000}
    content = {"w": 32, "h": 24, "fl_x": 30, "frames": [frame] * MAX_CAMERAS}
    (folder / "input" / "transforms.json").write_text(json.dumps(content))
    return camera.WorldStereoLoadCamera, dict(camera="transforms.json")


@case("Load Camera, COLMAP's text of 60 MB")
def load_colmap(folder):
    with open(folder / "input" / "images.txt", "w") as file:
        for number in range(MAX_CAMERAS):
            file.write(f"{number} 1 0 0 0 0 0 0 1 a{number}.png\n" + "1.5 2.5 -1 " * 550 + "\n")
    (folder / "input" / "cameras.txt").write_text("1 PINHOLE 32 24 30 30 16 12\n")
    return camera.WorldStereoLoadCamera, dict(camera="images.txt")


@case("Save Point Cloud, 33 million points")
def save_cloud(folder):
    return save.WorldStereoSavePointCloud, dict(points=cloud(MAX_POINTS))


@case("Points to 3D, 33 million points")
def points_3d(folder):
    return show.WorldStereoPointsTo3D, dict(points=cloud(MAX_POINTS))


@case("Save Frames, 3 frames of 8192x8192")
def save_frames(folder):
    return save.WorldStereoSaveFrames, dict(images=pictures(3, SIDE, SIDE), cameras=cameras(3, SIDE, SIDE))


@case("Preview Clip, 2000 frames of 832x480")
def clip_long(folder):
    return show.WorldStereoPreviewClip, dict(images=pictures(2000, 480, 832))


@case("Preview Clip, 48 frames of 8192x8192")
def clip_large(folder):
    return show.WorldStereoPreviewClip, dict(images=pictures(48, SIDE, SIDE))


@case("Preview Clip, 200 frames of 832x480 beside the render")
def clip_beside(folder):
    return show.WorldStereoPreviewClip, dict(images=pictures(200, 480, 832), render_video=pictures(200, 480, 832))


@case("Picture of 8192x8192")
def picture(folder):
    return picture_nodes.WorldStereoPicture, dict(image=pictures(1, SIDE, SIDE), model=stand_ins.model())


@case("Fly Path in the depth of a picture of 8192x8192")
def fly_path(folder):
    depth = geometry(SIDE, SIDE)
    return fly.WorldStereoFlyPath, dict(image=depth["image"], scene=depth)


@case("Fly Path in 33 million points")
def fly_points(folder):
    return fly.WorldStereoFlyPath, dict(image=pictures(1, SIDE, SIDE), scene=cloud(MAX_POINTS))


@case("Camera Path, 1000 keyframes, a picture of 8192x8192")
def camera_path(folder):
    depth = geometry(SIDE, SIDE) | {"normal": torch.rand(1, SIDE, SIDE, 3)}
    given = dict(image=depth.pop("image"), scene=depth, preset="orbit left", keyframes=1000, guess_pitch=True)
    return camera.WorldStereoCameraPath, given


@case("Conditioning, 21 frames of 3840x2160")
def conditioning(folder):
    given = dict(image=pictures(1, 2160, 3840), render_video=pictures(21, 2160, 3840), cameras=cameras(21, 3840, 2160))
    given |= dict(
        render_mask=torch.ones(1, 2160, 3840).expand(21, -1, -1), model=stand_ins.model(), vae=stand_ins.vae()
    )
    prompt = [[torch.zeros(1, 2, 8), {}]]
    return model_nodes.WorldStereoConditioning, given | dict(positive=prompt, negative=prompt)


@case("Sample Scene")
def sample_scene(folder):
    return sample.WorldStereoSampleScene, {}


def with_defaults(node, given):
    """The inputs of a node: those given, and the defaults of its widgets."""
    values = dict(given)
    for entry in node.define_schema().inputs:
        if entry.id not in given and not entry.optional:
            values[entry.id] = entry.options[0] if entry.default is None else entry.default
    return values


def bytes_of(value, found):
    """Adds to `found` the bytes of every tensor and file in memory that a value holds, by address."""
    if isinstance(value, torch.Tensor):
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, BytesIO):
        found[id(value)] = value.getbuffer().nbytes
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            bytes_of(part, found)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        bytes_of(vars(value), found)
    return found


def status(key) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def clock():
    """Seconds: by the clock, of this thread's wait for a core, and of its CPU time."""
    return time.monotonic(), int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9, time.thread_time()


def measure(name) -> dict:
    """One case, in this process."""
    core = management.throw_exception_if_processing_interrupted
    looks = []

    def look():
        if threading.current_thread() is threading.main_thread():
            caller = sys._getframe(1)
            looks.append((*clock(), f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"))
        core()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bounds-") as place, torch.inference_mode():
        folder = Path(place)
        for kind in ("input", "output", "temp"):
            (folder / kind).mkdir()
            setattr(folder_paths, f"{kind}_directory", str(folder / kind))
        torch.manual_seed(0)
        node, given = CASES[name][1](folder)
        values = with_defaults(node, given)
        node = type(
            node.__name__, (node,), {"hidden": SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None)}
        )
        for key, module in list(sys.modules.items()):
            if key.startswith("worldstereo_fp8.") and hasattr(module, "throw_exception_if_processing_interrupted"):
                module.throw_exception_if_processing_interrupted = look
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        looks.append((*clock(), "start"))
        output = node.execute(**values)
        looks.append((*clock(), "end"))
        made, inputs = bytes_of(output.args, {}), bytes_of(values, {})
        result = sum(size for place, size in made.items() if place not in inputs)
        gaps = [
            (*(b - a for a, b in zip(at[:3], later)), f"{at[3]} to {later[3]}") for at, later in zip(looks, looks[1:])
        ]
        gap, waited, cpu, where = max(gaps, key=lambda gap: gap[0] - gap[1])
        beside = status("VmHWM") - before - result
        seconds = looks[-1][0] - looks[0][0]
        times = dict(seconds=seconds, gap=gap, own=gap - waited, cpu=cpu, where=where)
        return times | dict(beside=beside / GIB, result=result / GIB)


def main() -> int:
    names = sys.argv[1:] or list(CASES)
    for name in names:
        if name not in CASES:
            sys.exit(f"There is no case {name!r}, only {', '.join(CASES)}.")
    print("| case | s | gap, s | without the wait, s | CPU, s | from look to look | beside, GiB | result, GiB | |")
    print("|---|---:|---:|---:|---:|---|---:|---:|---|")
    failed = False
    for name in names:
        row = f"| {name}: {CASES[name][0]} |"
        run = subprocess.run([sys.executable, __file__, "--measure", name], capture_output=True, text=True)
        if run.returncode:
            last = (run.stderr.strip().splitlines() or [f"ended with {run.returncode}"])[-1]
            print(f"{row} {last}", flush=True)
            failed = True
            continue
        m = json.loads(run.stdout.splitlines()[-1])
        passed = m["own"] <= SECONDS and m["beside"] <= MOST_GIB
        failed |= not passed
        print(
            f"{row} {m['seconds']:.1f} | {m['gap']:.2f} | {m['own']:.2f} | {m['cpu']:.2f} | {m['where']} | "
            f"{m['beside']:.2f} | {m['result']:.2f} | {'' if passed else 'FAILED'} |",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        sys.exit(main())
