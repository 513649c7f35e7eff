"""Makes ComfyUI and this pack importable: the tests write `from worldstereo_fp8.loaders import ...`.

ComfyUI is found at COMFYUI_PATH, which `dev.py test` sets. Where there is a CUDA GPU it is set up as ComfyUI's main.py
does by default: its choice of PyTorch's allocator, and dynamic VRAM unless WORLDSTEREO_DYNAMIC_VRAM is 0.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH", ROOT / ".dev" / "ComfyUI"))
if not (COMFYUI / "comfy").is_dir():
    raise SystemExit(f"No ComfyUI at {COMFYUI}. Run the tests with: python dev.py test")

sys.path[:0] = [str(COMFYUI), str(Path(__file__).parent)]  # and the tests' own helpers

import comfy_aimdo.control

comfy_aimdo.control.init(nvml_pressure=True)  # its other modules take its library when they are imported

import comfy.cli_args
import cuda_malloc  # noqa: F401  before torch

# isort: split
import torch

CUDA = torch.cuda.is_available()
DYNAMIC_VRAM = CUDA and os.environ.get("WORLDSTEREO_DYNAMIC_VRAM") != "0"
comfy.cli_args.args.cpu = not CUDA

import comfy.memory_management
import comfy.model_patcher

if DYNAMIC_VRAM:
    if not comfy_aimdo.control.init_devices(range(torch.cuda.device_count())):
        raise SystemExit("comfy-aimdo does not work here. Set WORLDSTEREO_DYNAMIC_VRAM=0 to do without dynamic VRAM.")
    comfy_aimdo.control.set_log_warning()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True

spec = importlib.util.spec_from_file_location(
    "worldstereo_fp8", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
)
package = importlib.util.module_from_spec(spec)
sys.modules["worldstereo_fp8"] = package
spec.loader.exec_module(package)


def pytest_collection_modifyitems(items):
    """Tests that take the fixture `comfyui`, a running server, have the mark for it."""
    for item in items:
        if "comfyui" in item.fixturenames:
            item.add_marker("server")
