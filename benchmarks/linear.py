"""The FP8 and the INT8 Linear against BF16 and other FP8 Linears, the kernels around it, and attention, at the 14 B model's shapes.

    python benchmarks/linear.py [--quick]

Times are medians of CUDA-event timings; what is compared takes turns, so that all run on an equally warm GPU. Ratios
are to BF16 in the same run. Errors are ‖out − ref‖/‖ref‖ against float64 with the weight before quantisation.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import standalone

standalone.import_all()

# isort: split
import comfy.ldm.flux.math
import comfy.ops
import comfy_kitchen
import torch
from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from worldstereo_fp8.fp8 import activations, int8, int8_matmul
from worldstereo_fp8.fp8.activations import BACKENDS, QuantisedTokens, quantise
from worldstereo_fp8.fp8.matmul import scaled_linear
from worldstereo_fp8.fp8.recipe import FP8, FP8_MAX, quantise_weight
from worldstereo_fp8.fp8.rotation import GROUP

SHAPES = ((5120, 5120), (5120, 13824), (13824, 5120))
TOKENS = 32760  # of the Linear
ALL_TOKENS = 41760  # of a 480×768 target and eight references
DIM, FFN_DIM, HEADS = 5120, 13824, 40
CHUNKS = (4224, 8448)  # with tiles of 128×256 whole waves on 132 multiprocessors
ERROR_TOKENS = 2048
CALLS = 3  # in a row, each timing
DEVICE = torch.device("cuda")
INT8_SHARED = "ours, INT8, one quantisation for three products"
ACTIVATIONS = {
    "plain": lambda x: x,
    "outliers": lambda x: x * torch.where(torch.arange(x.shape[1], device=x.device) % 197 == 0, 30, 1),
    "scale 1e-3": lambda x: x * 1e-3,
    "scale 1e3": lambda x: x * 1e3,
}


def time_in_turns(candidates: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The median milliseconds of each candidate's call."""
    times = {name: [] for name in candidates}
    for _ in range(2):
        for function in candidates.values():
            function()
    for _ in range(rounds):
        for name, function in candidates.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(500_000)  # the CPU gets ahead, so that no launch is waited for
            start.record()
            for _ in range(CALLS):
                function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, headings: list[str], rows: list[list[str]]):
    print(f"\n### {title}\n")
    print("| " + " | ".join(headings) + " |")
    print("|---" + "|---:" * (len(headings) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def usable_backends() -> list[str]:
    """Says why of those that are not."""
    usable = []
    for name, implementation in BACKENDS.items():
        refusal = implementation.refusal(DEVICE)
        if refusal is None:
            usable.append(name)
        else:
            print(f"Without {name}: {refusal}.")
    return usable


class Layer:
    """One Linear in every form. x: [M, K] or QuantisedTokens."""

    def __init__(self, in_features: int, out_features: int):
        self.exact = torch.randn(out_features, in_features, device=DEVICE) / in_features**0.5
        self.bias = torch.randn(out_features, device=DEVICE).bfloat16() * 0.02
        self.bf16_weight = self.exact.bfloat16()
        self.weight, scale = quantise_weight(self.exact)
        self.scale = scale.float()
        self.one = torch.ones((), device=DEVICE)
        self.int8 = {group: int8.quantise_weight(self.exact, group) for group in (GROUP, 0)}
        self.comfy = comfy.ops.mixed_precision_ops({}, torch.bfloat16).Linear(in_features, out_features)
        self.comfy.load_state_dict(
            {
                "weight": self.weight,
                "weight_scale": self.scale,
                "bias": self.bias,
                "comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
            }
        )
        self.comfy.to(DEVICE)

    def bf16(self, x):
        return F.linear(x, self.bf16_weight, self.bias)

    def seed(self, x):
        """Inputs cut off at ±448, a scale of 1."""
        return torch._scaled_mm(
            x.clamp(-FP8_MAX, FP8_MAX).to(FP8),
            self.weight.t(),
            scale_a=self.one,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def ours(self, x, backend: str | None = None):
        activations.forced = backend
        return scaled_linear(x, self.weight, self.scale, self.bias)

    def upcast(self, x):
        """As on a GPU without FP8 matmul."""
        return F.linear(x, self.comfy.weight.dequantize(), self.bias)

    def int8_linear(self, x, group: int = GROUP):
        return int8_matmul.int8_linear(x, *self.int8[group], self.bias, group)

    def int8_kitchen(self, x):
        """Its public function."""
        return comfy_kitchen.int8_linear(
            x, *self.int8[GROUP], self.bias, x.dtype, convrot=True, convrot_groupsize=GROUP
        )

    def int8_shared(self, x):
        """As for q, k and v."""
        x = int8_matmul.quantise(x)
        for _ in range(3):
            self.int8_linear(x)

    def int8_upcast(self, x):
        """As on a GPU without INT8 units."""
        values, scale = self.int8[GROUP]
        params = TensorWiseINT8Layout.Params(
            scale=scale, orig_dtype=x.dtype, orig_shape=tuple(values.shape), convrot=True, convrot_groupsize=GROUP
        )
        return F.linear(x, TensorWiseINT8Layout.dequantize(values, params), self.bias)

    def product(self, x: QuantisedTokens, bias: bool = True):
        return scaled_linear(x, self.weight, self.scale, self.bias if bias else None)

    def shared(self, x, backend: str):
        """As for q, k and v."""
        activations.forced = backend
        x = quantise(x)
        for _ in range(3):
            self.product(x)

    def in_chunks(self, x, rows: int):
        """The quantised activations of a chunk may still be in the L2 cache when they are multiplied."""
        activations.forced = None
        for part in x.split(rows):
            scaled_linear(part, self.weight, self.scale, self.bias)


def whole_tensor(x: torch.Tensor) -> QuantisedTokens:
    scale = x.abs().amax().float().reshape(1, 1) / FP8_MAX
    return QuantisedTokens((x.float() / scale).to(FP8), scale, tuple(x.shape), x.dtype)


def padded(x: QuantisedTokens, multiple: int = 256) -> QuantisedTokens:
    """With rows of zeros."""
    rows = -len(x.values) % multiple
    values = F.pad(x.values.view(torch.uint8), (0, 0, 0, rows)).view(FP8)
    return QuantisedTokens(values, F.pad(x.scale, (0, 0, 0, rows), value=1.0), tuple(values.shape), x.dtype)


def linear(rounds: int, backends: list[str]):
    rows, errors = {}, []
    for in_features, out_features in SHAPES:
        layer = Layer(in_features, out_features)
        x = torch.randn(TOKENS, in_features, device=DEVICE).bfloat16()
        activations.forced = None
        by_token, by_tensor = quantise(x), whole_tensor(x)
        padded_tokens = padded(by_token)
        int8_tokens = int8_matmul.quantise(x)
        best = backends[0]
        candidates = {
            "BF16": lambda: layer.bf16(x),
            "fixed scale of 1": lambda: layer.seed(x),
            "ComfyUI's FP8": lambda: layer.comfy(x),
            **{f"**ours, {name}**": lambda name=name: layer.ours(x, name) for name in backends},
            "**ours, upcast**": lambda: layer.upcast(x),
            "**ours, INT8 with rotation**": lambda: layer.int8_linear(x),
            "ours, INT8 without rotation": lambda: layer.int8_linear(x, 0),
            "ours, INT8 upcast": lambda: layer.int8_upcast(x),
            "comfy-kitchen's INT8 Linear with rotation": lambda: layer.int8_kitchen(x),
            INT8_SHARED: lambda: layer.int8_shared(x),
            "INT8 product alone": lambda: layer.int8_linear(int8_tokens),
            "INT8 rotation and quantisation alone": lambda: int8_matmul.quantise(x),
            f"ours, {best}, one quantisation for three products": lambda: layer.shared(x, best),
            **{f"ours, {best}, in chunks of {n} tokens": lambda n=n: layer.in_chunks(x, n) for n in CHUNKS},
            "product alone, a scale per token": lambda: layer.product(by_token),
            "product alone, a scale per token, no bias": lambda: layer.product(by_token, bias=False),
            "product alone, a scale per token, tokens padded to 256": lambda: layer.product(padded_tokens),
            "product alone, one scale": lambda: layer.product(by_tensor),
            **{f"quantisation alone, {name}": lambda name=name: layer_quantise(x, name) for name in backends},
        }
        times = time_in_turns(candidates, rounds)
        shared = f"ours, {best}, one quantisation for three products"
        times[shared] /= 3
        times[INT8_SHARED] /= 3
        for name, ms in times.items():
            rows.setdefault(name, [name]).extend([f"{ms:.3f}", f"{times['BF16'] / ms:.2f}"])
        del x, by_token, by_tensor, padded_tokens, int8_tokens, candidates
        errors += linear_errors(layer, in_features, out_features, backends)
        del layer
    headings = [f"Linear, {TOKENS} tokens"]
    for in_features, out_features in SHAPES:
        headings += [f"{in_features}→{out_features} ms", "× BF16"]
    table("Linear, quantisation included unless said otherwise", headings, list(rows.values()))
    table(
        "Error of the Linear",
        [
            "activations",
            "shape",
            "weight's rounding alone",
            "BF16",
            "fixed scale of 1",
            *(f"ours, {name}" for name in backends),
            "ours, INT8",
            "INT8 without rotation",
            "INT8 from the FP8 weight",
        ],
        errors,
    )


def layer_quantise(x, backend: str):
    activations.forced = backend
    return quantise(x)


def linear_errors(layer: Layer, in_features: int, out_features: int, backends: list[str]) -> list[list[str]]:
    rows, layer.bias = [], None  # which would hide the errors of small activations
    from_fp8 = int8.quantise_weight(layer.weight.float() * layer.scale)
    for name, change in ACTIVATIONS.items():
        x = change(torch.randn(ERROR_TOKENS, in_features, device=DEVICE)).bfloat16()
        reference = x.double() @ layer.exact.double().t()
        outputs = [
            x.double() @ (layer.weight.double() * layer.scale).t(),
            layer.bf16(x),
            layer.seed(x),
            *(layer.ours(x, backend) for backend in backends),
            layer.int8_linear(x),
            layer.int8_linear(x, 0),
            int8_matmul.int8_linear(x, *from_fp8, None),
        ]
        rows.append(
            [
                name,
                f"{in_features}→{out_features}",
                *(f"{((out - reference).norm() / reference.norm()).item():.2e}" for out in outputs),
            ]
        )
    return rows


def kernels(rounds: int, backends: list[str]):
    """Each function's time, and the bytes it must move over that time."""
    x = torch.randn(1, ALL_TOKENS, DIM, device=DEVICE).bfloat16()
    hidden = torch.randn(ALL_TOKENS, FFN_DIM, device=DEVICE).bfloat16()
    shift, scale, gate = torch.randn(3, 1, 1, DIM, device=DEVICE).bfloat16()
    weight = torch.ones(DIM, device=DEVICE).bfloat16()
    freqs = comfy.ldm.flux.math.rope(torch.arange(float(ALL_TOKENS), device=DEVICE)[None], DIM // HEADS, 10000)[
        :, :, None
    ]
    y = torch.randn_like(x)
    quantised_bytes = x.nbytes + x.numel()
    functions = {
        "quantise": (lambda b: b.quantise(x), quantised_bytes),
        "layer_norm_quantise": (lambda b: b.layer_norm_quantise(x, shift, scale, 1e-6), quantised_bytes),
        "layer_norm_modulate": (lambda b: b.layer_norm_modulate(x, shift, scale, 1e-6), 2 * x.nbytes),
        "gelu_quantise": (lambda b: b.gelu_quantise(hidden), hidden.nbytes + hidden.numel()),
        "gelu_quantise, INT8": (lambda b: int8_matmul.gelu_quantise(hidden), hidden.nbytes + hidden.numel()),
        "gated_add_": (lambda b: b.gated_add_(x, y, gate), 3 * x.nbytes),
        "rms_rope": (lambda b: b.rms_rope(x, weight, freqs, HEADS, 1e-6), 2 * x.nbytes + freqs.nbytes),
    }
    rows = []
    for name, (function, nbytes) in functions.items():
        times = time_in_turns({b: lambda b=b: function(BACKENDS[b]) for b in backends}, rounds)
        rows.append(
            [name, f"{nbytes / 1e9:.2f}", *(f"{ms:.3f} ({nbytes / ms / 1e6:.0f} GB/s)" for ms in times.values())]
        )
    table(f"Kernels at {ALL_TOKENS} tokens, ms", ["function", "GB moved at least", *backends], rows)


def attention(rounds: int):
    """Self-attention of all tokens, and the text's and the picture's cross-attention of a span of them."""
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    rows = []
    for queries, keys, repeats in (
        (ALL_TOKENS, ALL_TOKENS, max(rounds // 8, 1)),
        (15_120, 512, rounds),
        (15_120, 257, rounds),
    ):
        q = torch.randn(1, queries, HEADS, DIM // HEADS, device=DEVICE).bfloat16().transpose(1, 2)
        k, v = (torch.randn(1, keys, HEADS, DIM // HEADS, device=DEVICE).bfloat16().transpose(1, 2) for _ in range(2))
        sample = slice(0, 256)
        scores = q[:, :, sample].float() @ k.float().transpose(2, 3) * (DIM // HEADS) ** -0.5
        reference = scores.softmax(-1) @ v.float()
        del scores

        def run(backend, q=q, k=k, v=v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        times = time_in_turns({backend: lambda backend=backend: run(backend) for backend in backends}, repeats)
        for backend, ms in times.items():
            error = (run(backend)[:, :, sample].float() - reference).norm() / reference.norm()
            rows.append([f"{queries} × {keys}", backend.name, f"{ms:.2f}", f"{error.item():.2e}"])
    table(f"Attention, {HEADS} heads of {DIM // HEADS}, BF16", ["queries × keys", "PyTorch's", "ms", "error"], rows)


def machine() -> str:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split()
    return (
        f"{torch.cuda.get_device_name()}, driver {driver[0]}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}, Triton {triton_version}, comfy-kitchen {version('comfy-kitchen')}, "
        f"INT8 products by {int8_matmul.product_kernel(DEVICE, torch.bfloat16)[0]}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds, for a look")
    rounds = 5 if parser.parse_args().quick else 25
    if not torch.cuda.is_available():
        sys.exit("The benchmark linear needs a CUDA GPU.")
    torch.manual_seed(0)
    print(machine() + "\n")
    backends = usable_backends()
    with torch.inference_mode():
        linear(rounds, backends)
        kernels(rounds, backends)
        attention(rounds)


if __name__ == "__main__":
    main()
