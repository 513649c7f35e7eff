"""Benchmarks, each in a process of its own:

    python dev.py bench                      all of them
    python dev.py bench linear [--quick]     the FP8 and INT8 Linear, the kernels around it, attention
    python dev.py bench step [arguments]     denoising steps of the whole model
    python dev.py bench drift [arguments]    what FP8 and INT8 change of the whole model's result
    python dev.py bench multigpu             core's MultiGPU CFG Split; needs two GPUs, and is not part of "all"
    python dev.py bench explore [arguments]  explore_picture at full size, without a server: seconds of each path
    python dev.py bench workflow [arguments] the example workflow at full size on the ComfyUI server
    python dev.py bench render               the point-cloud render
    python dev.py bench vae [arguments]      keyframes through the VAE
    python dev.py bench cook [arguments]     Cook FP8 against cp; needs 30 GB of disk, and is not part of "all"
    python dev.py bench bounds [case ...]    memory and stop button at the largest inputs; not part of "all"

linear, step, drift, explore and workflow need a CUDA GPU; all but workflow print Markdown tables.
"""

import subprocess
import sys
from pathlib import Path

ALL = ("linear", "step", "drift", "workflow", "explore", "render", "vae")
BENCHMARKS = (*ALL, "multigpu", "cook", "bounds")


def main() -> int:
    names, arguments = ALL, sys.argv[1:]
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if arguments:
        names, arguments = arguments[:1], arguments[1:]
        if names[0] not in BENCHMARKS:
            print(f"There is no benchmark {names[0]!r}, only {', '.join(BENCHMARKS)}.", file=sys.stderr)
            return 2
    folder = Path(__file__).resolve().parent
    return int(any([subprocess.run([sys.executable, folder / f"{name}.py", *arguments]).returncode for name in names]))


if __name__ == "__main__":
    sys.exit(main())
