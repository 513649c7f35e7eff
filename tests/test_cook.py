"""The cook: its bytes against the recipe in a few lines, what it refuses, and that it never leaves half a file."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

try:
    import resource
except ImportError:  # Windows
    resource = None
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy import GOLDEN, golden_inputs, golden_weights, native, relative_error, run, save_sources, source
from worldstereo_fp8 import cook_worldstereo_fp8 as command
from worldstereo_fp8 import remap
from worldstereo_fp8.files import atomic
from worldstereo_fp8.fp8 import cook as engine
from worldstereo_fp8.fp8 import files as reading
from worldstereo_fp8.fp8.cook import Options, cook, plan, verify
from worldstereo_fp8.fp8.files import Tensor, open_files
from worldstereo_fp8.fp8.report import compare
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.worldstereo.config import WorldStereoConfig, config_to_embed
from worldstereo_fp8.worldstereo.shapes import tensor_shapes

ROOT = Path(command.__file__).parent
CASE = "memory_dmd"
EXCLUDED = re.compile(
    "norm|bias|time_in|time_|patch_embedding|img_emb|modulation|text_embedding|adapter|add|ref_conv|audio_proj"
)
LINEAR = "blocks.0.attn1.to_q.weight"
KILLS = 20


def published(tensors: dict, convs: str = "fp8") -> dict:
    """The published recipe, written from its description."""
    out = {"scaled_fp8": torch.zeros((), dtype=torch.bfloat16)}
    for name, tensor in tensors.items():
        eligible = name.endswith(".weight") and tensor.ndim >= 2 and not EXCLUDED.search(name)
        if eligible and (tensor.ndim == 2 or convs == "fp8"):
            scale = tensor.float().abs().max() / 448
            out[name] = (tensor.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            out[name.replace(".weight", ".scale_weight")] = scale.to(torch.bfloat16)
        else:
            out[name] = tensor.to(torch.bfloat16)
    return out


def assert_same(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(
            found[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        ), name


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob("*" + atomic.GROWING))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The toy model in BF16 and FP32, whole, and in shards."""
    folder = tmp_path_factory.mktemp("sources")
    save_sources(CASE, folder)
    save_file({name: weight.half() for name, weight in golden_weights(CASE)[0].items()}, folder / "f16.safetensors")
    names = sorted(source(CASE))
    weight_map = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: source(CASE)[n] for n in names if weight_map[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# The bytes


@pytest.mark.parametrize("file", ["bf16.safetensors", "f32.safetensors", "f16.safetensors"])
@pytest.mark.parametrize("convs", ["fp8", "bf16"])
def test_published_recipe_bit_for_bit(sources, tmp_path, file, convs):
    cook(sources / file, tmp_path / "out.safetensors", Options("published", convs))
    assert_same(load_file(tmp_path / "out.safetensors"), published(load_file(sources / file), convs))


@pytest.mark.parametrize("file", ["bf16.safetensors", "f32.safetensors"])
def test_default_recipe_has_the_same_form_and_no_larger_error(sources, tmp_path, file):
    report = cook(sources / file, tmp_path / "out.safetensors")
    found, weights = load_file(tmp_path / "out.safetensors"), load_file(sources / file)
    other = published(weights, "bf16")
    assert {(n, t.dtype, t.shape) for n, t in found.items()} == {(n, t.dtype, t.shape) for n, t in other.items()}
    smaller = 0
    for error, published_error in zip(report.errors, report.published, strict=True):
        scale_name = error.name.replace(".weight", ".scale_weight")
        reference = weights[error.name].double()
        errors = [
            (tensors[error.name].double() * tensors[scale_name].double() - reference).abs()
            for tensors in (found, other)
        ]
        assert errors[0].max() <= errors[1].max() and errors[0].square().mean() <= errors[1].square().mean()
        for numbers, independent in zip((error, published_error), errors):
            assert numbers.max == independent.max()
            assert numbers.rms == pytest.approx(independent.square().mean().sqrt().item(), rel=1e-9)
        smaller += errors[0].square().mean() < errors[1].square().mean()
    assert smaller > len(report.errors) / 2


@pytest.mark.parametrize("file", ["bf16.safetensors", "f32.safetensors", "model.safetensors.index.json"])
def test_same_bytes_however_the_source_is_cut(sources, tmp_path, monkeypatch, file):
    """Shards, slices and second readings change nothing but the order of the source's tensors."""
    cook(sources / file, tmp_path / "whole.safetensors")
    monkeypatch.setattr(reading, "SLICE", 1024)
    monkeypatch.setattr(reading, "MOST_KEPT", 2)
    monkeypatch.setattr(reading, "BUFFERS", 8)
    cook(sources / file, tmp_path / "sliced.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "sliced.safetensors").read_bytes()
    if "f32" not in file:
        cook(sources / "bf16.safetensors", tmp_path / "one.safetensors")
        assert_same(load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "one.safetensors"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("file", ["bf16.safetensors", "f32.safetensors"])
@pytest.mark.parametrize("recipe", ["default", "published"])
def test_same_bytes_on_cuda(sources, tmp_path, file, recipe):
    for device in ("cpu", "cuda"):
        cook(sources / file, tmp_path / f"{device}.safetensors", Options(recipe), device=torch.device(device))
    assert (tmp_path / "cpu.safetensors").read_bytes() == (tmp_path / "cuda.safetensors").read_bytes()


def test_full_size_counts():
    """The published figures, from the code that lays out the file: 551 or 549 FP8, 2351 tensors, 20.35 GB."""
    shapes = tensor_shapes(WorldStereoConfig())
    entries = [Tensor(name, "BF16", shape, 0) for name, shape in shapes.items()]
    assert len(entries) == 1799 and round(sum(t.nbytes for t in entries) / 1e9, 2) == 34.86
    layout = plan(entries, Options("published"))
    fp8 = [t for t in layout.values() if t.dtype == "F8_E4M3"]
    assert len(fp8) == 551 and round(sum(t.nbytes for t in fp8) / 1e9, 2) == 14.51 and len(layout) == 2351
    assert sum(len(t.shape) == 2 for t in fp8) == 549
    size = len(engine.header(layout, {})) + sum(t.nbytes for t in layout.values())
    assert round(size / 1e9, 2) == 20.35

    kept = [t for t in layout.values() if t.name in shapes and t.dtype == "BF16"]

    def group(test):
        return len([t for t in kept if test(t.name)]), round(sum(t.nbytes for t in kept if test(t.name)) / 1e9, 2)

    weight = lambda name: name.endswith(".weight")
    assert group(lambda n: weight(n) and "norm" in n) == (362, 1.26)
    assert group(lambda n: weight(n) and ".add_" in n) == (80, 4.19)
    assert group(lambda n: weight(n) and "time_" in n) == (3, 0.37)
    assert group(lambda n: n.endswith(".bias"))[0] == 759

    layout = plan(entries, Options())
    assert sum(t.dtype == "F8_E4M3" for t in layout.values()) == 549 and len(layout) == 2349


def test_the_file_is_aligned_and_without_gaps(sources, tmp_path):
    cook(sources / "bf16.safetensors", tmp_path / "out.safetensors", Options("published"))
    tensors = open_files(tmp_path / "out.safetensors").tensors.values()
    assert all(t.begin % reading.DTYPES[t.dtype].itemsize == 0 for t in tensors)
    assert max(t.begin + t.nbytes for t in tensors) == (tmp_path / "out.safetensors").stat().st_size
    assert min(t.begin for t in tensors) % 8 == 0


def test_provenance(sources, tmp_path):
    cook(sources / "bf16.safetensors", tmp_path / "a.safetensors")
    cook(sources / "bf16.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("config"))["model_type"] == "worldstereo-memory-dmd"
    assert metadata == {
        "format": "pt",
        "format_version": "1",
        "recipe": "default",
        "convs": "bf16",
        "tool": "comfyui-worldstereo-fp8",
        "tool_version": engine.TOOL_VERSION,
        "source_sha256": sha256(sources / "bf16.safetensors"),
    }
    cook(sources / "model.safetensors.index.json", tmp_path / "c.safetensors")
    hashes = [sha256(shard) for shard in sorted(sources.glob("model-*.safetensors"))]
    assert open_files(tmp_path / "c.safetensors").metadata["source_sha256"] == " ".join(hashes)


def test_which_config(sources, tmp_path):
    def config_of(*options):
        arguments = [tmp_path / "bf16.safetensors", tmp_path / "out.safetensors", "--overwrite", *options]
        assert command.main([*map(str, arguments)]) == 0
        return open_files(tmp_path / "out.safetensors").metadata.get("config")

    shutil.copy(sources / "bf16.safetensors", tmp_path)
    inside = open_files(sources / "bf16.safetensors").metadata["config"]
    (tmp_path / "config.json").write_text('{"model_type": "another"}')
    assert config_of() == inside
    (tmp_path / "config.json").write_text('{"model_type": "worldstereo-camera"}')
    assert config_of() == inside  # another variant's: with it the result would not load
    load_worldstereo(tmp_path / "out.safetensors")
    beside = json.dumps(json.loads(inside) | {"nframe": 5})
    (tmp_path / "config.json").write_bytes(beside.encode("utf-8-sig"))
    assert config_of() == beside
    (tmp_path / "config.json").write_bytes(beside.encode("utf-16"))
    assert config_of() == beside
    given = json.dumps(json.loads(inside) | {"nframe": 7})
    (tmp_path / "given.json").write_text(given)
    assert config_of("--config", tmp_path / "given.json") == given
    (tmp_path / "config.json").write_bytes('{"model_type": "another"}'.encode("utf-16"))
    assert config_of() == inside


@pytest.mark.parametrize("name", ["given.json", "config.json"])
def test_a_config_that_is_not_json(sources, tmp_path, name):
    shutil.copy(sources / "bf16.safetensors", tmp_path)
    (tmp_path / name).write_text('{"model_type": "worldstereo-camera"')
    files = open_files(tmp_path / "bf16.safetensors")
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        config_to_embed(files, tmp_path / name if name == "given.json" else None)


@pytest.mark.parametrize("case", ["memory_dmd", "camera", "camera_maskds4"])
@pytest.mark.parametrize("options", [Options(), Options("published")])
def test_the_loader_reads_it(tmp_path, case, options):
    cook(GOLDEN / f"{case}.weights.safetensors", tmp_path / "out.safetensors", options)
    inputs, reference = golden_inputs(case)
    assert relative_error(run(load_worldstereo(tmp_path / "out.safetensors"), inputs), reference) < 0.1


# Refusals


def bad(tmp_path: Path, change) -> Path:
    tensors = source(CASE)
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


def put(name: str, value: float):
    def change(tensors):
        tensors[name].view(-1)[7] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (put(LINEAR, torch.nan), f"{LINEAR} holds NaN or infinite"),
        (put(LINEAR, torch.inf), f"{LINEAR} holds NaN or infinite"),
        (put("blocks.0.norm2.weight", -torch.inf), "blocks.0.norm2.weight holds NaN or infinite"),
        (lambda t: t.update({LINEAR: t[LINEAR].to(torch.float8_e4m3fn)}), "is FP8 already"),
        (lambda t: t.update({"blocks.0.attn1.to_q.scale_weight": torch.ones(())}), "is FP8 already"),
        (lambda t: t.clear(), "holds no tensors"),
        (lambda t: t.update({LINEAR: torch.zeros(0, 4, dtype=torch.bfloat16)}), "is empty"),
        (lambda t: t.update({LINEAR: torch.zeros(4, 4, dtype=torch.int32)}), "is I32"),
        (
            lambda t: (t.clear(), t.update({"blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 4)})),
            "belongs to no WorldStereo model",
        ),
        (lambda t: [t.pop(name) for name in list(t) if not name.endswith("bias")], "none of its"),
        (lambda t: (renamed := native(t), t.clear(), t.update(renamed)), "is a native Wan name"),
        (
            lambda t: (
                renamed := {f"model.diffusion_model.{n}": v for n, v in native(t).items()},
                t.clear(),
                t.update(renamed),
            ),
            "is a native Wan name",
        ),
    ],
)
def test_refused_sources(tmp_path, change, message):
    path = bad(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        cook(path, tmp_path / "out.safetensors", refusal=remap.source_refusal)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]


@pytest.mark.parametrize("convert", [torch.bfloat16, torch.float32])
def test_all_zero_weight_has_scale_one(tmp_path, convert):
    path = bad(tmp_path, lambda t: t.update({LINEAR: torch.zeros(8, 8, dtype=convert)}))
    cook(path, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found["blocks.0.attn1.to_q.scale_weight"] == 1 and not found[LINEAR].float().any()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PK\x03\x04" + bytes(64), "is a pickle"),
        (b"\x80\x02}q\x00." + bytes(64), "is a pickle"),
        (b"<html>" * 9, "is a web page"),
        (b"", "not a safetensors file: its header length is 0"),
        (bytes(64), "not a safetensors file: its header length is 0"),
    ],
)
def test_files_of_another_kind(tmp_path, content, message):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cook(tmp_path / "bad.safetensors", tmp_path / "out.safetensors")


def test_truncated_file(sources, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes((sources / "bf16.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match="bad.safetensors has .* bytes, its header promises .* cut short"):
        cook(tmp_path / "bad.safetensors", tmp_path / "out.safetensors")


def test_bad_shards(sources, tmp_path):
    for file in sources.glob("model*"):
        shutil.copy(file, tmp_path)
    index, target = tmp_path / "model.safetensors.index.json", tmp_path / "out.safetensors"
    content = json.loads(index.read_text())
    moved = content["weight_map"] | {
        LINEAR: "model-00001-of-00003.safetensors",
        "blocks.0.norm2.bias": "x/../y.safetensors",
    }
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ValueError, match="outside its own folder"):
        cook(index, target)
    moved.pop("blocks.0.norm2.bias")
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ValueError, match="do not belong together"):
        cook(index, target)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"more": "model-00001-of-00003.safetensors"}}))
    with pytest.raises(ValueError, match="does not hold it"):
        cook(index, target)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is not an index"):
        cook(index, target)
    index.write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "model-00001-of-00003.safetensors"):
        with pytest.raises(
            ValueError, match="Give the .safetensors file, or for a model in shards its .safetensors.index.json"
        ):
            cook(path, target)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors is missing beside it"):
        cook(index, target)


# Never half a file


def test_never_overwrites_unless_told(sources, tmp_path):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists already"):
        cook(sources / "bf16.safetensors", target)
    assert target.read_bytes() == b"mine"
    cook(sources / "bf16.safetensors", target, overwrite=True)
    assert verify(target, sources / "bf16.safetensors") == []
    shutil.copy(sources / "bf16.safetensors", tmp_path / "source.safetensors")
    with pytest.raises(ValueError, match="is the source itself"):
        cook(tmp_path / "source.safetensors", tmp_path / "source.safetensors", overwrite=True)
    with pytest.raises(ValueError, match="ends in .safetensors"):
        cook(sources / "bf16.safetensors", tmp_path / "out.bin")
    with pytest.raises(FileNotFoundError, match="no folder"):
        cook(sources / "bf16.safetensors", tmp_path / "nowhere" / "out.safetensors")


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("after", [1, 40, 150])
def test_cancel_leaves_nothing(sources, tmp_path, after):
    calls = []

    def on_progress(progress):
        calls.append(progress)
        if len(calls) == after:
            raise Cancelled

    before = sha256(sources / "bf16.safetensors")
    with pytest.raises(Cancelled):
        cook(sources / "bf16.safetensors", tmp_path / "out.safetensors", on_progress=on_progress)
    assert list(tmp_path.iterdir()) == [] and sha256(sources / "bf16.safetensors") == before


def test_progress(sources, tmp_path):
    seen = []
    cook(sources / "bf16.safetensors", tmp_path / "out.safetensors", on_progress=seen.append)
    nbytes = open_files(sources / "bf16.safetensors").nbytes
    assert [p.nbytes for p in seen] == sorted({p.nbytes for p in seen}) and seen[-1].nbytes == nbytes == seen[
        0
    ].total_nbytes
    assert [p.tensors for p in seen] == list(range(1, len(source(CASE)) + 1))
    assert "151 of 151 tensors" in str(seen[-1]) and "MB/s" in str(seen[-1]) and "0:00 left" in str(seen[-1])


def test_no_room(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 300_000))
    with pytest.raises(OSError, match="needs .* GB free"):
        cook(sources / "bf16.safetensors", tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(resource is None, reason="Windows limits no file's size")
@pytest.mark.parametrize("room", [200_000, 200_100, 0])
def test_disk_full_half_way(sources, tmp_path, room):
    """A file size limit makes the disk refuse the write in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="out.safetensors could not be written: File too large") as caught:
            cook(sources / "bf16.safetensors", tmp_path / "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


def test_another_run_at_work_is_left_alone(sources, tmp_path):
    def on_progress(progress):
        if progress.nbytes == progress.total_nbytes:
            with pytest.raises(FileExistsError, match="is being made already"):
                cook(sources / "bf16.safetensors", tmp_path / "out.safetensors")
            cook(sources / "bf16.safetensors", tmp_path / "other.safetensors")

    cook(sources / "bf16.safetensors", tmp_path / "out.safetensors", on_progress=on_progress)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors", "out.safetensors"]


def test_two_runs_that_meet_before_the_lock(sources, tmp_path, monkeypatch):
    """The other takes the file for an abandoned one between its making and its locking."""
    temporary = tmp_path / f"out.safetensors{atomic.GROWING}"
    lock = atomic._lock

    def meet(file):
        if Path(file.name) == temporary and file.writable():
            monkeypatch.setattr(atomic, "_lock", lock)
            atomic._remove_abandoned(tmp_path / "out.safetensors")
            temporary.write_bytes(b"the other's")
        return lock(file)

    monkeypatch.setattr(atomic, "_lock", meet)
    with pytest.raises(FileExistsError, match="being made already"):
        cook(sources / "bf16.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists() and temporary.read_bytes() == b"the other's"


def test_a_result_that_cannot_take_its_name_is_kept_under_another(sources, tmp_path, monkeypatch):
    """Windows replaces no file that a program has mapped: the work is not thrown away."""
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"mapped")
    replace = os.replace

    def stalled(first, second):
        if Path(second) == target:
            raise PermissionError(errno.EACCES, "Access is denied", str(second))
        replace(first, second)

    monkeypatch.setattr(os, "replace", stalled)
    with pytest.raises(OSError, match=r"out\.safetensors could not be put in place.*finished file is out-2\.safeten"):
        cook(sources / "bf16.safetensors", target, overwrite=True)
    assert (
        target.read_bytes() == b"mapped" and verify(tmp_path / "out-2.safetensors", sources / "bf16.safetensors") == []
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out-2.safetensors", "out.safetensors"]


def test_where_open_files_lock_themselves(sources, tmp_path, monkeypatch):
    """As on Windows, which has no fcntl: renamed once closed; nothing is left after a failure."""
    monkeypatch.setattr(atomic, "fcntl", None)
    cook(sources / "bf16.safetensors", tmp_path / "out.safetensors")
    with pytest.raises(Cancelled):
        cook(sources / "bf16.safetensors", tmp_path / "more.safetensors", on_progress=raise_cancelled)
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def raise_cancelled(progress):
    raise Cancelled


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFOs")
def test_what_else_may_lie_under_a_temporarys_name(sources, tmp_path, monkeypatch):
    """Another run's that is gone between listing and opening, a FIFO (which would be waited for), a folder."""
    os.mkfifo(tmp_path / "fifo.safetensors.cooking")
    (tmp_path / "folder.safetensors.cooking").mkdir()
    glob = Path.glob
    gone = tmp_path / "gone.safetensors.cooking"
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [*glob(path, pattern), gone])
    cook(sources / "bf16.safetensors", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").is_file()
    with pytest.raises(FileExistsError, match=r"another run has fifo\.safetensors\.cooking"):
        cook(sources / "bf16.safetensors", tmp_path / "fifo.safetensors")


def test_names_that_are_refused_before_the_work(sources, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    never = lambda progress: pytest.fail("the source was read")
    for name, overwrite, message in (
        ("folder.safetensors", True, "is a folder"),
        ("link.safetensors", False, "exists already"),
        ("model-00001-of-00002.safetensors", False, "is the name of one shard"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=message):
            cook(sources / "bf16.safetensors", tmp_path / name, overwrite=overwrite, on_progress=never)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.safetensors", "link.safetensors"]


@pytest.mark.parametrize("change", ["written", "replaced", "cut"])
def test_a_source_that_changes_while_it_is_cooked(sources, tmp_path, change):
    source_file = Path(shutil.copy(sources / "bf16.safetensors", tmp_path))

    def on_progress(progress):
        if progress.tensors == 20:
            if change == "written":
                with open(source_file, "r+b") as file:
                    file.seek(-4, 2)
                    file.write(b"\0\1\0\1")
            elif change == "replaced":
                shutil.copy(sources / "bf16.safetensors", tmp_path / "new")
                os.replace(tmp_path / "new", source_file)
            else:
                os.truncate(source_file, source_file.stat().st_size - 2)

    with pytest.raises(ValueError, match=r"bf16\.safetensors .*changed while it was read"):
        cook(source_file, tmp_path / "out.safetensors", on_progress=on_progress)
    assert [p.name for p in tmp_path.iterdir()] == ["bf16.safetensors"]


def test_cuda_or_the_cpu():
    devices = [engine.cooking_device(torch.device(name)).type for name in ("cuda:0", "mps", "xpu", "cpu")]
    assert devices == ["cuda", "cpu", "cpu", "cpu"]


MEMORY = """
import resource, sys, torch
from worldstereo_fp8.fp8.cook import cook
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cook(*sys.argv[1:], device=torch.device("cpu"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(resource is None, reason="Windows has no getrusage")
def test_memory_does_not_grow_with_the_file(tmp_path, forker):
    """Peak memory above that of the imports, MB, for 0.3 GB and 0.5 GB of source (zeros, which take no room on disk);
    one tensor is too large to be held whole."""
    src = tmp_path / "source.safetensors"
    grown = []
    for count in (1, 3):
        layout = {"controlnet.proj_in.weight": Tensor("", "BF16", (10_000, 10_000), 0)}
        for i in range(count):
            layout[f"blocks.{i}.attn1.to_q.weight"] = Tensor("", "BF16", (5000, 10_000), (i + 2) * 100_000_000)
        with open(src, "wb") as file:
            file.truncate(file.write(engine.header(layout, {})) + sum(tensor.nbytes for tensor in layout.values()))
        grown.append(int(forker.run(MEMORY, src, tmp_path / f"{count}.safetensors").split()[-1]))
    budget = (reading.BUFFERS * reading.SLICE >> 20) + 150
    assert grown[1] < min(grown[0] + 60, budget), grown


COOK = """
import sys
from worldstereo_fp8.fp8.cook import cook
cook(*sys.argv[1:])
"""


def test_kill_at_random_moments(tmp_path, forker):
    """SIGKILL while the file is made: no file under its name, one temporary at most, the next run cleans it."""
    torch.manual_seed(0)
    weights = {f"blocks.{i}.attn1.to_q.weight": torch.randn(2048, 2048).to(torch.bfloat16) for i in range(8)}
    save_file(
        weights | {"blocks.0.norm2.bias": torch.zeros(4096, dtype=torch.bfloat16)}, tmp_path / "source.safetensors"
    )
    before, folder = sha256(tmp_path / "source.safetensors"), tmp_path / "result"
    folder.mkdir()
    arguments = COOK, tmp_path / "source.safetensors", folder / "out.safetensors"
    forker.run(*arguments)
    (folder / "out.safetensors").unlink()
    started = time.monotonic()
    forker.run(*arguments)
    duration = time.monotonic() - started
    expected = (folder / "out.safetensors").read_bytes()
    moments, interrupted = random.Random(0), 0
    for _ in range(KILLS):
        (folder / "out.safetensors").unlink(missing_ok=True)
        pid = forker.start(*arguments)
        time.sleep(moments.uniform(0, duration))
        with contextlib.suppress(ProcessLookupError):  # it had ended
            os.kill(pid, signal.SIGKILL)
        forker.wait()
        left = {path.name for path in folder.iterdir()}
        interrupted += "out.safetensors.cooking" in left
        assert left <= {"out.safetensors.cooking"} or left == {"out.safetensors"}
        if left == {"out.safetensors"}:
            assert (folder / "out.safetensors").read_bytes() == expected
        assert sha256(tmp_path / "source.safetensors") == before
    assert interrupted >= KILLS // 4
    (folder / "out.safetensors").unlink(missing_ok=True)
    (folder / "another.safetensors.cooking").write_bytes(b"left by a run for another name")
    forker.run(*arguments)
    assert [path.name for path in folder.iterdir()] == ["out.safetensors"]
    assert (folder / "out.safetensors").read_bytes() == expected


# Verify and compare


def test_verify(sources, tmp_path):
    file, src = tmp_path / "out.safetensors", sources / "bf16.safetensors"
    cook(src, file, Options("published", "bf16"))
    assert verify(file, src) == []
    found = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    found[LINEAR].view(torch.uint8).view(-1)[5] ^= 0x80
    found["blocks.1.attn1.to_q.scale_weight"] *= 2
    del found["blocks.0.norm2.bias"]
    found["more"] = torch.zeros(2)
    found["scale_shift_table"] = found["scale_shift_table"].float()
    save_file(found, tmp_path / "changed.safetensors", metadata)
    differences = verify(tmp_path / "changed.safetensors", src)
    assert len(differences) == 5
    for start in (
        f"{LINEAR}: 1 of 4096 values differ",
        "blocks.1.attn1.to_q.scale_weight: 1 of 1 values differ",
        "blocks.0.norm2.bias is missing",
        "more does not belong",
        "scale_shift_table is F32",
    ):
        assert any(line.startswith(start) for line in differences), start


def test_verify_a_file_without_metadata(sources, tmp_path):
    """As others made them: no metadata, the scale named after the weight or shaped [1]."""
    for convs in ("fp8", "bf16"):
        tensors = published(source(CASE), convs)
        save_file(
            {
                name.replace(".scale_weight", ".weight.scale_weight"): tensor.reshape(1) if tensor.ndim == 0 else tensor
                for name, tensor in tensors.items()
            },
            tmp_path / "theirs.safetensors",
        )
        assert verify(tmp_path / "theirs.safetensors", sources / "bf16.safetensors") == []
    assert verify(tmp_path / "theirs.safetensors", sources / "bf16.safetensors", Options("default")) != []


def test_verify_another_source(sources, tmp_path):
    cook(sources / "bf16.safetensors", tmp_path / "out.safetensors")
    tensors = source(CASE)
    tensors["proj_out.bias"][0] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    differences = verify(tmp_path / "out.safetensors", tmp_path / "other.safetensors")
    assert differences[0].startswith("proj_out.bias: 1 of") and "source with the SHA-256" in differences[1]


def test_compare(sources, tmp_path):
    cook(sources / "bf16.safetensors", tmp_path / "default.safetensors")
    report = cook(sources / "bf16.safetensors", tmp_path / "published.safetensors", Options("published"))
    again = compare(sources / "bf16.safetensors", tmp_path / "published.safetensors")
    assert {e.name: (e.max, pytest.approx(e.rms), e.zeroed, e.saturated, e.scale) for e in report.errors} == {
        e.name: (e.max, e.rms, e.zeroed, e.saturated, e.scale) for e in again.errors
    }
    assert (
        compare(tmp_path / "default.safetensors", tmp_path / "default.safetensors")
        .total(compare(tmp_path / "default.safetensors", tmp_path / "default.safetensors").errors)
        .max
        == 0
    )
    between = compare(tmp_path / "default.safetensors", tmp_path / "published.safetensors")
    assert between.total(between.errors).max > 0 and between.notes == []


def test_compare_files_of_other_tools(sources, tmp_path):
    """Native names, `scaled_fp8`, `scale_input`, `weight_scale`, a clipped weight, one that FP8 rounded to zero."""
    tensors = native(
        {
            "blocks.0.attn1.to_q.weight": torch.tensor([[1.0, -2.0], [0.5, 600.0]]),
            "blocks.0.attn1.to_k.weight": torch.tensor([[1e-9, 1.0]]),
            "blocks.0.attn1.to_q.bias": torch.ones(2),
        }
    )
    save_file(tensors, tmp_path / "a.safetensors")
    q, k = "blocks.0.self_attn.q", "blocks.0.self_attn.k"
    theirs = {
        f"{q}.weight": tensors[f"{q}.weight"].clamp(-448, 448).to(torch.float8_e4m3fn),
        f"{q}.bias": torch.ones(2),
        f"{q}.scale_weight": torch.ones(1),
        f"{q}.scale_input": torch.ones(1),
        f"{k}.weight": (tensors[f"{k}.weight"] / 2).to(torch.float8_e4m3fn),
        f"{k}.weight_scale": torch.tensor(2.0),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "blocks.0.modulation": torch.zeros(1),
    }
    save_file(theirs, tmp_path / "b.safetensors")
    report = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    errors = {error.name: error for error in report.errors}
    assert errors.keys() == {f"{q}.weight", f"{k}.weight"}
    assert errors[f"{q}.weight"].max == 152 and errors[f"{q}.weight"].saturated == 1
    assert errors[f"{k}.weight"].zeroed == 1 and errors[f"{k}.weight"].scale == 2
    assert report.notes == ["1 tensors are only in b.safetensors: blocks.0.modulation"]
    with pytest.raises(ValueError, match="no tensor name in common"):
        compare(sources / "bf16.safetensors", tmp_path / "b.safetensors")
    save_file(theirs | {f"{q}.scale_weight": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="one scale"):
        compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_report(sources, tmp_path):
    report = cook(sources / "bf16.safetensors", tmp_path / "out.safetensors")
    text, data = report.as_text(), report.as_dict()
    assert "larger in 0 of 43 weights" in text and "blocks.N.attn1.to_q" in text
    rms = [(w["rms_error"], w["published"]["rms_error"]) for w in data["weights"]]
    whole = 1 - data["total"]["rms_error"] / data["published_total"]["rms_error"]
    gains = [1 - ours / theirs for ours, theirs in rms]
    assert f"smaller by {whole:.2%} over all, by {min(gains):.2%} to {max(gains):.2%} per weight" in text and whole > 0
    assert len(data["worst"]) == 10 and all(name in text for name in data["worst"])
    relative = {w["name"]: w["relative_rms_error"] for w in data["weights"]}
    assert data["worst"] == sorted(relative, key=lambda name: -relative[name])[:10]
    assert all(w[error] <= w["published"][error] for w in data["weights"] for error in ("rms_error", "max_error"))
    picture = report.picture()
    assert picture.mode == "RGB" and len(picture.getcolors(10**6)) > 20


# The command line


CALLS = """
import contextlib, io, json, pathlib, runpy, sys
script = sys.argv[1]
sys.path[0] = str(pathlib.Path(script).parent)  # as Python itself does for a script
for line in sys.stdin:
    sys.argv = [script, *json.loads(line)]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
    assert "comfy" not in sys.modules and "numpy.testing" not in sys.modules
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def test_command_line(sources, tmp_path):
    """As a script, from another folder, without ComfyUI; one process makes all calls, as it begins by importing torch."""

    calls = subprocess.Popen(
        [sys.executable, "-c", CALLS, ROOT / "cook_worldstereo_fp8.py"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def call(*arguments):
        print(json.dumps([*map(str, arguments)]), file=calls.stdin, flush=True)
        return json.loads(calls.stdout.readline())

    src = sources / "bf16.safetensors"
    code, out, err = call(src, "out.safetensors", "--recipe", "published", "--report", "report", "--card", "card")
    assert code == 0, err
    assert "45 of them FP8" in out and "151 of 151 tensors" in err
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["report.json", "report.png", "report.txt"]
    assert json.loads((tmp_path / "report" / "report.json").read_text())["total"]["saturated_share"] == 0
    assert sorted(p.name for p in (tmp_path / "card").iterdir()) == [
        "LICENSE",
        "LICENSE-Apache-2.0",
        "NOTICE",
        "README.md",
        "config.json",
    ]
    assert sha256(src) in (tmp_path / "card" / "NOTICE").read_text()
    assert "| `blocks.N.attn1.to_q` | 2." in (tmp_path / "card" / "README.md").read_text()
    assert call("--verify", "out.safetensors", src)[0] == 0
    code, out, _ = call("--verify", "out.safetensors", src, "--recipe", "default")
    assert code == 1 and LINEAR in out
    code, out, _ = call("--compare", src, "out.safetensors")
    assert code == 0 and "45 weights" in out
    code, _, err = call(src, "out.safetensors")
    assert code == 1 and "error: out.safetensors exists already" in err and "Traceback" not in err
    code, _, err = call(src, "more.safetensors", "--card", "card")
    assert code == 1 and "error: card holds README.md" in err and not (tmp_path / "more.safetensors").exists()
    calls.stdin.close()
    assert calls.wait() == 0
