"""Names of files in ComfyUI's folders: what can be chosen, and where results go."""

import hashlib
from pathlib import Path, PureWindowsPath

import folder_paths

from ..files.atomic import new_file
from ..files.text import shown
from ..fp8.files import INDEX_SUFFIX, SHARD

SAFETENSORS = (".safetensors", ".sft")
CAMERA_FILES = (".json", ".txt")
MAX_NAME = 200  # characters of a file's name; file systems take 255 bytes, suffixes included
TEMP_FILES = 16  # kept in one folder of the temp folder


def diffusion_models() -> list[str]:
    """The safetensors files in ComfyUI's diffusion_models folders, but for the shards of models in several files."""
    return [
        name
        for name in folder_paths.get_filename_list("diffusion_models")
        if name.lower().endswith(SAFETENSORS) and not SHARD.search(name)
    ]


def cook_sources() -> list[str]:
    """What in the diffusion_models folders can be cooked: safetensors files, and the index of a model in shards."""
    files = [
        name
        for folder in folder_paths.get_folder_paths("diffusion_models")
        for name in folder_paths.recursive_search(folder, [".git"])[0]
        if name.endswith(INDEX_SUFFIX)
    ]
    return sorted({*files, *diffusion_models()})


def file_name(name: str, suffix: str) -> str:
    """A file's name with the suffix. Raises ValueError for one that has path parts, on any system."""
    stem = name.removesuffix(suffix)
    if not stem.strip(". ") or PureWindowsPath(name).name != name or not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(
            f"'{shown(name)}' is no file name: give a name alone, without a folder, of at most {MAX_NAME} characters."
        )
    return stem + suffix


def camera_files() -> list[str]:
    """The files in ComfyUI's input folder that may hold cameras."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in CAMERA_FILES and path.is_file())


def camera_file(name: str) -> Path:
    """Where a file of `camera_files` is. Raises ValueError for any other name."""
    if name not in camera_files():
        raise ValueError(f"camera: {name!r} is no camera file in ComfyUI's input folder; upload it there.")
    return Path(folder_paths.get_input_directory()) / name


def new_output(filename_prefix: str, suffix: str) -> tuple[Path, str]:
    """A path in the output folder that does not exist yet, numbered as core's savers do, and its subfolder."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    return Path(folder) / f"{name}_{counter:05}_{suffix}", subfolder


def keep_in_temp(folder: str, content: bytes) -> dict[str, str]:
    """Keeps the content as a file in a folder of ComfyUI's temp folder, for the web page to fetch from /view with the
    returned query. The name is the content's hash, so that the same content is written once. The oldest files beyond
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
