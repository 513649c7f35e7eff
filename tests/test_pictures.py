"""Pictures brought to the model's size, transparent ones laid on a colour, and what is said of other shapes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from worldstereo_fp8.scene import pictures as pictures_module
from worldstereo_fp8.scene.fit import fit_pictures, lay_on
from worldstereo_fp8.scene.pictures import resize_pictures, stretches, within


def noise(height, width, channels=3, count=1):
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "position, rows, amount", [(0.5, slice(10, 50), "10 px top, 10 px bottom"), (0.0, slice(0, 40), "20 px bottom")]
)
def test_crop_keeps_a_part_of_the_models_shape_and_shows_it(position, rows, amount):
    picture = noise(60, 80)
    fitted, preview, line = fit_pictures(picture, 20, 40, "crop", position)
    torch.testing.assert_close(fitted, resize_pictures(picture[:, rows], 20, 40))
    assert line == f"80×60 to 40×20: cropped by {amount}"
    outside = torch.ones(60, dtype=torch.bool)
    outside[rows] = False
    assert preview.shape == picture.shape
    torch.testing.assert_close(preview[:, rows], picture[:, rows])
    torch.testing.assert_close(preview[:, outside], picture[:, outside] * 0.35)


def test_a_picture_of_one_line_of_pixels_keeps_it():
    fitted, _, line = fit_pictures(noise(1000, 1), 16, 16, "pad")
    torch.testing.assert_close(fitted[:, :, 8:9], resize_pictures(noise(1000, 1), 16, 1))
    assert (fitted[:, :, :8] == 0.5).all() and line.endswith("padded with 8 px left, 7 px right")
    assert fit_pictures(noise(1, 1000), 16, 16, "pad")[2].endswith("padded with 8 px top, 7 px bottom")
    assert fit_pictures(noise(1000, 1), 320, 832, "crop")[2].endswith("cropped by 500 px top, 499 px bottom")
    assert fit_pictures(noise(1, 1000), 832, 320, "crop")[2].endswith("cropped by 500 px left, 499 px right")


def test_pad_keeps_all_and_adds_the_colour():
    fitted, preview, line = fit_pictures(noise(40, 40, count=2), 20, 40, "pad", 1.0, (0.25, 0.5, 0.75))
    torch.testing.assert_close(fitted[:, :, 20:], resize_pictures(noise(40, 40, count=2), 20, 20))
    assert (fitted[:, :, :20] == torch.tensor([0.25, 0.5, 0.75])).all()
    assert line == "40×40 to 40×20: padded with 20 px left" and torch.equal(preview, fitted[:1])


def test_stretch_says_by_how_much():
    picture = noise(512, 768)
    fitted, _, line = fit_pictures(picture, 480, 832, "stretch")
    assert torch.equal(fitted, resize_pictures(picture, 480, 832))
    assert line == "768×512 to 832×480: 16% wider"


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_picture_of_the_models_size_is_left_alone(fit):
    picture = noise(32, 48)
    fitted, preview, line = fit_pictures(picture, 32, 48, fit)
    torch.testing.assert_close(fitted, picture)
    torch.testing.assert_close(preview, picture)
    assert line.startswith("48×32 to 48×32: not") or "nothing" in line


def test_pictures_are_resized_as_pillow_does():
    """WorldStereo's own resizing; Pillow rounds to bytes between its two passes."""
    picture = (noise(96, 130) * 255).round() / 255
    pillow = Image.fromarray((picture[0] * 255).byte().numpy()).resize((48, 32), Image.Resampling.BICUBIC)
    difference = resize_pictures(picture, 32, 48)[0] * 255 - torch.from_numpy(np.array(pillow))
    assert difference.abs().max() < 1.5


@pytest.mark.parametrize("antialias", [True, False])
def test_pictures_that_have_the_size_are_not_resampled(antialias, monkeypatch):
    pictures = torch.rand(2, 9, 12, 4) * 1.2 - 0.1
    channels = pictures[..., :3].movedim(-1, 1)
    resampled = F.interpolate(channels, (9, 12), mode="bicubic", antialias=antialias).movedim(1, -1)
    monkeypatch.setattr(pictures_module, "F", None)
    assert torch.equal(resize_pictures(pictures, 9, 12, antialias), resampled.clamp(0, 1))


def test_transparent_parts_are_laid_on_the_colour():
    picture, colour = noise(8, 12, 4), (1.0, 0.5, 0.0)
    laid, transparent = lay_on(picture, None, colour)
    torch.testing.assert_close(
        laid, picture[..., :3] * picture[..., 3:] + torch.tensor(colour) * (1 - picture[..., 3:])
    )
    assert transparent
    mask = torch.zeros(1, 8, 12)
    mask[:, :, 6:] = 1
    laid, transparent = lay_on(picture[..., :3], mask, colour)
    assert transparent and (laid[:, :, 6:] == torch.tensor(colour)).all()
    assert torch.equal(laid[:, :, :6], picture[:, :, :6, :3])
    laid, transparent = lay_on(picture[..., :3], torch.zeros(1, 64, 64), colour)  # Load Image's, of an opaque picture
    assert not transparent and torch.equal(laid, picture[..., :3])
    fine = torch.zeros(1, 32, 48)
    fine[:, ::2] = 1  # every second line: half transparent where four lines become one
    laid, _ = lay_on(picture[..., :3], fine, colour)
    torch.testing.assert_close(laid[:, 2:-2], (picture[..., :3] + torch.tensor(colour))[:, 2:-2] / 2, atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="transparency holds 2 masks for 3 pictures"):
        lay_on(noise(8, 12, count=3), mask.expand(2, 8, 12), colour)


def test_what_another_shape_stretches_is_reported():
    assert stretches(480, 832, image=(512, 768), render_video=(960, 1664), cameras=(483, 832)) == [
        "image 768×512 stretched to 832×480: 16% wider"
    ]
    assert stretches(480, 832, image=(512, 768), cameras=(512, 768)) == [
        "image, cameras 768×512 stretched to 832×480: 16% wider"
    ]
    assert stretches(480, 832, image=(100, 200)) == ["image 200×100 stretched to 832×480: 15% taller"]


def test_a_large_picture_is_reduced_in_its_shape():
    assert within(512, 784) == (512, 784)
    height, width = within(3000, 4000)
    assert height * width <= 2**19 * 1.01 and height / width == pytest.approx(0.75, abs=0.01)
