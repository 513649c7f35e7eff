"""The guessed pitch, on the sample scene, whose normals are exact, seen at known pitches."""

import pytest
import torch
from worldstereo_fp8.scene.camera_path import pinhole
from worldstereo_fp8.scene.level import guess_pitch
from worldstereo_fp8.scene.sample import photograph


@pytest.mark.parametrize("pitch", [-40.0, -15.0, 0.0, 12.0])
def test_the_pitch_of_a_room_is_found(pitch):
    _, _, normal = photograph(pinhole(208, 120, 160.0, pitch=pitch))
    assert guess_pitch(normal) == pytest.approx(pitch, abs=0.5)
    noisy = torch.nn.functional.normalize(normal + 0.1 * torch.randn(normal.shape), dim=-1)
    assert guess_pitch(noisy) == pytest.approx(pitch, abs=2)


def test_a_wall_alone_says_nothing():
    wall = torch.tensor([0.0, 0.0, -1.0]).expand(60, 80, 3)
    assert guess_pitch(wall) is None
    assert guess_pitch(torch.zeros(60, 80, 3)) is None
