"""Makes this checkout the package `worldstereo_fp8`, whatever its folder is called, where ComfyUI has not imported it.

The tests, the benchmarks, the demo and cook_worldstereo_fp8.py begin with this module.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = "worldstereo_fp8"


def import_pack() -> None:
    """Make the pack importable, once. This needs neither ComfyUI nor PyTorch; most of the pack's modules need both."""
    if PACKAGE in sys.modules:
        return  # a second package would be without the modules that the first has imported
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACKAGE])


def import_comfyui(dynamic_vram: bool = True) -> Path:
    """Make ComfyUI's modules importable and return its folder: COMFYUI_PATH, which dev.py sets, else that in .dev.

    Without a CUDA GPU it runs on the CPU. With one it has its own choice of PyTorch's allocator, and dynamic VRAM as by
    default, unless `dynamic_vram` is false or WORLDSTEREO_DYNAMIC_VRAM is 0.
    """
    comfyui = Path(os.environ.get("COMFYUI_PATH", ROOT / ".dev" / "ComfyUI"))
    if not (comfyui / "comfy").is_dir():
        raise SystemExit(f"No ComfyUI at {comfyui}. Set it up with: python dev.py test")
    sys.path.insert(0, str(comfyui))

    import comfy_aimdo.control

    comfy_aimdo.control.init(nvml_pressure=True)  # its other modules take its library when they are imported

    import comfy.cli_args
    import cuda_malloc  # noqa: F401  before torch

    # isort: split
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()

    import comfy.memory_management
    import comfy.model_patcher

    if dynamic_vram and torch.cuda.is_available() and os.environ.get("WORLDSTEREO_DYNAMIC_VRAM") != "0":
        if not comfy_aimdo.control.init_devices(range(torch.cuda.device_count())):
            raise SystemExit("comfy-aimdo does not work here. Set WORLDSTEREO_DYNAMIC_VRAM=0 to do without.")
        comfy_aimdo.control.set_log_warning()
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    return comfyui


def import_all(dynamic_vram: bool = True) -> Path:
    """Both of the above. Returns ComfyUI's folder."""
    comfyui = import_comfyui(dynamic_vram)
    import_pack()
    return comfyui
