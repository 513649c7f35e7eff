"""Which attention runs: cuDNN's, PyTorch's, or the one that the user chose."""

import threading

import comfy.ldm.modules.attention as core
import pytest
import torch
from worldstereo_fp8.worldstereo import attention
from worldstereo_fp8.worldstereo.attention import prefer_cudnn

OVERRIDE = {"optimized_attention_override": prefer_cudnn}


@pytest.fixture
def ours(monkeypatch):
    """Counts the calls of cuDNN's attention, by their keys: a CPU's kernel, with the same arguments, in its place."""
    keys = []

    def kernel(q, k, v, bias, lse):
        keys.append(k.shape[2])
        assert bias is None
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, sums if lse else None, None  # cuDNN's returns more

    monkeypatch.setattr(attention, "cudnn_attention", kernel)
    monkeypatch.setattr(attention, "_cudnn_takes", lambda *by_head: True)
    return keys


def qkv():
    return [torch.randn(1, 9, 64) for _ in range(3)]


def test_pytorchs_attention_prefers_cudnn(ours):
    q, k, v = qkv()
    out = core.attention_pytorch(q, k, v, heads=4, transformer_options=OVERRIDE)
    assert ours == [9]
    torch.testing.assert_close(out, core.attention_pytorch(q, k, v, heads=4), atol=1e-5, rtol=1e-5)


def test_what_cudnn_does_not_take_is_pytorchs(ours, monkeypatch):
    monkeypatch.setattr(attention, "_cudnn_takes", lambda *by_head: False)
    q, k, v = qkv()
    out = core.attention_pytorch(q, k, v, heads=4, transformer_options=OVERRIDE)
    assert not ours
    torch.testing.assert_close(out, core.attention_pytorch(q, k, v, heads=4), atol=1e-5, rtol=1e-5)


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


def test_a_positional_mask_counts(ours):
    core.attention_pytorch(*qkv(), 4, torch.zeros(9, 9), transformer_options=OVERRIDE)
    assert not ours


@pytest.mark.parametrize("capability, faster", [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_cudnn_is_preferred_on_hopper_and_newer(capability, faster, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.cudnn_is_faster(torch.device("cuda")) == faster
    assert not attention.cudnn_is_faster(torch.device("cpu"))


def test_two_threads_do_not_disturb_each_other():
    """Which kernels PyTorch may take is the process's: no thread changes that for the other."""
    flags = lambda: (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        tuple(torch._C._get_sdp_priority_order()),
    )
    before, seen, errors, start = flags(), [], [], threading.Barrier(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, 1, 33, 64, generator=generator).to(device, torch.bfloat16) for _ in range(2)]
    expected = [[core.attention_pytorch(*tensors, heads=4) for tensors in inputs] for inputs in given]

    def run(inputs: torch.Tensor, results: list[torch.Tensor]):
        try:
            start.wait()
            for turn in range(300):
                out = core.attention_pytorch(*inputs[turn % 2], heads=4, transformer_options=OVERRIDE)
                seen.append(flags())
                torch.testing.assert_close(out, results[turn % 2], atol=2e-2, rtol=1e-5)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=arguments) for arguments in zip(given, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(seen) == 600 and set(seen) == {before}


def test_fewer_queries_than_keys_by_hand(ours):
    """Each head is a slice of the channels; values have as many tokens as keys, the result as many as queries."""
    q, k, v = torch.randn(2, 5, 64), torch.randn(2, 9, 64), torch.randn(2, 9, 64)
    out = prefer_cudnn(core.attention_pytorch.__wrapped__, q, k, v, 4)
    assert len(ours) == 1 and out.shape == q.shape
    for head in range(4):
        part = slice(16 * head, 16 * (head + 1))
        weights = (q[..., part] @ k[..., part].mT / 4).softmax(-1)
        torch.testing.assert_close(out[..., part], weights @ v[..., part], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "keys, kernels, split", [(40, "triton", False), (43, "triton", True), (15, "triton", False), (43, "kitchen", False)]
)
def test_long_attention_is_split_where_cudnn_gains(ours, monkeypatch, keys, kernels, split):
    """With small numbers."""
    for name, value in (("TILE", 8), ("SPLIT_KEYS", 16)):
        monkeypatch.setattr(attention, name, value)
    monkeypatch.setattr(attention, "backend", lambda device: (kernels, ""))
    q, k, v = torch.randn(2, 5, 64), torch.randn(2, keys, 64), torch.randn(2, keys, 64)
    out = prefer_cudnn(core.attention_pytorch.__wrapped__, q, k, v, 4)
    assert ours == [40 if split else keys]
    torch.testing.assert_close(out, core.attention_pytorch.__wrapped__(q, k, v, 4), atol=1e-5, rtol=1e-5)


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
