"""Makes ComfyUI and this pack importable, and holds what tests share."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import requests

TESTS = Path(__file__).resolve().parent
sys.path.append(str(TESTS.parent))

import standalone

sys.path.insert(0, str(TESTS))  # the tests' own helpers

from forker import Forker
from web_page import page_of

ANY_PROMPT = {
    "1": {"class_type": "PrimitiveInt", "inputs": {"value": 0}},
    "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
}
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}


def pytest_configure(config):
    # Not in a process that leaves the tests to others: the imports take seconds.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.comfyui = standalone.import_all()


@pytest.fixture(scope="session")
def shared_server(pytestconfig, tmp_path_factory):
    from worldstereo_fp8.demo.server import Server

    with Server(pytestconfig.comfyui, tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")
def comfyui(shared_server, request):
    """A ComfyUI server as it is after its start, with the files that the module's `prepare(base)` makes.

    Starting one takes longer than most tests. So each process of tests has one, and each module begins with its
    folders and its cache empty.
    """
    requests.post(f"http://{shared_server.address}/free", json={"free_memory": True}, timeout=60).raise_for_status()
    shared_server.run(ANY_PROMPT)  # ComfyUI may empty its cache only after the next run
    base = shared_server.base
    for path in (base / "models").rglob("*"):
        if path.is_file():  # ComfyUI wants the folders that it has seen to stay
            path.unlink()
    for folder in ("input", "output", "temp", "user/default"):
        shutil.rmtree(base / folder, ignore_errors=True)
        (base / folder).mkdir(parents=True)
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(SETTINGS), "utf-8")
    request.module.prepare(base)
    return shared_server


@pytest.fixture(scope="session")
def forker():
    """Runs Python code in forks of a process that has made the imports."""
    if not hasattr(os, "fork"):
        pytest.skip("Windows has no fork")
    with Forker() as running:
        yield running


@pytest.fixture(scope="module")
def page_and_errors(comfyui, request):
    errors = []
    with page_of(comfyui, errors, getattr(request.module, "WEBGL", False)) as page:
        yield page, errors


@pytest.fixture
def page(page_and_errors):
    """ComfyUI's web page, which takes seconds to open: a module's tests share it. With WebGL if the module says so."""
    return page_and_errors[0]


@pytest.fixture
def errors(page_and_errors):
    """What the page reports from now on: console errors and exceptions."""
    page_and_errors[1].clear()
    return page_and_errors[1]


def pytest_collection_modifyitems(items):
    """Tests that need a running server or its page have the marks for them. Their files are the longest and come first."""
    served = set()
    for item in items:
        if "comfyui" in item.fixturenames:
            item.add_marker("server")
            served.add(item.path)
        if "page" in item.fixturenames:
            item.add_marker("page")
    items.sort(key=lambda item: item.path not in served)
