"""Speed and peak memory of the cook, against `cp` of the same source in the same run.

    python benchmarks/cook.py [--gigabytes 2 8.5] [--repeat 3] [--folder DIR]

The source is made first: random BF16 weights in the names and shapes of memory-dmd, from the front of its list. Each
round copies it with `cp`, once as it is and once followed by `sync` of the copy (a cook ends with its file on disk), and
cooks it with `cook_worldstereo_fp8.py`. Times are of the whole commands; starting Python and torch is timed apart.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import standalone

standalone.import_all()

# isort: split
import torch
from worldstereo_fp8.fp8.cook import header
from worldstereo_fp8.fp8.files import Tensor
from worldstereo_fp8.worldstereo.config import WorldStereoConfig
from worldstereo_fp8.worldstereo.shapes import tensor_shapes

REPEATED = 2**25  # random values, written again and again


def make_source(path: Path, nbytes: float):
    layout, begin = {}, 0
    for name, shape in tensor_shapes(WorldStereoConfig()).items():
        if begin < nbytes:
            layout[name] = Tensor(name, "BF16", shape, begin)
            begin += layout[name].nbytes
    torch.manual_seed(0)
    values = memoryview((torch.randn(REPEATED) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy())
    with open(path, "wb") as file:
        file.write(header(layout, {}))
        while begin > 0:
            begin -= file.write(values[:begin])


def timed(*command) -> tuple[float, float]:
    """Seconds and peak resident memory, in MB, of a command. The peak is Linux's own high-water mark, looked at often."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()):
            peak = int(found[1]) / 1000
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return time.monotonic() - started, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2.0, 8.5])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", default="/var/tmp", help="where the files are made; they are deleted afterwards")
    options = parser.parse_args()
    results = []
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            source, result, copy = (
                Path(folder) / name for name in ("source.safetensors", "result.safetensors", "copy")
            )
            make_source(source, gigabytes * 1e9)
            rounds = []
            for _ in range(options.repeat):
                cp, _ = timed("cp", source, copy)
                copy.unlink()
                cp_sync, _ = timed("sh", "-c", f"cp {source} {copy} && sync {copy}")
                copy.unlink()
                start, base = timed(sys.executable, "-c", "import torch, safetensors")
                cook, peak = timed(sys.executable, standalone.ROOT / "cook_worldstereo_fp8.py", source, result)
                result.unlink()
                rounds.append(
                    {
                        "cp_s": cp,
                        "cp_and_sync_s": cp_sync,
                        "start_s": start,
                        "cook_s": cook - start,
                        "speed_of_cp": cp / (cook - start),
                        "speed_of_cp_and_sync": cp_sync / (cook - start),
                        "peak_mb": peak,
                        "start_mb": base,
                    }
                )
                print({key: round(value, 2) for key, value in rounds[-1].items()}, flush=True)
            nbytes = source.stat().st_size
            median = {key: round(statistics.median(r[key] for r in rounds), 2) for key in rounds[0]}
            results.append(
                {"source_gb": round(nbytes / 1e9, 2), "mb_per_s": round(nbytes / median["cook_s"] / 1e6)} | median
            )
    print(json.dumps({"cores": os.cpu_count(), "cuda": torch.cuda.is_available(), "medians": results}, indent=1))


if __name__ == "__main__":
    main()
