"""What dev.py does to files, without downloading anything."""

import importlib.util
import io
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def dev(monkeypatch, tmp_path):
    """dev.py as a module whose checkout is tmp_path/custom_nodes/pack."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    checkout = tmp_path / "custom_nodes" / "pack"
    checkout.mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", checkout)
    monkeypatch.setattr(module, "DEV", checkout / ".dev")
    for stamp in ("STAMP", "LINT_STAMP"):
        monkeypatch.setattr(module, stamp, checkout / ".dev" / stamp)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return module


def test_whose_comfyui(dev, monkeypatch, tmp_path):
    assert dev.find_own_comfyui() is None
    (tmp_path / "main.py").touch()
    assert dev.find_own_comfyui() == tmp_path

    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(other))
    with pytest.raises(SystemExit, match="no main.py"):
        dev.find_own_comfyui()
    (other / "main.py").touch()
    assert dev.find_own_comfyui() == other


def test_link_is_made_once(dev, tmp_path):
    comfyui = dev.DEV / "ComfyUI"
    (comfyui / "custom_nodes").mkdir(parents=True)
    dev.link_pack(comfyui)
    dev.link_pack(comfyui)
    (link,) = (comfyui / "custom_nodes").iterdir()
    assert link.name == dev.PACK and link.resolve() == dev.ROOT
    dev.link_pack(tmp_path)  # the checkout lies there already
    assert [entry.name for entry in (tmp_path / "custom_nodes").iterdir()] == ["pack"]


def test_another_copy_in_the_place_of_the_link(dev, tmp_path):
    link = tmp_path / "ComfyUI" / "custom_nodes" / dev.PACK
    link.mkdir(parents=True)
    with pytest.raises(SystemExit, match="is another copy of this pack"):
        dev.link_pack(tmp_path / "ComfyUI")
    link.rmdir()
    link.symlink_to(tmp_path / "gone")  # a link to a checkout that is no more is replaced
    dev.link_pack(tmp_path / "ComfyUI")
    assert link.resolve() == dev.ROOT


def test_windows_without_symbolic_links_gets_a_junction(dev, monkeypatch, tmp_path):
    commands = []

    def refuse(*_, **__):
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(dev.Path, "symlink_to", refuse)
    monkeypatch.setattr(dev.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(dev, "WINDOWS", True)
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    dev.link_pack(tmp_path / "ComfyUI")
    link = tmp_path / "ComfyUI" / "custom_nodes" / dev.PACK
    assert commands == [["cmd", "/c", "mklink", "/J", str(link), str(dev.ROOT)]]


def test_comfyui_is_taken_out_of_the_archive_and_nothing_else(dev, monkeypatch, tmp_path):
    def pip(*arguments):
        assert "--require-hashes" in arguments
        with tarfile.open(Path(arguments[arguments.index("-d") + 1]) / "comfy.tar.gz", "w:gz") as archive:
            for name in ("c-1/vendor/ComfyUI/main.py", "c-1/vendor/ComfyUI/comfy/sd.py", "c-1/setup.py",
                         "c-1/vendor/ComfyUI/../../../escaped.py"):  # fmt: skip
                member = tarfile.TarInfo(name)
                member.size = len(name)
                archive.addfile(member, io.BytesIO(name.encode()))

    monkeypatch.setattr(dev, "pip", pip)
    dev.download_comfyui(dev.DEV / "ComfyUI")
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    prefix = "custom_nodes/pack/.dev/ComfyUI"
    assert sorted(files) == [f"{prefix}/comfy/sd.py", f"{prefix}/main.py"]


def test_missing_packages(dev, tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("pytest>=1\n# a comment\nno-such-package~=1.0\ntorch\n", "utf-8")
    assert dev.missing_packages(sys.executable, requirements) == ["no-such-package"]


def test_files_of_tests_run_side_by_side_unless_told_otherwise(dev):
    assert dev.parallel(["tests/test_dev.py", "-k", "side"])[:4] == [
        "-n",
        str(dev.TEST_PROCESSES),
        "--dist",
        "loadfile",
    ]
    for chosen in (["-n", "3"], ["-n0"], ["--numprocesses=2"], ["--pdb"]):
        assert dev.parallel(chosen) == []


def test_lint_runs_every_check_and_fails_if_one_does(dev, monkeypatch):
    ran, failing = [], "ruff format"

    def run(command, cwd):
        assert command[:2] == [str(dev.VENV_PYTHON), "-m"] and cwd == dev.ROOT
        ran.append(" ".join(command[2:]))
        return dev.subprocess.CompletedProcess(command, int(bool(failing) and ran[-1].startswith(failing)))

    dev.DEV.mkdir()
    monkeypatch.setattr(dev, "create_venv", lambda: None)
    monkeypatch.setattr(dev, "pip", lambda *arguments: None)
    monkeypatch.setattr(dev.subprocess, "run", run)
    assert dev.lint() == 1 and ran == ["ruff check .", "ruff format --check .", "mypy"]
    assert (dev.DEV / "lint" / "worldstereo_fp8").resolve() == dev.ROOT
    failing = ""
    assert dev.lint() == 0


def test_the_lint_tools_are_installed_again_when_their_requirements_change(dev, monkeypatch, tmp_path):
    installed = []
    dev.DEV.mkdir()
    requirements, python = tmp_path / "requirements-lint.txt", tmp_path / "python"
    monkeypatch.setattr(dev, "LINT_REQUIREMENTS", requirements)
    monkeypatch.setattr(dev, "VENV_PYTHON", python)
    monkeypatch.setattr(dev, "create_venv", python.touch)
    monkeypatch.setattr(dev, "pip", lambda *arguments: installed.append(requirements.read_text("utf-8")))
    monkeypatch.setattr(dev.subprocess, "run", lambda command, cwd: dev.subprocess.CompletedProcess(command, 0))
    for pinned in ("ruff==1", "ruff==1", "ruff==2", "ruff==2"):
        requirements.write_text(pinned, "utf-8")
        assert dev.lint() == 0
    assert installed == ["ruff==1", "ruff==2"]
    python.unlink()  # the virtual environment was deleted
    assert dev.lint() == 0 and len(installed) == 3


def test_the_tests_tools_are_installed_again_when_their_requirements_change(dev, monkeypatch, tmp_path):
    installed = []
    dev.DEV.mkdir()
    requirements, python = tmp_path / "requirements.txt", tmp_path / "python"
    (dev.DEV / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    (dev.DEV / "ComfyUI" / "main.py").touch()
    monkeypatch.setattr(dev, "TEST_REQUIREMENTS", requirements)
    monkeypatch.setattr(dev, "VENV_PYTHON", python)
    monkeypatch.setattr(dev, "create_venv", python.touch)
    monkeypatch.setattr(dev, "pip", lambda *arguments: installed.append(requirements.read_text("utf-8")))
    for pinned in ("pytest==1", "pytest==1", "pytest==2"):
        requirements.write_text(pinned, "utf-8")
        assert dev.set_up() == (dev.DEV / "ComfyUI", str(python))
    assert installed == ["pytest==1", "pytest==2"]


def test_a_new_virtual_environment_has_nothing_of_the_one_before(dev, monkeypatch):
    python = dev.DEV / "venv" / "python"
    python.parent.mkdir(parents=True)
    monkeypatch.setattr(dev, "VENV_PYTHON", python)
    monkeypatch.setattr(dev.venv, "create", lambda folder, with_pip: python.touch())
    for stamp in (dev.STAMP, dev.LINT_STAMP):
        stamp.write_text("installed", "utf-8")
    python.touch()
    dev.create_venv()
    assert dev.is_stamped(dev.STAMP, "installed") and dev.is_stamped(dev.LINT_STAMP, "installed")
    python.unlink()  # the virtual environment was deleted; lint and tests each make a new one
    dev.create_venv()
    assert python.is_file()
    assert not dev.is_stamped(dev.STAMP, "installed") and not dev.is_stamped(dev.LINT_STAMP, "installed")
