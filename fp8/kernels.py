"""The Triton kernels behind `activations`: each program loads whole rows (tokens or pixels) into registers, and
`_add_bias` any part of them; arithmetic is in FP32.

Every tensor's last axis has stride 1; rows may have any stride where no comment says otherwise.
"""

import os

import torch
import triton
import triton.language as tl

from .recipe import FP8_MAX

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run in Python, on the CPU

ROWS = 4  # tokens per program of `_gated_add`, which loads their gate once
QUERIES = 128  # per program of `_add_keys`
VALUES = 4096  # per program of `_rms_silu` and `_add_bias`
INVERSE_FP8_MAX = tl.constexpr(1 / FP8_MAX)
SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _store_quantised(y, values_ptr, scale_ptr, row, column, width):
    scale = tl.max(tl.abs(y), 0) * INVERSE_FP8_MAX
    scale = tl.where(scale < SMALLEST_NORMAL, 1.0, scale)
    tl.store(scale_ptr + row, scale)
    values = (y * tl.div_rn(1.0, scale)).to(tl.float8e4nv)
    tl.store(values_ptr + row * width + column, values, mask=column < width)


@triton.jit
def _quantise(x_ptr, values_ptr, scale_ptr, row_stride, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + column, mask=column < width, other=0.0).to(tl.float32)
    if GELU:  # x/2 · (1 + tanh(u)) = x · sigmoid(2u)
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    _store_quantised(x, values_ptr, scale_ptr, row, column, width)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _layer_norm(
    x_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    out_scale_ptr,
    tokens,
    width,
    x_batch,
    x_token,
    shift_batch,
    shift_token,
    scale_batch,
    scale_token,
    eps,
    QUANTISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(x_ptr + batch * x_batch + token * x_token + column, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * shift_batch + token * shift_token + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + batch * scale_batch + token * scale_token + column, mask=mask, other=0.0).to(tl.float32)
    total, squares = tl.reduce((x, x * x), 0, _add_pairs)  # one pass, as comfy-kitchen's
    mean = total / width
    x = (x - mean) * tl.rsqrt(tl.maximum(squares / width - mean * mean, 0.0) + eps)
    y = tl.where(mask, x * (1.0 + scale) + shift, 0.0)
    row = batch * tokens + token
    if QUANTISE:
        _store_quantised(y, out_ptr, out_scale_ptr, row, column, width)
    else:
        tl.store(out_ptr + row * width + column, y, mask=mask)


@triton.jit
def _gated_add(
    x_ptr, y_ptr, gate_ptr, tokens, width, x_batch, x_token, gate_batch, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    first, batch = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_ptr + batch * gate_batch + column, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        token = first + i
        here = mask & (token < tokens)
        x_row = x_ptr + batch * x_batch + token * x_token + column
        x = tl.load(x_row, mask=here, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + (batch * tokens + token) * width + column, mask=here, other=0.0).to(tl.float32)
        tl.store(x_row, x + y * gate, mask=here)


@triton.jit
def _rms_rope(
    x_ptr,
    weight_ptr,
    freqs_ptr,
    x_batch,
    x_token,
    freqs_batch,
    freqs_token,
    heads,
    head_dim,
    eps,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, 2 * PAIRS)[None, :]
    mask = (head < heads) & (channel < head_dim)
    column = head * head_dim + channel
    x_ptr += batch * x_batch + token * x_token
    x = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / (heads * head_dim) + eps)
    x *= tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))

    pair = tl.arange(0, PAIRS)[None, :]
    rotates = 2 * pair < head_dim
    matrix = freqs_ptr + batch * freqs_batch + token * freqs_token + 4 * pair  # of 2×2, row by row
    first, second = (
        tl.load(matrix, mask=rotates, other=0.0) * first + tl.load(matrix + 1, mask=rotates, other=0.0) * second,
        tl.load(matrix + 2, mask=rotates, other=0.0) * first + tl.load(matrix + 3, mask=rotates, other=0.0) * second,
    )
    tl.store(x_ptr + column, tl.reshape(tl.join(first, second), (HEADS, 2 * PAIRS)), mask=mask)


@triton.jit
def _rms_silu(x_ptr, weight_ptr, out_ptr, rows, width, x_row, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < width)
    x = tl.load(x_ptr + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + eps)
    x *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, x * tl.sigmoid(x), mask=mask)


@triton.jit(do_not_specialize=["width"])  # one kernel for all widths: compiling one takes longer than it would save
def _add_bias(x_ptr, bias_ptr, count, width, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    number = tl.arange(0, BLOCK)
    mask = first + number < count
    channel = ((first % width).to(tl.int32) + number) % width
    x_ptr += first + number
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr, x + tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32), mask=mask)


@triton.jit
def _add_keys(
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    queries,
    keys,
    head_dim,
    out_batch,
    out_token,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    factor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    key, channel = tl.arange(0, KEYS), tl.arange(0, CHANNELS)
    column, here = head * head_dim + channel[None, :], channel[None, :] < head_dim
    of_queries, of_keys = here & (query[:, None] < queries), here & (key[:, None] < keys)
    q = tl.load(q_ptr + batch * q_batch + query[:, None] * q_token + column, mask=of_queries, other=0.0)
    k = tl.load(k_ptr + batch * k_batch + key[:, None] * k_token + column, mask=of_keys, other=0.0)
    v = tl.load(v_ptr + batch * v_batch + key[:, None] * v_token + column, mask=of_keys, other=0.0)
    scores = tl.where(key[None, :] < keys, tl.dot(q, tl.trans(k), input_precision="ieee") * factor, float("-inf"))
    lse = tl.load(lse_ptr + (batch * tl.num_programs(1) + head) * queries + query, mask=query < queries, other=0.0)
    largest = tl.maximum(tl.max(scores, 1), lse)
    weights, before = tl.exp(scores - largest[:, None]), tl.exp(lse - largest)
    out_ptr += batch * out_batch + query[:, None] * out_token + column
    out = tl.load(out_ptr, mask=of_queries, other=0.0).to(tl.float32) * before[:, None]
    out += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    tl.store(out_ptr, out / (before + tl.sum(weights, 1))[:, None], mask=of_queries)


def _block(width: int) -> dict[str, int]:
    """The block that holds a row, and the number of warps: 64 values per thread, which was fastest on an H200."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 2048, 1), 8)}


# Custom operators, because torch.compile cannot trace the kernels' helper functions. Triton starts a kernel on the current
# GPU; a VAE or MoGe may be on another, therefore `device_of`.


@torch.library.custom_op("worldstereo_fp8::quantise_", mutates_args=("values", "scale"))
def quantise_(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, gelu: bool) -> None:
    """x [M, K] into float8_e4m3fn values [M, K] and float32 scales [M, 1], both contiguous; gelu: GELU(tanh) first."""
    rows, width = x.shape
    _quantise[(rows,)](x, values, scale, x.stride(0), width, GELU=gelu, **_block(width))


@torch.library.custom_op("worldstereo_fp8::layer_norm_", mutates_args=("out", "out_scale"))
def layer_norm_(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
) -> None:
    """LayerNorm(x)·(1 + scale) + shift of x [B, L, C], shift and scale expanded to its shape, into out, contiguous: in
    float8_e4m3fn with its scales, float32 [B·L, 1], or, without out_scale, in any float dtype."""
    batch, tokens, width = x.shape
    _layer_norm[(tokens, batch)](
        x,
        shift,
        scale,
        out,
        out_scale,
        tokens,
        width,
        *x.stride()[:2],
        *shift.stride()[:2],
        *scale.stride()[:2],
        eps,
        QUANTISE=out_scale is not None,
        **_block(width),
    )


@torch.library.custom_op("worldstereo_fp8::rms_rope_", mutates_args=("x",))
def rms_rope_(x: torch.Tensor, weight: torch.Tensor, freqs: torch.Tensor, heads: int, eps: float) -> None:
    """x [B, L, C] in place: RMSNorm over C with weight [C], then rotated by freqs [B, L, 1, C/heads/2, 2, 2]."""
    batch, tokens, width = x.shape
    head_dim = width // heads
    padded_heads, pairs = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim // 2)
    _rms_rope[(tokens, batch)](
        x,
        weight,
        freqs,
        *x.stride()[:2],
        *freqs.stride()[:2],
        heads,
        head_dim,
        eps,
        HEADS=padded_heads,
        PAIRS=pairs,
        num_warps=min(max(padded_heads * pairs // 512, 1), 8),
    )


@torch.library.custom_op("worldstereo_fp8::gated_add_", mutates_args=("x",))
def gated_add_(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> None:
    """x [B, L, C] += y·gate in place; y [B, L, C] contiguous, gate [B, 1, C]."""
    batch, tokens, width = x.shape
    _gated_add[(triton.cdiv(tokens, ROWS), batch)](
        x, y, gate, tokens, width, *x.stride()[:2], gate.stride(0), ROWS=ROWS, **_block(width)
    )


@torch.library.custom_op("worldstereo_fp8::rms_silu_", mutates_args=("out",))
def rms_silu_(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """SiLU(RMSNorm(x)·weight) of x [M, C] into out, contiguous; weight [C]."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    of_program = max(VALUES // block, 1)
    with torch.cuda.device_of(x):
        _rms_silu[(triton.cdiv(rows, of_program),)](
            x, weight, out, rows, width, x.stride(0), eps, ROWS=of_program, BLOCK=block, num_warps=4
        )


@torch.library.custom_op("worldstereo_fp8::add_bias_", mutates_args=("x",))
def add_bias_(x: torch.Tensor, bias: torch.Tensor) -> None:
    """x [..., C] += bias [C], in place; both contiguous."""
    with torch.cuda.device_of(x):
        _add_bias[(triton.cdiv(x.numel(), VALUES),)](x, bias, x.numel(), len(bias), BLOCK=VALUES, num_warps=4)


@torch.library.custom_op("worldstereo_fp8::add_keys_", mutates_args=("out",))
def add_keys_(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int
) -> None:
    """Adds the keys k with values v [B, K, C] to the attention `out` [B, L, C] of q [B, L, C], in place. lse: float32
    [B, heads, L], contiguous."""
    batch, queries, width = q.shape
    keys, head_dim = k.shape[1], width // heads
    _add_keys[(triton.cdiv(queries, QUERIES), heads, batch)](
        out,
        lse,
        q,
        k,
        v,
        queries,
        keys,
        head_dim,
        *out.stride()[:2],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        head_dim**-0.5,
        QUERIES=QUERIES,
        KEYS=max(triton.next_power_of_2(keys), 16),
        CHANNELS=max(triton.next_power_of_2(head_dim), 16),
        num_warps=8,
    )
