"""ComfyUI's context windows: a window is sampled as a clip of its own, with its own part of the conditioning."""

import comfy.sample
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_edit_model import ReferenceLatent
from test_comfyui import conditioning, load, sample
from toy import GOLDEN, golden_inputs, relative_error
from worldstereo_fp8.worldstereo import context_windows

FRAMES, WINDOW = 6, 3


def cond_of(case: str) -> dict[str, torch.Tensor]:
    """The conditioning of six keyframes; a memory variant's three references were chosen for keyframes 1, 3 and 5."""
    pixels = 4 * (FRAMES - 1) + 1 if case == "camera_maskds4" else FRAMES
    torch.manual_seed(11)
    values = {
        "concat_latent_image": torch.randn(1, 16, FRAMES, 6, 8),
        "concat_mask": torch.cat([torch.zeros(1, 1, 1, 6, 8), torch.ones(1, 1, FRAMES - 1, 6, 8)], dim=2),
        "render_latent": torch.randn(1, 16, FRAMES, 6, 8),
        "render_mask": (torch.rand(1, 1, pixels, 48, 64) > 0.5).float(),
        "camera_embedding": torch.randn(1, 6, pixels, 48, 64),
    }
    if case == "memory_dmd":
        values |= {
            "reference_latent": torch.randn(1, 16, 3, 6, 8),
            "ref_index": torch.tensor([[0, 2, 4]]),
            "camera_qt": torch.randn(1, FRAMES, 7),
            "camera_qt_ref": torch.randn(1, 3, 7),
        }
    return values


def part_of(values: dict, frames: list[int], pixels: list[int], kept: list[int], ref_index: list[int]) -> dict:
    """The same for some of the keyframes and references, written out."""
    out = {name: values[name][:, :, frames] for name in ("concat_latent_image", "concat_mask", "render_latent")}
    out |= {name: values[name][:, :, pixels] for name in ("render_mask", "camera_embedding")}
    if "ref_index" in values:
        out |= {
            "reference_latent": values["reference_latent"][:, :, kept],
            "ref_index": torch.tensor([ref_index]),
            "camera_qt": values["camera_qt"][:, frames],
            "camera_qt_ref": values["camera_qt_ref"][:, kept],
        }
    return out


def run(patcher, case: str, values: dict, noise: torch.Tensor) -> torch.Tensor:
    class Vision:
        penultimate_hidden_states = golden_inputs(case)[0]["encoder_hidden_states_image"]

    text = torch.randn(1, 512, 48, generator=torch.Generator().manual_seed(2))
    positive = [[text, values | {"clip_vision_output": Vision}]]
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(
        patcher, noise, 1, 1.0, "euler", "simple", positive, positive, latent, seed=7, disable_pbar=True
    )


@pytest.mark.parametrize("case", ["memory_dmd", "camera", "camera_maskds4"])
@pytest.mark.parametrize("retained", ["", "0"])
def test_windows_equal_clips_of_their_own(case, retained):
    patcher = load(GOLDEN / f"{case}.weights.safetensors")
    values, noise = cond_of(case), torch.randn(1, 16, FRAMES, 6, 8, generator=torch.Generator().manual_seed(3))
    windowed = ContextWindowsManualNode.execute(
        patcher, WINDOW, 0, "batched", 1, False, "flat", 2, False, retained, causal_window_fix=False
    ).result[0]
    out = run(windowed, case, values, noise)
    d = 4 if case == "camera_maskds4" else 1
    first, second = [0, 1, 2], [0 if retained else 3, 4, 5]
    pixels = {1: [second[0], 4, 5], 4: [4 * second[0], *range(13, 21)]}[d]
    kept, ref_index = ([2], [1]) if retained else ([1, 2], [0, 1])
    expected = [
        run(patcher, case, part_of(values, first, list(range(d * 2 + 1)), [0], [0]), noise[:, :, :3]),
        run(patcher, case, part_of(values, second, pixels, kept, ref_index), noise[:, :, 3:]),
    ]
    assert relative_error(out, torch.cat(expected, dim=2)) < 1e-5


def test_with_overlap_anchor_and_guidance():
    """What core's own node does by default: windows that overlap, each begun one keyframe early."""
    patcher = load(GOLDEN / "memory_dmd.weights.safetensors")
    windowed = ContextWindowsManualNode.execute(
        patcher, WINDOW, 1, "standard_static", 1, False, "pyramid", 2, False, ""
    ).result[0]
    noise = torch.randn(1, 16, FRAMES, 6, 8, generator=torch.Generator().manual_seed(3))
    out = run(windowed, "memory_dmd", cond_of("memory_dmd"), noise)
    assert out.shape == noise.shape and out.isfinite().all()


def test_references_of_a_window():
    chosen_for = [1, 3, 5]
    assert context_windows.references(chosen_for, [0, 1, 2]) == ([0], [0])
    assert context_windows.references(chosen_for, [2, 3, 4, 5]) == ([1, 2], [0, 2])
    assert context_windows.references(chosen_for, [6, 7, 8]) == ([2], [0])  # none is of these: the nearest
    assert context_windows.references([1], [9, 10]) == ([0], [0])


def test_pixel_frames_of_a_window():
    assert context_windows.pixel_frames([0, 1, 2], 1) == [0, 1, 2]
    assert context_windows.pixel_frames([0, 1, 2], 4) == list(range(9))
    assert context_windows.pixel_frames([2, 3], 4) == [8, 9, 10, 11, 12]
    assert context_windows.pixel_frames([5, 0], 4) == [20, 0, 0, 0, 0]  # a looped window


def test_cores_reference_latent_is_reported_and_left_out(caplog):
    """It is called like ours, and is another thing."""
    patcher = load(GOLDEN / "memory_dmd.weights.safetensors")
    for changes in ({}, {"reference_latent": None, "ref_index": None, "camera_qt_ref": None}):
        positive = conditioning(0, **changes)
        plain = sample(patcher, positive, positive, steps=1)
        given = ReferenceLatent.execute(positive, {"samples": torch.randn(1, 16, 1, 6, 8)}).result[0]
        assert torch.equal(sample(patcher, given, given, steps=1), plain)
    said = [record for record in caplog.records if "ReferenceLatent has no effect" in record.getMessage()]
    assert len(said) == 1


def test_conditions_are_converted_once_for_positive_and_negative():
    patcher = load(GOLDEN / "memory_dmd.weights.safetensors")
    values = {k: v for k, v in conditioning(0)[0][1].items() if k != "clip_vision_output"}
    noise, device = torch.zeros(1, 16, 3, 6, 8), patcher.load_device
    positive, negative = (patcher.model.extra_conds(noise=noise, device=device, **values) for _ in range(2))
    for name in ("render_latent", "reference_latent", "camera_qt", "ref_index"):
        assert positive[name].cond is negative[name].cond
    moved = [patcher.model._on_device("camera_qt", values["camera_qt"], torch.device(name)) for name in ("cpu", "meta")]
    assert [value.device.type for value in moved] == ["cpu", "meta"]
