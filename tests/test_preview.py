"""What sampling shows: all keyframes, and the same samples as without."""

import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from worldstereo_fp8.worldstereo.preview import KeyframeLatents, show_keyframes, tiled


def test_tiles_are_in_reading_order_and_as_near_to_a_square_as_can_be():
    x0 = torch.arange(21.0).view(1, 1, 21, 1, 1).expand(1, 16, 21, 60, 104)
    sheet = tiled(x0)
    assert sheet.shape == (1, 16, 1, 6 * 60, 4 * 104)
    numbers = sheet[0, 0, 0, ::60, ::104].flatten()
    assert numbers.tolist() == [*range(21), 0, 0, 0]
    assert tiled(x0.mT).shape[3:] == (4 * 104, 6 * 60)
    assert tiled(x0[:, :, :1]).shape == (1, 16, 1, 60, 104)


def test_core_previews_through_the_latent_format(monkeypatch):
    for method in (LatentPreviewMethod.Auto, LatentPreviewMethod.TAESD):
        monkeypatch.setattr(args, "preview_method", method)
        previewer = latent_preview.get_previewer(torch.device("cpu"), KeyframeLatents())
        assert previewer.decode_latent_to_preview(torch.zeros(1, 16, 21, 60, 104)).size == (416, 360)


def test_the_samplers_own_callback_is_called_too(monkeypatch):
    x0 = torch.zeros(1, 16, 2, 4, 4)
    for method, replaced in ((LatentPreviewMethod.NoPreviews, True), (LatentPreviewMethod.Auto, False)):
        monkeypatch.setattr(args, "preview_method", method)
        calls = []
        own = lambda *step, calls=calls: calls.append(step)

        def executor(noise, latent, sampler, sigmas, mask, callback, *rest, **named):
            assert rest == (True, 7) and named == {"latent_shapes": [1]}
            callback(0, x0, x0, 3)
            return callback

        given = show_keyframes(executor, x0, x0, None, torch.ones(4), None, own, True, 7, latent_shapes=[1])
        assert calls == [(0, x0, x0, 3)] and (given is not own) == replaced
