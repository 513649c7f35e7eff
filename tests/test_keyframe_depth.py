"""The depth of the keyframes that a scene remembers: which frames, with which lens, in which precision."""

import sys
from pathlib import Path

import pytest
import torch
from worldstereo_fp8.scene import keyframe_depth
from worldstereo_fp8.scene.camera_path import pinhole
from worldstereo_fp8.scene.cameras import Cameras
from worldstereo_fp8.scene.keyframe_depth import MOGE_BATCH, MOGE_LEVEL, TOKEN_BYTES, keyframe_geometry
from worldstereo_fp8.scene.memory import frames_to_remember

FRAMES, HEIGHT, WIDTH = 21, 24, 40
REMEMBERED = [3, 6, 9, 12, 14, 16, 18, 20]


class Recorder:
    """A MoGe model whose depth is the mean of each picture, and which keeps what it was asked."""

    load_device, num_tokens_range = torch.device("cpu"), (1200, 3600)

    def __init__(self):
        self.asked = []

    def infer(self, pictures, **options):
        self.asked.append((pictures, options, torch.is_autocast_enabled("cpu")))
        depth = pictures.mean(1)
        return {"depth": depth, "mask": depth > 0, "intrinsics": torch.eye(3).expand(len(depth), 3, 3)}


def clip():
    """Frames of one grey each, and cameras whose lens grows longer."""
    images = (torch.arange(1, FRAMES + 1) / FRAMES)[:, None, None, None].expand(FRAMES, HEIGHT, WIDTH, 3)
    one = pinhole(WIDTH, HEIGHT, 1.0)
    K = one.K.repeat(FRAMES, 1, 1)
    K[:, 0, 0] = K[:, 1, 1] = torch.linspace(20, 60, FRAMES)
    return images, Cameras(one.w2c.repeat(FRAMES, 1, 1), K, WIDTH, HEIGHT)


def test_the_remembered_frames_are_asked_for_with_their_lens():
    images, cameras = clip()
    model, done = Recorder(), []
    found = keyframe_geometry(model, images, cameras, 8, 5, 3, done.append)
    assert frames_to_remember(FRAMES) == REMEMBERED and done == [3, 3, 2]
    assert torch.equal(torch.cat([pictures for pictures, _, _ in model.asked]), images[REMEMBERED].movedim(-1, 1))
    lens = torch.cat([options["fov_x"] for _, options, _ in model.asked])
    torch.testing.assert_close(lens, cameras.fov[REMEMBERED])
    assert lens[0] > lens[-1] > 1
    assert all(options["resolution_level"] == 5 and not half for _, options, half in model.asked)
    torch.testing.assert_close(found["depth"], images[REMEMBERED, ..., 0])
    assert found["mask"].shape == (8, HEIGHT, WIDTH) and found["intrinsics"].shape == (8, 3, 3)


def test_more_cameras_are_thinned_and_fewer_refused():
    images, cameras = clip()
    few = [0, 10, 20]
    model = Recorder()
    keyframe_geometry(model, images[few], cameras, 8, 9, 4, lambda frames: None)
    torch.testing.assert_close(model.asked[0][1]["fov_x"], cameras.fov[[10, 20]])  # never the first frame
    with pytest.raises(ValueError, match="21 images and 20 cameras"):
        keyframe_geometry(model, images, cameras[list(range(20))], 8, 9, 4, lambda frames: None)
    with pytest.raises(ValueError, match="a clip needs 2 frames"):
        keyframe_geometry(model, images[:1], cameras, 8, 9, 4, lambda frames: None)


@pytest.mark.parametrize("half", [True, False])
def test_half_precision_where_the_device_is_faster_with_it(half, monkeypatch):
    asked = []
    monkeypatch.setattr(keyframe_depth, "should_use_fp16", lambda device: asked.append(device) or half)
    model = Recorder()
    keyframe_geometry(model, *clip(), 8, 9, 4, lambda frames: None)
    assert [used for _, _, used in model.asked] == [half] * 2 and asked == [model.load_device]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "level, batch, free, batches",
    [(9, 8, 9.5, [8]), (9, 8, 6.5, [5, 3]), (9, 4, 9.5, [4, 4]), (0, 8, 9.5, [8]), (9, 8, 2.5, [1] * 8), (9, 8, 0, [1] * 8)],
)  # fmt: skip
def test_the_batch_is_what_fits_into_memory(level, batch, free, batches, monkeypatch):
    freed, picture = [], TOKEN_BYTES * (1200, 3600)[level == 9]
    monkeypatch.setattr(keyframe_depth, "free_memory", lambda size, device: freed.append((size, device)))
    monkeypatch.setattr(keyframe_depth, "get_free_memory", lambda device: free * picture)
    model, done = Recorder(), []
    keyframe_geometry(model, *clip(), 8, level, batch, done.append)
    assert freed == [(5 * picture, model.load_device)] and done == batches


def test_it_stops_between_two_batches(monkeypatch):
    model = Recorder()

    def stop():
        if model.asked:
            raise InterruptedError

    monkeypatch.setattr(keyframe_depth, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(InterruptedError):
        keyframe_geometry(model, *clip(), 8, 9, 2, lambda frames: None)
    assert len(model.asked) == 1


@pytest.fixture
def random_moge(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parent.parent / "benchmarks"), *sys.path])
    from moge import random_moge

    return random_moge


def test_cores_moge_gives_each_frame_its_own_depth(random_moge):
    """The same as from core's model with one picture at a time."""
    model, cameras = random_moge(toy=True), clip()[1][list(range(5))]
    images = torch.rand(5, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = keyframe_geometry(model, images, cameras, 8, MOGE_LEVEL, MOGE_BATCH, lambda frames: None)
        for place, frame in enumerate((1, 2, 3, 4)):
            alone = model.infer(images[frame : frame + 1].movedim(-1, 1), fov_x=cameras.fov[frame].item())
            both = found["mask"][place] & alone["mask"][0].cpu()
            assert (found["mask"][place] == alone["mask"][0].cpu()).float().mean() > 0.99 and both.any()
            error = (found["depth"][place][both] / alone["depth"][0].cpu()[both] - 1).abs()
            assert error.median() < (0.002 if model.load_device.type == "cuda" else 1e-5)
            torch.testing.assert_close(found["intrinsics"][place], alone["intrinsics"][0].cpu())
    assert found["depth"].isinf().equal(~found["mask"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision on a GPU")
def test_half_precision_gives_the_depth_of_float32(random_moge, monkeypatch):
    model, images, cameras = random_moge(), torch.rand(9, 480, 832, 3), clip()[1][list(range(9))]
    given = (model, images, cameras, 8, MOGE_LEVEL, MOGE_BATCH, lambda frames: None)
    with torch.inference_mode():
        torch.cuda.reset_peak_memory_stats()
        half = keyframe_geometry(*given)
        estimate = TOKEN_BYTES * model.num_tokens_range[1] * MOGE_BATCH
        assert 0.8 * estimate < torch.cuda.max_memory_allocated() < 1.2 * estimate + 1e9  # MoGe itself is 0.65 GB
        monkeypatch.setattr(keyframe_depth, "should_use_fp16", lambda device: False)
        whole = keyframe_geometry(*given)
    both = half["mask"] & whole["mask"]
    error = (half["depth"][both] / whole["depth"][both] - 1).abs()
    assert 0 < error.median() < 0.002 and (half["mask"] == whole["mask"]).float().mean() > 0.99
