"""Reads camera files, recognised by their content: camera.json, NeRF's transforms.json, and the text files of COLMAP
and RealEstate10K."""

import logging
import math
import re
from pathlib import Path

import torch

from ..core import throw_exception_if_processing_interrupted
from ..files import json
from ..files.regular import read_regular
from ..files.text import shown
from .cameras import MAX_SIDE, Cameras, cameras_from_json, check_count, json_size, quaternion_to_rotation, rigid_inverse

# COLMAP camera models: how many focal lengths come before cx, cy; what follows them is lens distortion.
COLMAP_FOCALS = {"SIMPLE_PINHOLE": 1, "PINHOLE": 2, "SIMPLE_RADIAL": 1, "RADIAL": 1, "OPENCV": 2, "FULL_OPENCV": 2}
REALESTATE_NUMBERS = 19  # a line
REALESTATE_HEIGHT = 720  # pixels
MAX_NAME = 1000  # characters of a picture's name by which it is sorted
MAX_LINES, MAX_LINE = 100_000, 1 << 23  # of a text file, and characters of a line of 2-D points
MAX_LENSES = 10_000  # of a cameras.txt
LENS_KEYS = ("w", "h", "fl_x", "fl_y", "cx", "cy", "camera_angle_x")  # of a transforms.json, for all or a frame
DISTORTION_KEYS = ("k1", "k2", "k3", "k4", "p1", "p2")  # the same
NERF_MODELS = (*COLMAP_FOCALS, "PERSPECTIVE")  # values of `camera_model` that are pinholes, but for distortion
OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))  # camera axes


def files_of(path: Path) -> list[Path]:
    """The files that `read_cameras` reads for a path: the file itself and, for COLMAP's images.txt, the cameras.txt
    beside it, in any case; one in the same case as images.txt is preferred."""
    intrinsics = path.with_name(re.sub("images", _cameras_in_the_same_case, path.name, flags=re.IGNORECASE))
    if path.suffix.lower() != ".txt" or intrinsics == path:
        return [path]
    beside = [entry for entry in path.parent.iterdir() if entry.name.lower() == intrinsics.name.lower()]
    beside = [entry for entry in (intrinsics, *sorted(beside)) if entry.is_file()]
    return [path, *beside[:1]]


def _cameras_in_the_same_case(images: re.Match) -> str:
    """ "cameras", "Cameras" or "CAMERAS", in the case of "images"."""
    return "CAMERAS" if images[0].isupper() else "Cameras" if images[0].istitle() else "cameras"


def read_cameras(path: str | Path, refuse_distortion: bool = False) -> tuple[Cameras, str]:
    """The cameras of a file, and what kind of file it was read as, in words.

    A JSON file with `extrinsic` is a camera.json, one with `frames` a NeRF transforms.json. A text file of 19 numbers
    per line is RealEstate10K's, any other one COLMAP's images.txt, which needs its cameras.txt beside it. Lens
    distortion is ignored with a warning, or refused where pictures of those cameras are to be used. Raises ValueError,
    which names the file and says what to do, and OSError.
    """
    path = Path(path)
    try:
        if path.suffix.lower() != ".json":
            text = _read_text(path)
            return _realestate(text) if _is_realestate(text) else _colmap(text, path, refuse_distortion)
        content = json.parse(read_regular(path, json.CAMERA_LIMIT), "It", limit=json.CAMERA_LIMIT)
        if isinstance(content, dict) and "frames" in content:
            return _nerf(content, refuse_distortion)
        return cameras_from_json(content), "camera.json"
    except (ValueError, OverflowError) as error:
        raise ValueError(f"No cameras could be read from {shown(path.name)}. {error}") from error


def picture_names(path: Path) -> list[str]:
    """The picture names in a NeRF transforms.json or COLMAP's images.txt that `read_cameras` has read, in the order of
    its cameras. Raises ValueError for a frame without one."""
    if path.suffix.lower() == ".json":
        names = [frame.get("file_path") for frame in json.read(path, limit=json.CAMERA_LIMIT)["frames"]]
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{shown(path.name)}: a frame has no `file_path`, which names its picture.")
        return names
    lines = _lines(_read_text(path))
    while not lines[0][1].strip():
        del lines[0]
    return sorted((line.split(maxsplit=9)[9] for _, line in lines[::2]), key=_natural)


def _read_text(path: Path) -> str:
    try:
        text = read_regular(path, json.CAMERA_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path.name)} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip()
    if text.count("\n") > MAX_LINES:
        raise ValueError(f"{shown(path.name)} has more than {MAX_LINES} lines; no more are read.")
    return text


def _every_so_often(entries, every=1000):
    """The entries; ComfyUI's interrupt is checked at every `every`-th."""
    for number, entry in enumerate(entries):
        if number % every == 0:
            throw_exception_if_processing_interrupted()
        yield entry


def _matrix(fx, fy, cx, cy) -> list[list[float]]:
    return [[float(fx), 0.0, float(cx)], [0.0, float(fy), float(cy)], [0.0, 0.0, 1.0]]


def _of_one_size(w2c, K, sizes, width, height) -> Cameras:
    """Cameras for pictures of width x height, from intrinsics in pixels of pictures whose (width, height) are
    `sizes`."""
    scale = torch.tensor([[width / w, height / h, 1.0] for w, h in sizes], dtype=torch.float64)
    return Cameras(w2c, torch.tensor(K, dtype=torch.float64) * scale[:, :, None], width, height)


def _is_realestate(text: str) -> bool:
    """Whether the first or the second line has RealEstate10K's 19 numbers."""
    return any(_numbers(line) for line in text.split("\n", 2)[:2])


def _numbers(line: str) -> list[float] | None:
    """The 19 numbers of a RealEstate10K line, or None."""
    fields = line.split(maxsplit=REALESTATE_NUMBERS)
    try:
        return [float(field) for field in fields] if len(fields) == REALESTATE_NUMBERS else None
    except ValueError:
        return None


def _realestate(text: str) -> tuple[Cameras, str]:
    """RealEstate10K's camera file, which CameraCtrl uses too: the video's address on the first line (or not), then one
    line per frame: time, fx, fy, cx, cy as fractions of the picture's width and height, two zeros, and the 12 numbers
    of the world-to-camera pose, row by row.

    The file does not give the picture's size. Its shape follows from the assumption that pixels are square. Raises
    ValueError.
    """
    lines = text.split("\n")
    if _numbers(lines[0]) is None:
        lines[0] = ""
    rows = []
    check_count([line for line in lines if line.strip()])
    for number, line in _every_so_often(enumerate(lines, 1)):
        if not line.strip():
            continue
        values = _numbers(line)
        if values is None:
            raise ValueError(
                f"Line {number} is not a RealEstate10K camera: {REALESTATE_NUMBERS} numbers, which are a time, fx fy "
                "cx cy, two zeros and a 3x4 pose."
            )
        rows.append(values)
    if not rows:
        raise ValueError("It holds no cameras.")
    values = torch.tensor(rows, dtype=torch.float64)
    fx, fy, cx, cy = values[:, 1:5].unbind(1)
    if not ((fx > 0) & (fy > 0) & (values[:, 1:5].abs() < 100).all(1)).all():
        raise ValueError("fx, fy, cx and cy must be fractions of the picture's width and height, fx and fy above 0.")
    height = REALESTATE_HEIGHT
    width = max(1, round(min(height * (fy[0] / fx[0]).item(), MAX_SIDE)))
    w2c = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    w2c[:, :3] = values[:, 7:].view(-1, 3, 4)
    K = torch.eye(3, dtype=torch.float64).repeat(len(rows), 1, 1)
    K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2] = fx * width, fy * height, cx * width, cy * height
    return Cameras(w2c, K, width, height), "RealEstate10K; the picture's size is not in the file, its pixels are square"


def _colmap(text: str, path: Path, refuse_distortion: bool) -> tuple[Cameras, str]:
    """COLMAP's images.txt, in which a pose line and a line of 2-D points alternate. Poses are world-to-camera in OpenCV
    axes. Raises ValueError."""
    cameras_path = files_of(path)[-1]
    if cameras_path == path:
        raise ValueError(
            "A text file must be RealEstate10K's (19 numbers per line) or COLMAP's images.txt, whose intrinsics are in "
            "cameras.txt: put both into the input folder (such as room_images.txt and room_cameras.txt) and choose the "
            "images."
        )
    intrinsics = _colmap_intrinsics(cameras_path, refuse_distortion)
    poses, lines = [], _lines(text)
    while lines and not lines[0][1].strip():
        del lines[0]
    check_count(lines[::2])
    for number, line in _every_so_often(lines[1::2]):
        if len(line) > MAX_LINE or len(line.split()) % 3:  # X, Y and the id of each point
            raise ValueError(
                f"Line {number} is not a list of 2-D points: each pose is followed by one, which may be an empty line."
            )
    for number, line in _every_so_often(lines[::2]):
        fields = line.split(maxsplit=9)
        try:
            quaternion, translation = [float(f) for f in fields[1:5]], [float(f) for f in fields[5:8]]
            camera, name = fields[8], fields[9]
        except (ValueError, IndexError):
            raise ValueError(f"Line {number} is not a COLMAP pose: ID QW QX QY QZ TX TY TZ CAMERA_ID NAME.") from None
        if camera not in intrinsics:
            raise ValueError(
                f"Line {number} names camera {shown(camera)}, which {shown(cameras_path.name)} does not hold."
            )
        poses.append((_natural(name), quaternion, translation, intrinsics[camera]))
    if not poses:
        raise ValueError("It holds no poses.")
    poses.sort(key=lambda pose: pose[0])
    w2c = torch.eye(4, dtype=torch.float64).repeat(len(poses), 1, 1)
    w2c[:, :3, :3] = quaternion_to_rotation(torch.tensor([pose[1] for pose in poses], dtype=torch.float64))
    w2c[:, :3, 3] = torch.tensor([pose[2] for pose in poses], dtype=torch.float64)
    K, sizes = zip(*(pose[3] for pose in poses))
    return _of_one_size(w2c, K, sizes, *sizes[0]), "COLMAP model, in the order of the picture names"


def _colmap_intrinsics(path: Path, refuse_distortion: bool) -> dict[str, tuple[list[list[float]], tuple[int, int]]]:
    """The intrinsic matrix and picture size of each camera id in a cameras.txt. Raises ValueError."""
    cameras: dict[str, tuple[list[list[float]], tuple[int, int]]] = {}
    name = shown(path.name)
    for number, line in _every_so_often(_lines(_read_text(path))):
        fields = line.split(maxsplit=40)  # no model has as many parameters
        if not fields:
            continue
        if len(cameras) == MAX_LENSES:
            raise ValueError(f"{name} holds more than {MAX_LENSES} cameras; no more are read.")
        camera, model, *numbers = fields if len(fields) > 1 else [*fields, ""]
        focals = COLMAP_FOCALS.get(model)
        if focals is None:
            raise ValueError(
                f"{name}, line {number}: the camera model {shown(model)} is not one of "
                f"{', '.join(COLMAP_FOCALS)}; undistort the model with COLMAP first."
            )
        try:
            width, height = (int(side[:20]) for side in numbers[:2])
            values = [float(value) for value in numbers[2:]]
            cx, cy = values[focals : focals + 2]
        except (ValueError, IndexError):
            raise ValueError(f"{name}, line {number} is not a camera: CAMERA_ID MODEL WIDTH HEIGHT PARAMS.") from None
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            raise ValueError(
                f"{name}, line {number}: the picture size {width}x{height} cannot be used; sides are 1 to {MAX_SIDE}."
            )
        if any(values[focals + 2 :]):
            _distorted(f"{name}: camera {shown(camera)}", refuse_distortion)
        cameras[camera] = _matrix(values[0], values[focals - 1], cx, cy), (width, height)
    return cameras


def _distorted(camera: str, refuse: bool) -> None:
    if refuse:
        raise ValueError(
            f"{camera} has lens distortion, and its pictures are distorted too: undistort them first, with COLMAP's "
            "image_undistorter."
        )
    logging.warning("%s has lens distortion, which is ignored: it is treated as a pinhole.", camera)


def _lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not comments, numbered from 1. Blank ones count: a COLMAP image without points has one."""
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if not line.startswith("#")]


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts frame_2 before frame_10."""
    return [(int(digits or -1), other) for digits, other in re.findall(r"(\d{1,18})|(\D+)", name[:MAX_NAME])]


def _pose(matrix) -> torch.Tensor:
    if not isinstance(matrix, list) or len(matrix) > 16:
        raise ValueError("`transform_matrix` is not a 4x4 matrix")
    return torch.tensor(matrix, dtype=torch.float64).view(4, 4)


def _nerf(content: dict, refuse_distortion: bool) -> tuple[Cameras, str]:
    """NeRF's transforms.json: camera-to-world poses in OpenGL axes; lens values of the file, or of each frame."""
    frames = content["frames"]
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError("`frames` is not a list of frames.")
    check_count(frames)
    c2w, K, sizes = [], [], []
    keys = (*LENS_KEYS, *DISTORTION_KEYS, "camera_model", "is_fisheye", "transform_matrix")
    for_all = {key: content[key] for key in keys if key in content}
    warned = False
    for number, frame in _every_so_often(enumerate(frames), 100):
        values = for_all | {key: frame[key] for key in keys if key in frame}
        model = values.get("camera_model", NERF_MODELS[0])
        if model not in NERF_MODELS or values.get("is_fisheye"):
            raise ValueError(
                f"Frame {number}: the camera model {shown('fisheye' if model in NERF_MODELS else model)} is not one of "
                f"{', '.join(NERF_MODELS)}; undistort the pictures first."
            )
        if not warned and any(values.get(key) for key in DISTORTION_KEYS):
            _distorted(f"Frame {number}", refuse_distortion)
            warned = True
        try:
            c2w.append(_pose(values["transform_matrix"]))
            width, height = json_size(values["w"], "w"), json_size(values["h"], "h")
            fx = values["fl_x"] if "fl_x" in values else width / 2 / math.tan(values["camera_angle_x"] / 2)
            K.append(_matrix(fx, values.get("fl_y", fx), values.get("cx", width / 2), values.get("cy", height / 2)))
        except KeyError as error:
            raise ValueError(
                f"Frame {number} has no `{error.args[0]}`: it needs a 4x4 `transform_matrix`, the picture "
                "size `w`, `h` and the lens, `fl_x` or `camera_angle_x`; size and lens may be given once for "
                "the whole file."
            ) from None
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"Frame {number} holds a value that cannot be used: {shown(error)}.") from None
        sizes.append((width, height))
    c2w = torch.stack(c2w) @ OPENGL_TO_OPENCV
    cameras = _of_one_size(c2w, K, sizes, *sizes[0])  # checks that the poses are rigid
    return (
        Cameras(rigid_inverse(c2w), cameras.K, cameras.width, cameras.height),
        "NeRF transforms.json, camera axes converted from OpenGL (y up, z back) to OpenCV; the world is unchanged",
    )
