"""Model files, indexes and configurations made to hurt: the smallest file of each kind, and what becomes of it."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy import golden_weights, save, source
from worldstereo_fp8 import cook_worldstereo_fp8 as command
from worldstereo_fp8 import remap
from worldstereo_fp8.fp8.cook import cook
from worldstereo_fp8.fp8.files import open_files
from worldstereo_fp8.fp8.report import Report, WeightError
from worldstereo_fp8.loaders import load_worldstereo
from worldstereo_fp8.worldstereo.config import CONFIG_TENSOR, WorldStereoConfig, config_to_embed
from worldstereo_fp8.worldstereo.schedule import dmd_sigmas

CASE = "memory_dmd"
TOOLS = {
    "load": load_worldstereo,
    "cook": lambda path: cook(
        path, path.with_name("out.safetensors"), refusal=remap.source_refusal, find_config=config_to_embed
    ),
}


def file_of(tmp_path: Path, header: bytes | str | dict, data: bytes = b"", name: str = "m.safetensors") -> Path:
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    path = tmp_path / name
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def one(name: str = "a.weight", dtype: str = "BF16", shape=(1,), offsets=(0, 2)) -> dict:
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def assert_clear(error: BaseException, *named: str):
    """One printable line, not too long, that names what is meant."""
    text = str(error)
    assert isinstance(error, ValueError | OSError), repr(error)
    assert text.isprintable() and len(text) < 700, text[:1000]
    assert all(name in text for name in named), text


HEADERS = {
    "a surrogate in a name": one("\ud800"),
    "escapes in a name": one("\x1b[31m\n"),
    "a surrogate in a dtype": one(dtype="\ud800"),
    "a surrogate in the metadata": {"__metadata__": {"config": '"\ud800"'}} | one(),
    "a name of 50 kB": one("blocks.0." + "x" * 50_000),
    "a name of 120 kB of numbers": one("a" + ".1" * 60_000),
    "a thousand axes of 4,300 digits": f'{{"a": {{"dtype": "BF16", "data_offsets": [0, 2], "shape": [{"9" * 4300}]}}}}',
    "a thousand axes": one(shape=[10**18] * 1000),
    "nine axes": one(shape=[1] * 9),
    "an axis larger than the file": one(shape=[2**40, 2**40]),
    "5,000 digits": f'{{"a": {{"dtype": "BF16", "shape": [1], "data_offsets": [0, {"1" * 5000}]}}}}',
    "100,000 brackets": "[" * 100_000,
    "shapes that are true": one(shape=[True]),
    "shapes that are text": one(shape=["1"]),
    "shapes that are fractions": one(shape=[1.0]),
    "offsets out of order": one(offsets=(2, 0)),
    "no object for a tensor": {"a": [1]},
    "block 100000": one("blocks.100000.attn1.to_q.weight", shape=[1, 1]),
    "block with Arabic digits": one("blocks.٣.attn1.to_q.weight", shape=[1, 1]),
    "too many tensors": {f"a{i}": one(shape=[0], offsets=(0, 0))["a.weight"] for i in range(20_001)},
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("header", HEADERS)
def test_a_header(tool, header, tmp_path):
    started = time.monotonic()
    with pytest.raises((ValueError, OSError)) as caught:
        TOOLS[tool](file_of(tmp_path, HEADERS[header], b"\0\0"))
    assert_clear(caught.value, "m.safetensors")
    assert time.monotonic() - started < 5
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("tool", TOOLS)
def test_an_entry_that_the_format_does_not_have(tool, tmp_path):
    """It may hold a lone surrogate, which the safetensors library does not read."""
    header = {"a.weight": one()["a.weight"] | {"config": {"\ud800": []}}}
    with pytest.raises(ValueError, match=r"a\.weight has config beside dtype, shape and data_offsets"):
        TOOLS[tool](file_of(tmp_path, header, b"\0\0"))


@pytest.mark.skipif(sys.platform == "win32" or sys.platform == "darwin", reason="names there are Unicode")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_name_that_is_no_text(tool, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.safetensors"))
    path.write_bytes(b"\0" * 20)
    with pytest.raises(ValueError) as caught:
        TOOLS[tool](path)
    assert_clear(caught.value, r"bad\udcff.safetensors")


NEEDS_FIFO = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFOs")
NEEDS_ZERO = pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="Windows has no /dev/zero")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "kind",
    [
        "folder",
        pytest.param("fifo", marks=NEEDS_FIFO),
        pytest.param("shard", marks=NEEDS_FIFO),
        pytest.param("device", marks=NEEDS_ZERO),
    ],
)
def test_no_ordinary_file(tool, kind, tmp_path):
    path = tmp_path / "m.safetensors"
    if kind == "shard":
        path = tmp_path / "m.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors"}}))
        os.mkfifo(tmp_path / "m-1.safetensors")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises((ValueError, OSError)) as caught:
        TOOLS[tool](path)
    assert_clear(caught.value, "m.safetensors" if kind != "shard" else "m")


INDEXES = {
    "an empty weight_map": {"weight_map": {}},
    "numbers as shards": {"weight_map": {"a": 5}},
    "a list": [1],
    "a list of names": {"weight_map": ["a"]},
    "an absolute shard": {"weight_map": {"a": "/etc/passwd"}},
    "a shard above": {"weight_map": {"a": "../a.safetensors"}},
    "a shard by Windows": {"weight_map": {"a": "C:a.safetensors"}},
    "no shard's name": {"weight_map": {"a": ""}},
    "the folder itself": {"weight_map": {"a": "."}},
    "a NUL": {"weight_map": {"a": "a\0.safetensors"}},
    "a surrogate": {"weight_map": {"a": "\ud800.safetensors"}},
    "a name of 100 kB": {"weight_map": {"a": "a" * 100_000}},
    "2 MB": {"weight_map": {"a": "b"}, "more": "x" * 2_000_000},
    "100,000 brackets": "[" * 100_000,
    "5,000 digits": '{"weight_map": ' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("index", INDEXES)
def test_an_index(index, tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    content = INDEXES[index]
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises((ValueError, OSError)) as caught:
        cook(path, tmp_path / "out.safetensors")
    assert_clear(caught.value, path.name)


def config(**changes) -> dict:
    return golden_weights(CASE)[1] | changes


def control(**changes) -> dict:
    return {"controlnet_cfg": config()["controlnet_cfg"] | changes}


CONFIGS = {
    "dmd_steps": [2**27, 101, 0, -1, 4.0, True, "4"],
    "scale_map": [[[4096, 4096]], [[16, 65552]], [[480, 832]] * 65, [], [[0, 16]], [[-16, -16]], [[480.0, 832]], {}],
    "dmd_start_steps": [0, -250, 1001, 1000, 999, 1e999, "250", True, float("nan")],
    "dmd_end_steps": [250, 251, 0, 1001, 2.5e300],
    "gen_shift": [0, -1, 1e999, 1e300, 10**60, "x", [], True],
    "nframe": [0, 82, 10**7, 21.0, "21"],
    "eps": [0, -1, 1, 1e999],
    "num_attention_heads": [0, 3, 64, 32, -2, 2.0, 10**50],
    "attention_head_dim": [0, 10**9, "x"],
    "latent_cond_mode": ["other", 5, []],
    "model_type": ["flux", ["worldstereo-memory"], "worldstereo-camera", "\ud800" * 1000],
    "negative_prompt": [5, "\ud800", "x" * 10_001],
    "controlnet_cfg": [5, [], "x"],
}
CASES = [(key, {key: value}) for key, values in CONFIGS.items() for value in values]
CASES += [("num_heads", control(num_heads=value)) for value in (0, 3, 32, 16, -2, "2", 2.5)]
CASES += [("update_ref", control(update_ref=value)) for value in (1, "false")]
CASES += [("dim", control(dim=value)) for value in (99, "\x1b[31m", ["x"] * 1000)]


@pytest.mark.parametrize("key, change", CASES, ids=[f"{key}-{i}" for i, (key, _) in enumerate(CASES)])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_value_of_the_configuration(tool, key, change, tmp_path):
    path = save(source(CASE), tmp_path / "m.safetensors", config(**change))
    with pytest.raises(ValueError) as caught:
        TOOLS[tool](path)
    assert_clear(caught.value, "m.safetensors", "its own config does not fit", key)


def test_what_the_ranges_leave_is_bounded():
    """The largest of everything still gives falling sigmas from at most 1 and a latent of 81 frames of 1024×1024."""
    for shift in (0.1, 100.0):
        sigmas = dmd_sigmas(WorldStereoConfig(gen_shift=shift, dmd_steps=100, dmd_start_steps=901.0))
        assert sigmas[0] == 1 and (sigmas[1:] < sigmas[:-1]).all() and len(sigmas) == 101


SHAPES = {
    "a scalar in an anchor's place": ("controlnet.proj_in.weight", ()),
    "a vector in an anchor's place": ("patch_embedding.weight", (64,)),
    "too many axes": ("controlnet.proj_in.weight", (32, 64, 1)),
    "a mask kernel of 12 channels": ("controlnet.controlnet_mask_embedding.mask_proj.0.weight", (12, 7, 1, 8, 8)),
    "a mask kernel of 0 channels": ("controlnet.controlnet_mask_embedding.mask_proj.0.weight", (0, 7, 1, 8, 8)),
    "a mask kernel of 5 frames": ("controlnet.controlnet_mask_embedding.mask_proj.0.weight", (16, 7, 5, 8, 8)),
    "an odd number of frequencies": ("condition_embedder.time_embedder.linear_1.weight", (64, 255)),
    "a camera MLP without columns": ("camera_embedding.0.weight", (16, 0)),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_shape(tool, case, tmp_path):
    name, shape = SHAPES[case]
    path = save(source(CASE) | {name: torch.ones(shape, dtype=torch.bfloat16)}, tmp_path / "m.safetensors", config())
    with pytest.raises(ValueError) as caught:
        TOOLS[tool](path)
    assert_clear(caught.value, "m.safetensors", name.split(".")[-2].replace("linear_1", "time_embed"))


def test_control_heads_that_do_not_divide_by_the_default(tmp_path):
    """No configuration, and 16 heads are none of 32 channels that RoPE could turn."""
    path = save(source(CASE), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="has no configuration.*num_heads is 16, expected a divisor of 32"):
        load_worldstereo(path)
    TOOLS["cook"](path)  # the config.json may come later
    assert "config" not in open_files(tmp_path / "out.safetensors").metadata


def test_the_text_in_a_configuration_tensor(tmp_path):
    for value in (torch.ones(3), torch.zeros(2**20 + 1, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)):
        path = save(source(CASE) | {CONFIG_TENSOR: value}, tmp_path / "m.safetensors")
        with pytest.raises(ValueError) as caught:
            load_worldstereo(path)
        assert_clear(caught.value, "m.safetensors", CONFIG_TENSOR)


def test_what_the_safetensors_library_does_not_read_is_named(tmp_path):
    path = save(source(CASE), tmp_path / "m.safetensors", config())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b"[0,", b"[-0,", 1)  # a whole number to Python, not to the library
    assert b"[-0," in header
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    with pytest.raises(ValueError) as caught:
        load_worldstereo(path)
    assert_clear(caught.value, "m.safetensors cannot be read by ComfyUI")


@pytest.mark.parametrize("group", ["x", None, 0, -4, 2.5, True, [256], 10**50])
@pytest.mark.parametrize("nested", [False, True])
def test_a_rotation_of_no_group(group, nested, tmp_path):
    rotation = {"convrot": True, "convrot_groupsize": group}
    quant = {"format": "int8_tensorwise"} | ({"params": rotation} if nested else rotation)
    layer = "blocks.0.attn1.to_q"
    tensors = source(CASE) | {
        f"{layer}.weight": torch.ones(64, 64, dtype=torch.int8),
        f"{layer}.weight_scale": torch.ones(64, 1),
        f"{layer}.comfy_quant": torch.tensor(list(json.dumps(quant).encode()), dtype=torch.uint8),
    }
    path = save(tensors, tmp_path / "m.safetensors", config())
    with pytest.raises(ValueError) as caught:
        load_worldstereo(path)
    assert_clear(caught.value, "m.safetensors", "blocks.0.attn1.to_q.comfy_quant", "group")


def test_the_picture_is_bounded():
    errors = [WeightError(f"a.{i}.weight", 1) for i in (0, 7, 10**5, 10**8, 10**300)]
    errors += [WeightError(f"{name}.weight", 1) for name in ("\n", "\ud800", "x" * 300, *map(str, range(500)))]
    image = Report([("a", "b")], errors).picture()
    assert image.width < 4000 and image.height < 4000
    Report([("a", "b")], errors).as_text().encode()


COMMANDS = {
    "a broken source": ["bad.safetensors", "out.safetensors"],
    "no source": ["none.safetensors", "out.safetensors"],
    "a folder as the source": [".", "out.safetensors"],
    "a folder as the result": ["m.safetensors", "folder.safetensors", "--overwrite"],
    "a folder as the configuration": ["m.safetensors", "out.safetensors", "--config", "."],
    "a file as the folder of the report": ["m.safetensors", "out.safetensors", "--report", "bad.safetensors"],
    "a file in the folder of the card": ["m.safetensors", "out.safetensors", "--card", "bad.safetensors/x"],
    "a NUL in the result": ["m.safetensors", "a\0.safetensors"],
    "a long name": ["m.safetensors", "a" * 300 + ".safetensors"],
    "a name that is no text": ["m.safetensors", "nowhere\udcff/out.safetensors"],
    "verify": ["--verify", "bad.safetensors", "m.safetensors"],
    "compare": ["--compare", "bad.safetensors", "m.safetensors"],
}


@pytest.mark.parametrize("arguments", COMMANDS)
def test_the_command_line_says_it_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    save(source(CASE), tmp_path / "m.safetensors", config())
    (tmp_path / "folder.safetensors").mkdir()
    file_of(tmp_path, HEADERS["a surrogate in a name"], b"\0\0", "bad.safetensors")
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert command.main(COMMANDS[arguments]) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and printed[0].startswith("error: "), printed
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_names_do_not_cost_the_square_of_their_length():
    """In a process of its own, whose memory is limited."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30));" if os.name != "nt" else ""
    root = str(Path(command.__file__).parent)
    script = f"import sys; sys.path.insert(0, {root!r}); import cook_worldstereo_fp8 as c; {limited}"
    script += "name = 'a' + '.1' * 60000; print(c.remap.is_native(name), bool(c.remap.source_refusal(name)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True"], done.stderr[-2000:]


def test_an_index_beside_its_shards_is_read_whole(tmp_path):
    save(source(CASE), tmp_path / "m-1.safetensors", config())
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(source(CASE), "m-1.safetensors")}), encoding="utf-8-sig")
    assert len(open_files(index).tensors) == len(source(CASE))
