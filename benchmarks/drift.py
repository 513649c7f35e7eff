"""How far FP8 and INT8 take the whole model's result from that of BF16 weights, over four steps from the same noise.

    python dev.py bench drift [--frames 6] [--references 5] [--size 832x480] [--rows NAME ...] [--folder DIR]

Random weights of the published shapes, the same in every form; each row is a process of its own. A form's file is made
on the GPU, and deleted before the next one's: the largest has 35 GB. --rows: these beside BF16.
Drift: ‖latent − BF16's‖/‖BF16's‖ at the end.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from step import (  # makes ComfyUI and the pack importable
    CORE,
    MARK,
    file_of,
    in_a_process_of_its_own,
    inputs,
    load,
    make_checkpoint,
    sample,
)

# isort: split
import comfy_kitchen
import torch
from safetensors.torch import load_file, save_file

INT8_ATTENTION = "INT8 attention"
ROWS = (  # name, weights, compute, attention; the first is what the others are compared with
    ("BF16", "bf16", "auto", ""),
    ("INT8 matmul", "int8", "auto", ""),
    ("INT8 matmul, INT8 attention", "int8", "auto", INT8_ATTENTION),
    ("INT8, upcast", "int8", "bf16", ""),
    ("FP8 matmul", "fp8", "auto", ""),
    ("FP8, upcast", "fp8", "bf16", ""),
    ("FP8, ComfyUI's own Linear", "fp8", CORE, ""),
)


def int8_attention(function, q, k, v, heads, *args, **kwargs):
    """Core's attention override with comfy-kitchen's INT8 attention, as newer ComfyUI's --use-ck-attention has it."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return comfy_kitchen.int8_attention(q, k, v).transpose(1, 2).flatten(2)


def run_row(row: list, args):
    _, weights, compute, attention = row
    patcher = load(file_of(args.folder, weights), compute)
    if attention:
        patcher.model_options["transformer_options"]["optimized_attention_override"] = int8_attention
    out = sample(patcher, *inputs(args.references, args.frames, args.size)).float().cpu().contiguous()
    reference = args.folder / "drift_reference.safetensors"
    if weights == "bf16":
        save_file({"latent": out}, reference)
    expected = load_file(reference)["latent"]
    drift = ((out - expected).norm() / expected.norm()).item()
    print(MARK + json.dumps({"drift": drift, "finite": bool(out.isfinite().all())}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--references", type=int, default=5)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rows", nargs="+", choices=[row[0] for row in ROWS])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("The benchmark drift needs a CUDA GPU.")
    if args.row:
        run_row(json.loads(args.row), args)
        return 0
    print(
        f"{torch.cuda.get_device_name()}; {args.size}, {args.frames} keyframes, {args.references} references\n\n"
        "| weights and products | drift from BF16 |\n|---|---:|"
    )
    made, failed = None, False
    for row in ROWS:
        if args.rows and row[0] not in (ROWS[0][0], *args.rows):
            continue
        name, weights, _, attention = row
        if attention and not hasattr(comfy_kitchen, "int8_attention"):
            print(f"| {name} | not run: this comfy-kitchen has no INT8 attention |")
            continue
        if made is not None and made != file_of(args.folder, weights):
            made.unlink()
        made = file_of(args.folder, weights)
        make_checkpoint(made, weights, quiet=True)
        torch.cuda.empty_cache()
        arguments = ["--row", json.dumps(row), "--frames", str(args.frames), "--references", str(args.references)]
        arguments += ["--size", args.size, "--folder", str(args.folder)]
        figures, rest = in_a_process_of_its_own("drift.py", *arguments)
        failed |= figures is None or not figures["finite"]
        print(
            f"| {name} | {figures['drift']:.2e} |" if figures else f"\nNo figure for {name}:\n{rest[-3000:]}\n",
            flush=True,
        )
    made.unlink()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
