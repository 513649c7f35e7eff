"""The benchmark of Explore Scene runs to its end, at toy size, where the server's packages and PyAV are missing; that of
the bounds measures."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXPLORE = Path(__file__).resolve().parent.parent / "benchmarks" / "explore.py"
BARE = """
import runpy, sys
for name in ("av", "aiohttp", "requests", "comfyui_frontend_package", "sqlalchemy"):
    sys.modules[name] = None
script, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, script.rpartition("explore.py")[0])
runpy.run_path(script, run_name="__main__")
"""


def test_explore_runs_without_a_server_and_without_pyav(tmp_path):
    command = [sys.executable, "-c", BARE, str(EXPLORE), "--toy", "--paths", "2", "--folder", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [line.split("|")[1:-1] for line in run.stdout.splitlines() if line.startswith(("| left", "| right"))]
    assert len(rows) == 2 and int(rows[0][1]) == 1 <= int(rows[1][1]) <= 8  # references
    for row in rows:
        whole, sampling = float(row[3]), float(row[4])
        parts = sum(float(part.split()[-1]) for part in row[6].split(","))
        assert 0 < sampling < whole and abs(sampling + parts - whole) < 0.1
        assert ", MoGe " in row[6]
    assert "33 paths:" in run.stdout and "a toy's figures" in run.stdout


def test_the_vae_is_measured_in_each_way(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vae.py", "--pictures", "1", "--size", "32x16"])
    monkeypatch.setattr(sys, "path", [str(EXPLORE.parent), *sys.path])
    monkeypatch.setattr("step.VAE_WIDTH", 8)
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXPLORE.with_name("vae.py")), run_name="__main__")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [
        (way, part)
        for part in ("encode", "decode")
        for way in ("as ComfyUI", "channels last", "channels last, fused norms")
    ]
    assert all(float(row[2]) > 0 and float(row[4]) < 0.02 for row in rows)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="it measures through Linux's /proc")
def test_a_case_of_the_bounds():
    command = [sys.executable, str(EXPLORE.with_name("bounds.py")), "--measure", "go_on"]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    picture = 2048 * 4096 * 3 * 4 / (1 << 30)
    assert measured["result"] == pytest.approx(picture, rel=0.01)
    assert 0 <= measured["own"] <= measured["gap"] <= measured["seconds"] and abs(measured["beside"]) < 1


def test_bounds_of_no_case(monkeypatch):
    package = sys.modules["worldstereo_fp8"]
    monkeypatch.setattr(sys, "argv", ["bounds.py", "nothing"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit, match="no case 'nothing', only render_points, "):
        runpy.run_path(str(EXPLORE.with_name("bounds.py")), run_name="__main__")
    assert sys.modules["worldstereo_fp8"] is package  # other tests of this process have its modules
