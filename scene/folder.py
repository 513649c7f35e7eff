"""A scene as a folder: complete for this pack, and readable by others.

    scene.json, scene.safetensors      everything but the pictures, exactly: names, cameras, depths, cloud, paths
    images/0000_NAME.png               the views
    cameras.json                       WorldMirror's: camera-to-world, intrinsics in pixels
    transforms.json, cloud.ply         nerfstudio's: OpenGL camera axes; the cloud in the same world
    sparse/0/{cameras,images,points3D}.txt   COLMAP's text model

gsplat, nerfstudio, Brush and Postshot can train on it unchanged. Folders of these kinds by other programs are read too.
"""

import array
import json
import os
import re
from collections.abc import Callable
from io import BufferedReader, BytesIO
from pathlib import Path

import numpy as np
import safetensors
import torch
from PIL import Image

from ..core import throw_exception_if_processing_interrupted
from ..files import json as bounded_json
from ..files.atomic import new_folder
from ..files.regular import open_regular, read_regular
from ..files.text import shown
from . import camera_files
from .cameras import Cameras, rigid_inverse, rotation_to_quaternion
from .fuse import thin_by_voxels
from .pictures import MAX_PICTURE, as_bytes, write_png
from .pointcloud import PLY_POINTS, PointCloud, read_ply, world_mirror, write_ply
from .scene import MAX_PIXELS, MAX_POINTS, MAX_VIEWS, Scene, TakenPath
from .stop import pieces, stoppable

VERSION = 1
COLMAP_POINTS = 200_000  # in points3D.txt; a larger cloud is thinned there, cloud.ply has all points
MAX_PATHS, MAX_CAMERAS = 1000, 100_000
HEADER_LIMIT = 4 << 20  # bytes of scene.safetensors' header
TEXT_LIMIT, MAX_LINE = 1 << 30, 1 << 20  # bytes of a points3D.txt and of a line of it, the point's track included
READ_AT_ONCE, FLOATS_AT_ONCE = 1 << 18, 1 << 22  # bytes read and numbers written between two checks for an interrupt
LINES_AT_ONCE = 10_000
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Pillow goes by the content: PostScript, in a file of any name, it would hand to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP")
PICTURE_BYTES = 1 << 29  # of a file
KINDS = ("scene.json", "transforms.json", "cameras.json", "sparse/0/images.txt", "sparse/images.txt", "images.txt")


def write_scene(folder: Path, scene: Scene, progress: Callable[[int], None] = lambda views: None) -> None:
    """Writes the scene as a new folder, which appears only when it is complete. progress(1) is called after every view.

    Raises FileExistsError if the name is taken, and OSError, naming the folder and the cause.
    """
    files = [_picture_file(number, name) for number, name in enumerate(scene.names)]
    with new_folder(folder) as new:
        (new / "images").mkdir()
        for file, picture in zip(files, scene.pictures):
            write_png(new / "images" / file, picture)
            progress(1)
        _write_tensors(new / "scene.safetensors", scene)
        _write_json(new / "scene.json", _content(scene))
        stems = [Path(file).stem for file in files]
        c2w = rigid_inverse(scene.cameras.w2c.double())
        _write_json(new / "cameras.json", world_mirror(stems, c2w, scene.cameras.K))
        _write_json(new / "transforms.json", _nerfstudio(files, c2w, scene.cameras))
        with open(new / "cloud.ply", "wb") as ply:
            write_ply(ply, scene.cloud, y_up=False)
        _write_colmap(new / "sparse" / "0", files, scene)


def read_scene(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[Scene, str]:
    """The scene in a folder, and what kind of folder it was read as, in words. A scene that `write_scene` wrote comes
    back exactly.

    Other folders need WorldMirror's cameras.json (or one of name: {extrinsic, intrinsic}), nerfstudio's transforms.json
    or COLMAP's text model, and the pictures beside it or in images/. They give views without depth, and the points of
    points3D.txt or a PLY if there is one. progress(done, total) is called with the bytes of pictures and points. Raises
    ValueError, which names the file and says what to do.
    """
    folder = Path(folder)
    kind = next((kind for kind in KINDS if (folder / kind).is_file()), None)
    if kind is None:
        raise ValueError(
            f"{shown(folder.name)} is not a scene folder: it has none of scene.json, cameras.json, transforms.json and "
            "sparse/0/images.txt."
        )
    _refuse_link_outside(folder, folder / kind)
    if kind == "scene.json":
        return _read_own(folder, progress), "a saved scene"
    paths, cameras, words = _READERS[Path(kind).name](folder, folder / kind)
    if len(paths) > MAX_VIEWS:
        raise ValueError(f"{kind} lists {len(paths)} pictures; a scene holds at most {MAX_VIEWS}.")
    if points := _points_beside(folder, (folder / kind).parent):
        _refuse_link_outside(folder, points)
    step = _steps(progress, [*paths, points] if points else paths)
    pictures: list[torch.Tensor] = []
    for path in paths:
        size = pictures[0].shape[1::-1] if pictures else None
        pictures.append(stoppable(_read_picture, path, size, len(paths)))
        step(path.stat().st_size)
    height, width = pictures[0].shape[:2]
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{number:04}_{name}" for number, name in enumerate(names)]
    cloud = PointCloud(torch.zeros(0, 3), torch.zeros(0, 3)) if points is None else _read_points(points, step)
    return Scene(tuple(pictures), cameras.scaled_to(width, height), tuple(names), (None,) * len(names), cloud), words


def _picture_file(number: int, name: str) -> str:
    return f"{number:04}_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:80]}.png"


def _write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _content(scene: Scene) -> dict:
    return {
        "format": "worldstereo scene",
        "version": VERSION,
        "width": scene.cameras.width,
        "height": scene.cameras.height,
        "names": list(scene.names),
        "depths": [depth is not None for depth in scene.depths],
        "points": len(scene.cloud),
        "paths": [
            {
                "name": path.name,
                "views": list(path.views),
                "cameras": len(path.cameras),
                "width": path.cameras.width,
                "height": path.cameras.height,
            }
            for path in scene.paths
        ],
    }


def _write_tensors(path: Path, scene: Scene) -> None:
    tensors = {"w2c": scene.cameras.w2c, "K": scene.cameras.K}
    tensors |= {"cloud.points": scene.cloud.points, "cloud.colors": scene.cloud.colors}
    tensors |= {f"depth.{view}": depth for view, depth in enumerate(scene.depths) if depth is not None}
    for number, taken in enumerate(scene.paths):
        tensors |= {f"path.{number}.w2c": taken.cameras.w2c, f"path.{number}.K": taken.cameras.K}
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:  # the library's own writer first makes a copy of all tensors
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            for part in tensor.float().contiguous().view(-1).split(FLOATS_AT_ONCE):
                throw_exception_if_processing_interrupted()
                file.write(part.numpy().astype("<f4", copy=False))


def _nerfstudio(files, c2w, cameras: Cameras) -> dict:
    poses = (c2w @ camera_files.OPENGL_TO_OPENCV).tolist()
    return {
        "camera_model": "PINHOLE",
        "w": cameras.width,
        "h": cameras.height,
        "ply_file_path": "cloud.ply",
        "frames": [
            {
                "file_path": f"images/{file}",
                "fl_x": K[0][0],
                "fl_y": K[1][1],
                "cx": K[0][2],
                "cy": K[1][2],
                "transform_matrix": pose,
            }
            for file, pose, K in zip(files, poses, cameras.K.tolist())
        ],
    }


def _write_colmap(folder: Path, files, scene: Scene) -> None:
    folder.mkdir(parents=True)
    lenses: dict[tuple, int] = {}
    poses: list[str] = []
    w2c = scene.cameras.w2c.double()
    quaternions = rotation_to_quaternion(w2c[:, :3, :3]).tolist()
    for number, (file, q, t, K) in enumerate(
        zip(files, quaternions, w2c[:, :3, 3].tolist(), scene.cameras.K.tolist()), 1
    ):
        lens = (K[0][0], K[1][1], K[0][2], K[1][2])
        camera = lenses.setdefault(lens, len(lenses) + 1)
        poses.append(f"{number} {' '.join(map(repr, [*q, *t]))} {camera} {file}\n\n")
    size = f"{scene.cameras.width} {scene.cameras.height}"
    cameras = [f"{camera} PINHOLE {size} {' '.join(map(repr, lens))}\n" for lens, camera in lenses.items()]
    (folder / "cameras.txt").write_text("# CAMERA_ID MODEL WIDTH HEIGHT FX FY CX CY\n" + "".join(cameras), "utf-8")
    (folder / "images.txt").write_text(
        "# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of 2-D points (none)\n" + "".join(poses), "utf-8"
    )
    keep, _ = thin_by_voxels(scene.cloud.points, COLMAP_POINTS)
    with open(folder / "points3D.txt", "w", encoding="utf-8") as file:
        file.write("# POINT3D_ID X Y Z R G B ERROR TRACK (none)\n")
        for part in pieces(len(keep), LINES_AT_ONCE):
            points = scene.cloud.points[keep[part]].tolist()
            colors = as_bytes(scene.cloud.colors[keep[part]]).tolist()
            for number, ((x, y, z), (r, g, b)) in enumerate(zip(points, colors), part.start + 1):
                file.write(f"{number} {x:.7g} {y:.7g} {z:.7g} {r} {g} {b} 0\n")


def _read_own(folder: Path, progress) -> Scene:
    content = bounded_json.read(folder / "scene.json", limit=bounded_json.CAMERA_LIMIT)
    try:
        if content["format"] != "worldstereo scene" or content["version"] != VERSION:
            raise ValueError(
                f"its format and version are {shown(content['format'])} {shown(content['version'])}; this pack reads "
                f"version {VERSION}. Update it"
            )
        names, has_depth, paths = content["names"], content["depths"], content["paths"]
        width, height, points = (_whole(content, key) for key in ("width", "height", "points"))
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("`names` is not a list of names")
        count = len(names)
        if not (0 < count <= MAX_VIEWS and count * width * height <= MAX_PIXELS and points <= MAX_POINTS):
            raise ValueError(f"{count} views of {width}x{height} and {points} points are more than a scene holds")
        if not (isinstance(has_depth, list) and len(has_depth) == count):
            raise ValueError("`depths` does not say for each view whether it has one")
        if not (isinstance(paths, list) and len(paths) <= MAX_PATHS):
            raise ValueError(f"`paths` is not a list of at most {MAX_PATHS} paths")
        lengths = [_whole(path, "cameras") for path in paths]
        sizes = [(_whole(path, "width"), _whole(path, "height")) for path in paths]
        views = [tuple(path["views"]) for path in paths]
        if sum(lengths) > MAX_CAMERAS or not all(
            type(v) is int and 0 <= v < count for numbers in views for v in numbers
        ):
            raise ValueError("its paths name views that are not there, or too many cameras")
        path_names = [path["name"] for path in paths]
        if not all(isinstance(name, str) for name in path_names):
            raise ValueError("a path has no name")
    except KeyError as error:
        raise ValueError(f"scene.json cannot be read as a scene: it has no {shown(error)}.") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"scene.json cannot be read as a scene: {shown(error, 300)}.") from error

    shapes = {"w2c": (count, 4, 4), "K": (count, 3, 3), "cloud.points": (points, 3), "cloud.colors": (points, 3)}
    shapes |= {f"depth.{view}": (height, width) for view, there in enumerate(has_depth) if there}
    for number, length in enumerate(lengths):
        shapes |= {f"path.{number}.w2c": (length, 4, 4), f"path.{number}.K": (length, 3, 3)}
    files = [folder / "images" / _picture_file(number, name) for number, name in enumerate(names)]
    for file in (folder / "scene.safetensors", *files):
        _refuse_link_outside(folder, file)
    step = _steps(progress, [folder / "scene.safetensors", *files])
    tensors = _read_tensors(folder / "scene.safetensors", shapes)
    step((folder / "scene.safetensors").stat().st_size)
    pictures = []
    for file in files:
        pictures.append(stoppable(_read_picture, file, (width, height), count))
        step(file.stat().st_size)
    try:
        taken = tuple(
            TakenPath(name, Cameras(tensors[f"path.{n}.w2c"], tensors[f"path.{n}.K"], *size), numbers)
            for n, (name, size, numbers) in enumerate(zip(path_names, sizes, views))
        )
        return Scene(
            tuple(pictures),
            Cameras(tensors["w2c"], tensors["K"], width, height),
            tuple(names),
            tuple(tensors.get(f"depth.{view}") for view in range(count)),
            PointCloud(tensors["cloud.points"], tensors["cloud.colors"]),
            taken,
        )
    except ValueError as error:
        raise ValueError(f"The scene in {shown(folder.name)} is inconsistent. {error}") from error


def _whole(content, key) -> int:
    value = content[key]
    if type(value) is not int or not 0 <= value <= 1 << 31:
        raise ValueError(f"`{key}` is {shown(value)}")
    return value


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    try:
        with open_regular(path) as file:
            header = int.from_bytes(file.read(8), "little")
        if header > HEADER_LIMIT:
            raise ValueError(f"its header has {header} bytes")
        with safetensors.safe_open(path, "pt") as file:
            there = set(file.keys())
            tensors = {}
            for name, shape in shapes.items():
                throw_exception_if_processing_interrupted()
                if name not in there:
                    raise ValueError(f"it has no tensor {name}")
                part = file.get_slice(name)
                if tuple(part.get_shape()) != shape or part.get_dtype() != "F32":
                    raise ValueError(
                        f"its tensor {name} is {part.get_dtype()} {part.get_shape()}, not F32 {list(shape)}"
                    )
                tensors[name] = file.get_tensor(name).clone()  # not memory-mapped: the file may be deleted
        return tensors
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path.name} does not belong to its scene.json or is damaged: {shown(error, 300)}. Save the scene again."
        ) from error


def _read_picture(path: Path, size, count: int) -> torch.Tensor:
    """A picture, uint8 [H, W, 3]. size: the width and height that it must have, or None. Raises ValueError."""
    try:
        with _opened(path) as image:
            if size is not None and image.size != tuple(size):
                raise ValueError(
                    f"it is {image.width}x{image.height} and the others {size[0]}x{size[1]}; all must have the same "
                    "size"
                )
            if image.width * image.height > MAX_PICTURE:
                raise ValueError(f"it is {image.width}x{image.height}; at most {MAX_PICTURE >> 20} megapixels are read")
            if image.width * image.height * count > MAX_PIXELS:
                raise ValueError(f"{count} pictures of {image.width}x{image.height} are more than a scene holds")
            return torch.from_numpy(np.array(image.convert("RGB")))
    except FileNotFoundError:
        raise ValueError(f"The picture {shown(path.name)} is missing from {shown(path.parent.name)}.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"The picture {shown(path.name)} cannot be used: {shown(error, 300)}.") from error


def _opened(path: Path) -> Image.Image:
    """A picture, from memory: a file's read makes room for as many bytes as a spoilt PNG says that follow, up to 4 GB."""
    return Image.open(BytesIO(read_regular(path, PICTURE_BYTES)), formats=FORMATS)


def _picture(folder: Path, name: str, where: str) -> Path:
    """The picture with this name, with or without suffix, in the folder or its images/. Raises ValueError."""
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f"{where} names a picture {shown(name)}, which is not a file name.")
    root = folder.resolve()
    for base in (folder, folder / "images"):
        for suffix in ("", *PICTURES):
            path = base / (name + suffix)
            if path.suffix.lower() in PICTURES and _is_file(path):
                if not path.resolve().is_relative_to(root):
                    raise ValueError(f"{where} names a picture outside its folder: {shown(name)}.")
                return path
    raise ValueError(f"The picture {shown(name)} that {where} names is neither in its folder nor in images/ there.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a longer name than any file's
        return False


def _refuse_link_outside(folder: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{shown(path.name)} is a link to a file outside {shown(folder.name)}: put the file itself there."
        )


def _read_cameras_json(folder: Path, path: Path):
    content = bounded_json.read(path, limit=bounded_json.CAMERA_LIMIT)
    try:
        if isinstance(content, dict) and isinstance(content.get("extrinsics"), list):
            intrinsics = {entry["camera_id"]: entry["matrix"] for entry in content["intrinsics"]}
            names = [entry["camera_id"] for entry in content["extrinsics"]]
            poses = rigid_inverse(
                torch.tensor([entry["matrix"] for entry in content["extrinsics"]], dtype=torch.float64).view(-1, 4, 4)
            )
            K, words = [intrinsics[name] for name in names], "WorldMirror cameras"
        else:
            names = sorted(content)
            poses = torch.tensor([content[name]["extrinsic"] for name in names], dtype=torch.float64).view(-1, 4, 4)
            K, words = [content[name]["intrinsic"] for name in names], "a bank of views"
        K = torch.tensor(K, dtype=torch.float64).view(-1, 3, 3)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise ValueError(
            "cameras.json is neither WorldMirror's (extrinsics and intrinsics, each a list of camera_id and matrix) "
            f"nor one of name: {{extrinsic, intrinsic}}: {shown(error)}."
        ) from error
    if not names:
        raise ValueError("cameras.json holds no cameras.")
    paths = [_picture(folder, name, "cameras.json") for name in names[: MAX_VIEWS + 1]]
    width, height = _size(paths[0])
    try:
        return paths, Cameras(poses[: len(paths)], K[: len(paths)], width, height), words
    except ValueError as error:
        raise ValueError(f"No cameras could be read from cameras.json. {error}") from error


def _size(path: Path) -> tuple[int, int]:
    try:
        with _opened(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"The picture {shown(path.name)} cannot be used: {shown(error, 300)}.") from error


def _read_named(folder: Path, path: Path):
    """nerfstudio's and COLMAP's files, whose cameras `camera_files` reads."""
    cameras, words = camera_files.read_cameras(path, refuse_distortion=True)
    names = camera_files.picture_names(path)
    return [_picture(folder, name, path.name) for name in names], cameras, words


_READERS = {"cameras.json": _read_cameras_json, "transforms.json": _read_named, "images.txt": _read_named}


def _points_beside(folder: Path, model: Path) -> Path | None:
    """COLMAP's points3D.txt, or a PLY in the folder; None where there is neither."""
    names = ("cloud.ply", "sparse_pc.ply", "points3D.ply", "points.ply")
    places = [model / "points3D.txt", *(place / name for name in names for place in (folder, model))]
    return next((place for place in places if place.is_file()), None)


def _read_points(path: Path, step: Callable[[int], None]) -> PointCloud:
    if path.suffix == ".txt":
        return _thinned(_colmap_points(path, step))
    cloud = read_ply(path)
    step(path.stat().st_size)
    return _thinned(cloud)


def _steps(progress: Callable[[int, int], None], paths) -> Callable[[int], None]:
    """A function step(bytes) to call after each part of these files: it reports the sum, and raises if the user has
    pressed stop."""
    total, done = sum(path.stat().st_size for path in paths if path.exists()), 0

    def step(size: int):
        nonlocal done
        throw_exception_if_processing_interrupted()
        done += size
        progress(done, total)

    return step


def _thinned(cloud: PointCloud) -> PointCloud:
    keep, _ = thin_by_voxels(cloud.points, MAX_POINTS)
    return PointCloud(cloud.points[keep], cloud.colors[keep])


def _colmap_points(path: Path, step: Callable[[int], None]) -> PointCloud:
    numbers = array.array("f")  # a list of rows would take several times the memory
    with open_regular(path) as raw:
        if (size := os.fstat(raw.fileno()).st_size) > TEXT_LIMIT:
            raise ValueError(f"points3D.txt has {size} bytes; more than {TEXT_LIMIT} are not read.")
        read, line_number, file = 0, 0, BufferedReader(raw, 1 << 20)
        while line := file.readline(MAX_LINE):
            read, line_number = read + len(line), line_number + 1
            if read > READ_AT_ONCE:
                step(read)
                read = 0
            row = line.split(maxsplit=7)[1:7]
            if line.startswith(b"#") or not line.strip():
                continue
            try:
                if len(row) != 6 or len(line) == MAX_LINE:
                    raise ValueError
                numbers.extend(map(float, row))
            except ValueError:
                raise ValueError(
                    f"points3D.txt, line {line_number} is not a point: POINT3D_ID X Y Z R G B ERROR TRACK, in at most "
                    f"{MAX_LINE} bytes."
                ) from None
            if len(numbers) > 6 * PLY_POINTS:
                raise ValueError(f"points3D.txt holds more than {PLY_POINTS} points; no more are read.")
    step(read)
    values = torch.frombuffer(numbers, dtype=torch.float32).view(-1, 6) if numbers else torch.zeros(0, 6)
    try:
        return PointCloud(values[:, :3].contiguous(), (values[:, 3:] / 255).clamp_(0, 1))
    except ValueError as error:
        raise ValueError(f"points3D.txt cannot be used. {error}") from error


def stamp(folder: Path) -> list[int]:
    """The modification times of the files that a folder's scene is read from, as a cache key."""
    files = [folder / name for name in (*KINDS, "scene.safetensors", "images")]
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in files]
