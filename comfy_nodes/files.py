"""Names of files in ComfyUI's folders: which ones can be chosen, and where results go."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

import folder_paths

from ..files.atomic import new_file
from ..files.text import shown
from ..fp8.files import INDEX_SUFFIX, SHARD
from ..scene.folder import KINDS

SAFETENSORS = (".safetensors", ".sft")
CAMERA_FILES = (".json", ".txt")
MAX_NAME = 200  # bytes of a file's name; file systems take 255, suffixes included
TAKEN_LIMIT, FOLDERS_LIMIT = 10_000, 2_000
TEMP_FILES = 16  # the most that are kept in a folder inside ComfyUI's temp folder


def diffusion_models() -> list[str]:
    """The safetensors files in ComfyUI's diffusion_models folders, without the shards of models in several files."""
    return [
        name
        for name in folder_paths.get_filename_list("diffusion_models")
        if name.lower().endswith(SAFETENSORS) and not SHARD.search(name)
    ]


def cook_sources() -> list[str]:
    """The files in the diffusion_models folders that can be cooked: safetensors files, and the indexes of models in
    shards."""
    files = [
        name
        for folder in folder_paths.get_folder_paths("diffusion_models")
        for name in folder_paths.recursive_search(folder, [".git"])[0]
        if name.endswith(INDEX_SUFFIX)
    ]
    return sorted({*files, *diffusion_models()})


def file_name(name: str, suffix: str) -> str:
    """A file's name with the suffix. Raises ValueError for a name that is a path on any system."""
    stem = name.removesuffix(suffix)
    if not stem.strip(". ") or PureWindowsPath(name).name != name or not name.isprintable() or _bytes(name) > MAX_NAME:
        raise ValueError(
            f"'{shown(name)}' is not a file name: give a name without a folder, of at most {MAX_NAME} bytes."
        )
    return stem + suffix


def _bytes(name: str) -> int:
    return len(name.encode("utf-8", "surrogatepass"))


def camera_files() -> list[str]:
    """The files in ComfyUI's input folder that may hold cameras."""
    with os.scandir(folder_paths.get_input_directory()) as entries:
        return sorted(
            entry.name
            for entry in entries
            if Path(entry.name).suffix.lower() in CAMERA_FILES and entry.name.isprintable() and entry.is_file()
        )


def camera_file(name: str) -> Path:
    """Where a file of `camera_files` is. Raises ValueError for any other name."""
    if name not in camera_files():
        raise ValueError(
            f"camera: {shown(repr(name))} is not a camera file in ComfyUI's input folder; upload it there."
        )
    return Path(folder_paths.get_input_directory()) / name


def prefix_of(filename_prefix: str, name: str = "filename_prefix") -> str:
    """A filename prefix in the form that core's counter understands: parts separated by "/", none of them empty or ".".
    "worldstereo" if nothing is left of the prefix. Raises ValueError for a NUL character and for names that file systems
    do not accept."""
    if "\0" in filename_prefix:
        raise ValueError(f"{name}: {shown(filename_prefix)} holds a NUL character.")
    root = "/" if filename_prefix.startswith(("/", "\\")) else ""  # which core refuses
    parts = [part for part in filename_prefix.replace("\\", "/").split("/") if part.strip() not in ("", ".")]
    if longest := max((part for part in parts if _bytes(part) > MAX_NAME), key=len, default=""):
        raise ValueError(f"{name}: {shown(longest)} is too long a name: at most {MAX_NAME} bytes are taken.")
    return root + "/".join(parts) or "worldstereo"


def check_prefix(name: str, prefix: str) -> None:
    """Raises ValueError, naming the input, for a prefix that leads outside the output folder or is no file's name."""
    output = os.path.abspath(folder_paths.get_output_directory())
    place = os.path.abspath(os.path.join(output, prefix_of(prefix, name)))
    if not Path(place).is_relative_to(output):
        raise ValueError(f"{name}: {shown(prefix)} leads outside the output folder.")


def save_output(filename_prefix: str, suffix: str, write: Callable[[Path], None]) -> tuple[Path, str]:
    """Lets `write` make a file or folder in the output folder, numbered as core's save nodes do. Returns its path and
    its subfolder. `write` must raise FileExistsError for a number that is taken, which is then skipped: nothing is
    replaced.

    Raises ValueError for a prefix that cannot be used, and what `write` raises.
    """
    prefix, output = prefix_of(filename_prefix), folder_paths.get_output_directory()
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
    except OSError as error:
        raise OSError(
            error.errno, f"filename_prefix: {shown(prefix)} cannot be a place in the output folder: {error.strerror}"
        ) from error
    except Exception as error:  # core raises a plain Exception with absolute paths in it
        raise ValueError(f"filename_prefix: {shown(filename_prefix)} leads outside the output folder.") from error
    for number in range(counter, counter + TAKEN_LIMIT):
        path = Path(folder) / f"{name}_{number:05}_{suffix}"
        try:
            write(path)
        except FileExistsError:
            continue
        return path, subfolder
    raise FileExistsError(
        f"filename_prefix: the {TAKEN_LIMIT} numbers from {shown(name)}_{counter:05}_ on are taken. Give another."
    )


def scene_folders() -> list[str]:
    """The folders in ComfyUI's output and input folders that hold a scene, as "name [output]" and "name [input]"."""
    found = []
    for kind, root in _roots().items():
        places, looked_at = [Path(root)], 0
        while places and looked_at < FOLDERS_LIMIT:
            place = places.pop()
            looked_at += 1
            if place != Path(root) and any((place / file).is_file() for file in KINDS):
                found.append(f"{place.relative_to(root).as_posix()} [{kind}]")
                continue
            # Of a folder of many files, scandir knows without a look at each which entries are folders.
            with contextlib.suppress(OSError), os.scandir(place) as entries:
                places += [
                    Path(entry) for entry in entries if entry.name[0] != "." and entry.is_dir(follow_symlinks=False)
                ]
    return sorted(name for name in found if name.isprintable())


def scene_folder(name: str) -> Path:
    """Where a folder of `scene_folders` is. Raises ValueError for any other name."""
    if name not in scene_folders():
        raise ValueError(
            f"folder: {shown(name)} is not a scene folder in ComfyUI's output or input folder. Press R and choose "
            "again."
        )
    folder, _, kind = name.rpartition(" [")
    return Path(_roots()[kind[:-1]]) / folder


def _roots() -> dict[str, str]:
    return {"output": folder_paths.get_output_directory(), "input": folder_paths.get_input_directory()}


def keep_in_temp(folder: str, content: bytes) -> dict[str, str]:
    """Writes the content to a file in a folder of ComfyUI's temp folder. The page fetches it from /view with the
    returned query. The file's name is the content's hash, so the same content is written once. The oldest files beyond
    TEMP_FILES are deleted."""
    place = Path(folder_paths.get_temp_directory()) / folder
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{hashlib.sha256(content).hexdigest()[:32]}.bin"
    if path.is_file():
        path.touch()
    else:
        with new_file(path, overwrite=True) as file:
            file.write(content)
    for old in sorted(place.glob("*.bin"), key=lambda file: file.stat().st_mtime_ns)[:-TEMP_FILES]:
        old.unlink(missing_ok=True)
    return {"filename": path.name, "subfolder": folder, "type": "temp"}
