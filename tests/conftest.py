"""Makes ComfyUI and this pack importable: the tests write `from worldstereo_fp8.loaders import ...`."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.append(str(TESTS.parent))

import standalone

standalone.import_comfyui()
standalone.import_pack()
sys.path.insert(0, str(TESTS))  # the tests' own helpers


def pytest_collection_modifyitems(items):
    """Tests that take the fixture `comfyui`, a running server, have the mark for it."""
    for item in items:
        if "comfyui" in item.fixturenames:
            item.add_marker("server")
