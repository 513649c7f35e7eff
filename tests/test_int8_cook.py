"""INT8 with rotation: the format against comfy-kitchen's reference, and the cook's third recipe."""

import json
import logging

import pytest
import torch
from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
from comfy_kitchen.tensor.int8_utils import _build_hadamard, _rotate_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy import save_sources, source
from worldstereo_fp8 import cook_worldstereo_fp8 as command
from worldstereo_fp8 import remap
from worldstereo_fp8.fp8 import cook as engine
from worldstereo_fp8.fp8 import files as reading
from worldstereo_fp8.fp8 import int8
from worldstereo_fp8.fp8.cook import Options, cook, plan, verify
from worldstereo_fp8.fp8.files import Tensor, open_files
from worldstereo_fp8.fp8.recipe import is_quantised
from worldstereo_fp8.fp8.report import compare
from worldstereo_fp8.fp8.rotation import group_refusal, rotate
from worldstereo_fp8.worldstereo.config import WorldStereoConfig
from worldstereo_fp8.worldstereo.shapes import tensor_shapes

CASE = "memory_dmd"
GROUP = 16  # what the toy model's widths allow
INT8 = Options("int8", group=GROUP)
LAYER = "blocks.0.attn1.to_q"


@pytest.mark.parametrize("group", [4, 16, 64, 256, 1024])
def test_the_rotation_is_kitchens(group):
    x = torch.randn(6, 2048).bfloat16().double()  # sums in float64 are exact
    assert torch.equal(rotate(x, group), _rotate_weight(x, _build_hadamard(group, dtype=torch.float64), group))
    assert torch.equal(rotate(rotate(x, group), group), x)
    single = rotate(x.float(), group).double()
    assert (single - rotate(x, group)).abs().max() < 1e-5


@pytest.mark.parametrize("group, width", [(2, 64), (3, 63), (8, 64), (128, 256), (256, 640), (0, 64)])
def test_groups_that_cannot_be(group, width):
    assert group_refusal(group, width)


@pytest.mark.parametrize("group", [0, 16, 256])
def test_a_weight_is_what_kitchen_makes_of_it(group):
    """But for the order of additions in the rotation, which may turn a rounding."""
    weight = torch.randn(48, 512)
    weight[3] = 0
    values, scale = int8.quantise_weight(weight, group)
    theirs, params = TensorWiseINT8Layout.quantize(
        weight, per_channel=True, convrot=group > 0, convrot_groupsize=group or 256
    )
    assert scale.shape == params.scale.shape == (48, 1)
    torch.testing.assert_close(scale, params.scale, rtol=1e-6, atol=0)
    assert values.dtype == theirs.dtype == torch.int8 and (values.int() - theirs.int()).abs().max() <= 1
    assert (values != theirs).float().mean() < 1e-3
    back = int8.dequantise(values, scale, torch.float32, group)
    params = TensorWiseINT8Layout.Params(
        scale=scale, orig_dtype=torch.float32, orig_shape=(48, 512), convrot=group > 0, convrot_groupsize=group or 256
    )
    torch.testing.assert_close(back, TensorWiseINT8Layout.dequantize(values, params), atol=1e-5, rtol=1e-5)
    assert 0.003 < (back - weight).norm() / weight.norm() < 0.015


def test_rotation_spreads_outliers():
    weight = torch.randn(64, 512)
    weight[:, 7] *= 30
    errors = [
        (int8.dequantise(*int8.quantise_weight(weight, group), torch.float32, group) - weight).norm()
        for group in (0, 256)
    ]
    assert errors[1] < 0.3 * errors[0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    save_sources(CASE, folder)
    cook(folder / "bf16.safetensors", folder / "fp8.safetensors", Options("published"))
    return folder


def expected(tensors: dict) -> dict:
    """The recipe in a few lines."""
    out = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if is_quantised(name, tuple(tensor.shape), "bf16") and tensor.shape[1] % GROUP == 0:
            out[name], out[f"{layer}.weight_scale"] = int8.quantise_weight(tensor, GROUP)
            quant = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}
            out[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(quant).encode()), dtype=torch.uint8)
        else:
            out[name] = tensor.bfloat16()
    return out


@pytest.mark.parametrize("file", ["bf16.safetensors", "f32.safetensors"])
@pytest.mark.parametrize("slice_bytes", [reading.SLICE, 1024, 100])
def test_the_recipe_however_the_source_is_cut(sources, tmp_path, monkeypatch, file, slice_bytes):
    monkeypatch.setattr(reading, "SLICE", slice_bytes)
    report = cook(sources / file, tmp_path / "out.safetensors", INT8, refusal=remap.source_refusal)
    found, weights = load_file(tmp_path / "out.safetensors"), load_file(sources / file)
    wanted = expected(weights)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert found["camera_embedding.0.weight"].dtype == torch.bfloat16  # 7 columns
    with safe_open(tmp_path / "out.safetensors", "pt") as out:
        assert out.metadata()["recipe"] == "int8"
    assert len(report.errors) == sum(t.dtype == torch.int8 for t in wanted.values()) and not report.notes
    for error in report.errors:
        layer = error.name.removesuffix(".weight")
        back = int8.dequantise(wanted[error.name], wanted[f"{layer}.weight_scale"], torch.float32, GROUP).double()
        difference = back - weights[error.name].double()
        assert error.rms == pytest.approx(difference.square().mean().sqrt().item(), rel=1e-6)
        assert error.max == difference.abs().max() and error.scale == wanted[f"{layer}.weight_scale"].max()


def test_the_file_is_aligned_and_without_gaps(sources, tmp_path):
    cook(sources / "bf16.safetensors", tmp_path / "out.safetensors", INT8)
    tensors = open_files(tmp_path / "out.safetensors").tensors.values()
    assert all(t.begin % reading.DTYPES[t.dtype].itemsize == 0 for t in tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("file", ["bf16.safetensors", "f32.safetensors", "fp8.safetensors"])
def test_same_bytes_on_cuda(sources, tmp_path, file):
    for device in ("cpu", "cuda"):
        cook(sources / file, tmp_path / f"{device}.safetensors", INT8, device=torch.device(device))
    assert (tmp_path / "cpu.safetensors").read_bytes() == (tmp_path / "cuda.safetensors").read_bytes()


def test_full_size_counts():
    """Of the FP8 recipe's 549 matrices all but the camera's 7 columns; the file is as large as the FP8 one."""
    shapes = tensor_shapes(WorldStereoConfig())
    layout = plan([Tensor(name, "BF16", shape, 0) for name, shape in shapes.items()], Options("int8"))
    values = [t for t in layout.values() if t.dtype == "I8"]
    assert len(values) == 548 and round(sum(t.nbytes for t in values) / 1e9, 2) == 14.51
    assert all(t.shape[1] % 256 == 0 for t in values)
    size = len(engine.header(layout, {})) + sum(t.nbytes for t in layout.values())
    assert round(size / 1e9, 2) == 20.37


def test_from_fp8_with_a_warning(sources, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        report = cook(sources / "fp8.safetensors", tmp_path / "out.safetensors", INT8, refusal=remap.source_refusal)
    assert "3.0e-2" in caplog.text and "1.4e-2" in caplog.text
    assert report.notes == [engine.FROM_FP8] and engine.FROM_FP8 in report.as_text()
    found, fp8 = load_file(tmp_path / "out.safetensors"), load_file(sources / "fp8.safetensors")
    restored = {
        name: tensor.float() * fp8[name.replace(".weight", ".scale_weight")].float()
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in fp8.items()
        if not name.endswith("scale_weight") and name != "scaled_fp8"
    }
    wanted = expected(restored)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())
    assert verify(tmp_path / "out.safetensors", sources / "fp8.safetensors", INT8) == []


def test_an_fp8_source_without_a_scale(sources, tmp_path):
    tensors = load_file(sources / "fp8.safetensors")
    del tensors[f"{LAYER}.scale_weight"]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=f"bad.safetensors: {LAYER}.weight is FP8 but has no scale"):
        cook(tmp_path / "bad.safetensors", tmp_path / "out.safetensors", INT8)


def test_convolutions_stay(tmp_path):
    with pytest.raises(ValueError, match="int8 leaves convolutions in BF16"):
        Options("int8", "fp8")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_what_is_not_finite(tmp_path, value):
    tensors = {name: tensor.clone() for name, tensor in source(CASE).items()}
    tensors[f"{LAYER}.weight"].view(-1)[5:8] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=f"{LAYER}.weight holds NaN or infinite"):
        cook(tmp_path / "bad.safetensors", tmp_path / "out.safetensors", INT8)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_verify_and_compare(sources, tmp_path, capsys):
    path = tmp_path / "out.safetensors"
    report = cook(sources / "bf16.safetensors", path, INT8)
    assert verify(path, sources / "bf16.safetensors", INT8) == []
    compared = compare(sources / "bf16.safetensors", path)
    assert [e.name for e in compared.errors] == sorted(
        (e.name for e in report.errors), key=[e.name for e in compared.errors].index
    )
    errors = {error.name: error for error in report.errors}
    for error in compared.errors:
        assert error.rms == pytest.approx(errors[error.name].rms, rel=1e-4)
        assert error.scale == errors[error.name].scale

    tensors = load_file(path)
    tensors[f"{LAYER}.weight"][0, 0] += 1
    tensors[f"{LAYER}.weight_scale"][1] *= 2
    with safe_open(path, "pt") as file:
        save_file(tensors, tmp_path / "changed.safetensors", file.metadata())
    differences = verify(tmp_path / "changed.safetensors", sources / "bf16.safetensors", INT8)
    assert [line.split(":")[0] for line in differences] == [f"{LAYER}.weight_scale", f"{LAYER}.weight"] or [
        line.split(":")[0] for line in differences
    ] == [f"{LAYER}.weight", f"{LAYER}.weight_scale"]


def test_command_line_and_card(tmp_path, capsys):
    """Full groups: one layer of 256 channels and one of 64, which stays."""
    tensors = {f"{LAYER}.weight": torch.randn(32, 256), "blocks.0.attn1.to_k.weight": torch.randn(32, 64)}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "src.safetensors")
    arguments = [str(tmp_path / "src.safetensors"), str(tmp_path / "dst.safetensors"), "--recipe", "int8"]
    assert command.main([*arguments, "--card", str(tmp_path / "card"), "--report", str(tmp_path / "report")]) == 0
    found = load_file(tmp_path / "dst.safetensors")
    assert found[f"{LAYER}.weight"].dtype == torch.int8
    assert found["blocks.0.attn1.to_k.weight"].dtype == torch.bfloat16
    card, notice = ((tmp_path / "card" / name).read_text("utf-8") for name in ("README.md", "NOTICE"))
    assert (
        "scaled INT8" in card and "--recipe int8" in card and "groups of 256" in card and card.count("FP8") == 1
    )  # the node
    assert "rotated in groups of 256 channels and converted to int8" in notice
    assert command.main(["--verify", str(tmp_path / "dst.safetensors"), str(tmp_path / "src.safetensors")]) == 0
    assert "byte for byte" in capsys.readouterr().out


def test_the_group_that_a_description_gives():
    assert int8.group_of({"convrot": True, "convrot_groupsize": 64}) == 64
    assert int8.group_of({"convrot": True}) == int8.group_of({"params": {"convrot": True}}) == 256
    assert int8.group_of({}) == int8.group_of({"convrot": False, "convrot_groupsize": 64}) == 0
    assert int8.group_of(int8.read_description(int8.description(0), "x")) == 0
    assert int8.group_of(int8.read_description(int8.description(16), "x")) == 16


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[]", "x is not a description"),
        (b"{}", "x is not a description"),
        (b'{"format": 1}', "x is not a description"),
        *((b'{"format": "f", "convrot_groupsize": %b}' % value, "x says that") for value in (b"0", b"true", b'"8"')),
        (b'{"format": "f", "params": {"convrot_groupsize": -4}}', "convrot_groupsize is -4; it must be a positive"),
    ],
)
def test_other_descriptions_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        int8.read_description(content, "x")


def test_groups_are_powers_of_4_that_divide_the_width():
    assert [group for group in range(1, 300) if group_refusal(group, 0) is None] == [4, 16, 64, 256]
    assert group_refusal(4, 8) is None and "6 channels, not a multiple of 4" in group_refusal(4, 6)
    int8.check_group(0, 6, "x")
    with pytest.raises(ValueError, match="x says that it is rotated in groups of 4"):
        int8.check_group(4, 6, "x")
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    for group in (4, 16):
        rotated = rotate(x, group)
        torch.testing.assert_close(rotated[1], rotate(x[1], group), rtol=0, atol=0)
        torch.testing.assert_close(rotate(rotated, group), x)
