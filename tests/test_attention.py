"""Which attention runs: PyTorch's, asked to prefer cuDNN, or the one its user chose."""

import threading

import comfy.ldm.modules.attention as core
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from worldstereo_fp8.worldstereo import attention
from worldstereo_fp8.worldstereo.attention import PRIORITY, prefer_cudnn

OVERRIDE = {"optimized_attention_override": prefer_cudnn}


@pytest.fixture
def ours(monkeypatch):
    """Counts the calls that are asked to prefer cuDNN."""
    calls = []

    def kernel(*args, **kwargs):
        calls.append(args)
        return sdpa_kernel([SDPBackend.MATH], **kwargs)

    monkeypatch.setattr(attention, "sdpa_kernel", kernel)
    return calls


def qkv():
    return [torch.randn(1, 9, 64) for _ in range(3)]


def test_pytorchs_attention_prefers_cudnn(ours):
    q, k, v = qkv()
    out = core.attention_pytorch(q, k, v, heads=4, transformer_options=OVERRIDE)
    assert len(ours) == 1 and ours[0][0] == PRIORITY
    assert torch.allclose(out, core.attention_pytorch(q, k, v, heads=4), atol=1e-5)


def chosen(name: str):
    """What core makes of --use-sage-attention, or newer cores of --use-ck-attention: another function, wrapped alike."""

    def attention(q, k, v, heads, **kwargs):
        attention.calls += 1
        return torch.zeros_like(q)

    attention.calls = 0
    attention.__name__ = f"attention_{name}"
    return attention, core.wrap_attn(attention)


@pytest.mark.parametrize("name", ["sage", "comfy_kitchen_int8"])
def test_the_attention_a_user_chose_runs(ours, name):
    function, wrapped = chosen(name)
    out = wrapped(*qkv(), heads=4, transformer_options=OVERRIDE)
    assert function.calls == 1 and not ours and not out.any()


def test_cores_own_sage_attention_runs(ours, monkeypatch):
    """Core's function itself, with a stand-in for the package that only its flag asks for."""
    calls = []

    def sageattn(q, k, v, **kwargs):
        calls.append(q.shape)
        return torch.zeros_like(q)

    monkeypatch.setattr(core, "sageattn", sageattn, raising=False)
    out = core.attention_sage(*qkv(), heads=1, transformer_options=OVERRIDE)
    assert len(calls) == 1 and not ours and not out.any()


@pytest.mark.parametrize("options", [{"mask": torch.zeros(9, 9)}, {"skip_reshape": True}])
def test_calls_of_another_kind_are_cores(ours, options):
    tensors = [t.reshape(1, 9, 4, 16).transpose(1, 2) for t in qkv()] if "skip_reshape" in options else qkv()
    core.attention_pytorch(*tensors, heads=4, transformer_options=OVERRIDE, **options)
    assert not ours


def test_two_threads_do_not_disturb_each_other():
    """Which kernels PyTorch may take is the process's: without a lock one thread takes the other's preference for what
    was there before, and leaves it."""
    flags = lambda: (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch._C._get_sdp_priority_order(),
    )
    before, errors, start = flags(), [], threading.Barrier(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(seed: int):
        try:
            generator = torch.Generator().manual_seed(seed)
            q, k, v = (torch.randn(1, 33, 64, generator=generator).to(device) for _ in range(3))
            expected = core.attention_pytorch(q, k, v, heads=4)
            start.wait()
            for _ in range(300):
                out = core.attention_pytorch(q, k, v, heads=4, transformer_options=OVERRIDE)
                assert torch.allclose(out, expected, atol=1e-4)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert flags() == before


def test_fewer_queries_than_keys_by_hand(ours):
    """Each head is a slice of the channels; values have as many tokens as keys, the result as many as queries."""
    q, k, v = torch.randn(2, 5, 64), torch.randn(2, 9, 64), torch.randn(2, 9, 64)
    out = prefer_cudnn(core.attention_pytorch.__wrapped__, q, k, v, 4)
    assert len(ours) == 1 and out.shape == q.shape
    for head in range(4):
        part = slice(16 * head, 16 * (head + 1))
        weights = (q[..., part] @ k[..., part].mT / 4).softmax(-1)
        assert torch.allclose(out[..., part], weights @ v[..., part], atol=1e-5)


@pytest.mark.parametrize("keys, split", [(40, False), (43, True), (15, False)])
def test_long_attention_is_split_where_cudnn_gains(ours, monkeypatch, keys, split):
    """With another function that returns the logarithm of the sum in cuDNN's place, and small numbers."""
    calls = []

    def with_lse(q, k, v, bias, lse):
        calls.append(k.shape[2])
        assert lse
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)

    for name, value in (("cudnn_attention", with_lse), ("TILE", 8), ("SPLIT_KEYS", 16)):
        monkeypatch.setattr(attention, name, value)
    monkeypatch.setattr(attention, "_cudnn_takes", lambda *by_head: True)
    monkeypatch.setattr(attention, "backend", lambda device: ("triton", ""))
    q, k, v = torch.randn(2, 5, 64), torch.randn(2, keys, 64), torch.randn(2, keys, 64)
    out = prefer_cudnn(core.attention_pytorch.__wrapped__, q, k, v, 4)
    assert calls == [40] * split and len(ours) == (not split)
    assert torch.allclose(out, core.attention_pytorch.__wrapped__(q, k, v, 4), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cudnns_attention_and_the_rest_are_the_whole(monkeypatch):
    q, k, v = (torch.randn(1, 9001, 256, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    if not attention.cudnn_is_faster(q.device):
        pytest.skip("needs a GPU on which cuDNN is preferred")
    used, add_keys_ = [], attention.add_keys_
    monkeypatch.setattr(attention, "add_keys_", lambda *args: (used.append(args[3].shape), add_keys_(*args)))
    out = prefer_cudnn(core.attention_pytorch.__wrapped__, q, k, v, 2)
    by_head = [t.double().unflatten(-1, (2, 128)).transpose(1, 2) for t in (q, k, v)]
    expected = ((by_head[0] @ by_head[1].mT / 128**0.5).softmax(-1) @ by_head[2]).transpose(1, 2).flatten(2)
    assert used == [(1, 9001 % attention.TILE, 256)]
    assert (out - expected).norm() / expected.norm() < 5e-3
