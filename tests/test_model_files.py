"""When ComfyUI runs Load WorldStereo FP8 and Cook FP8 again: whenever a file they depend on is another."""

import json
import os
import shutil

import folder_paths
import pytest
from toy import golden_weights, save, source
from worldstereo_fp8.comfy_nodes import cook as cook_node
from worldstereo_fp8.comfy_nodes.cook import CookFP8
from worldstereo_fp8.comfy_nodes.files import file_name
from worldstereo_fp8.comfy_nodes.model import LoadWorldStereoFP8

CASE = "memory_dmd"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    for name in ("model", "base"):
        save(source(CASE), tmp_path / f"{name}.safetensors", golden_weights(CASE)[1])
    return tmp_path


def replaced_with_the_same_size_and_time(path):
    """As a copy that keeps the times, or a second download within a clock tick."""
    status = path.stat()
    shutil.copy(path, path.with_suffix(".new"))
    os.utime(path.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(path.with_suffix(".new"), path)


CHANGES = {
    "the model's time": lambda folder: os.utime(folder / "model.safetensors", (1, 1)),
    "the model's file": lambda folder: replaced_with_the_same_size_and_time(folder / "model.safetensors"),
    "the base": lambda folder: os.utime(folder / "base.safetensors", (1, 1)),
    "a new config.json": lambda folder: (folder / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_load_notices(change, folder):
    inputs = {"model_name": "model.safetensors", "base_model": "base.safetensors", "compute": "auto"}
    before = LoadWorldStereoFP8.fingerprint_inputs(**inputs)
    assert LoadWorldStereoFP8.fingerprint_inputs(**inputs) == before
    CHANGES[change](folder)
    assert LoadWorldStereoFP8.fingerprint_inputs(**inputs) != before


def test_cook_notices(folder, monkeypatch):
    """The source, the config.json, and the result that was deleted or replaced by hand; not its own new result."""
    monkeypatch.setattr(cook_node, "show_on_node", lambda *_: None)
    inputs = {"source": "model.safetensors", "result": "out", "recipe": "default", "convs": "bf16", "overwrite": False}

    def fingerprint():
        return json.dumps(CookFP8.fingerprint_inputs(**inputs))

    seen = [fingerprint()]
    CookFP8.execute(**inputs)
    assert fingerprint() == seen[0]  # ComfyUI answers the second run from its cache
    (folder / "out.safetensors").unlink()
    seen.append(fingerprint())
    assert fingerprint() == seen[-1]
    CookFP8.execute(**inputs)
    assert fingerprint() == seen[-1]
    replaced_with_the_same_size_and_time(folder / "out.safetensors")
    seen.append(fingerprint())
    (folder / "config.json").write_text("{}")
    seen.append(fingerprint())
    os.utime(folder / "model.safetensors", (1, 1))
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen) == 5


def test_a_cooks_last_words_say_where_the_file_is_and_what_to_press(folder, monkeypatch):
    said = []
    monkeypatch.setattr(cook_node, "show_on_node", lambda _, text: said.append(text))
    (folder / "variant").mkdir()
    (folder / "model.safetensors").rename(folder / "variant" / "model.safetensors")
    CookFP8.execute("variant/model.safetensors", "out", "default", "bf16", False)
    assert said[-1].startswith("Done: variant/out.safetensors in models/diffusion_models.\nPress R")
    assert (folder / "variant" / "out.safetensors").is_file()


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800", "a" * 250, "\x1b[31m"])
def test_names_that_no_file_system_takes(name):
    with pytest.raises(ValueError, match="is not a file name") as caught:
        file_name(name, ".safetensors")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
