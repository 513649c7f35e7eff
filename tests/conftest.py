"""Makes ComfyUI and this pack importable: the tests write `from worldstereo_fp8.loaders import ...`.

ComfyUI is found at COMFYUI_PATH, which `dev.py test` sets. It runs on the GPU where there is one.
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

import comfy.cli_args  # noqa: E402

import torch  # noqa: E402

comfy.cli_args.args.cpu = not torch.cuda.is_available()

spec = importlib.util.spec_from_file_location("worldstereo_fp8", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
package = importlib.util.module_from_spec(spec)
sys.modules["worldstereo_fp8"] = package
spec.loader.exec_module(package)
