"""The sample scene: its depth is exact, and the nodes' own readers take what it gives."""

import pytest
import torch
from worldstereo_fp8.scene import sample
from worldstereo_fp8.scene.camera_path import pinhole
from worldstereo_fp8.scene.cameras import centres
from worldstereo_fp8.scene.depth import DEPTH_PICTURES, depth_of_moge, depth_of_picture
from worldstereo_fp8.scene.panorama import not_whole, points_of_panorama
from worldstereo_fp8.scene.render import render
from worldstereo_fp8.scene.start import is_panorama


def test_depth_is_that_of_the_surfaces_a_ray_meets():
    rays = torch.tensor([[0.0, 1, 0], [0, -1, 3.5], [-1, 0, 0], [0.9, 0, 4.8], [0, 0, -2]])
    distance, normal, color = sample.cast(torch.zeros(3), rays)
    _, radius, _ = sample.SPHERES[2]
    before_sphere = 1 - radius / rays[3].norm().item()
    torch.testing.assert_close(distance, torch.tensor([1.0, 2, 4, before_sphere, 1.5]).double())
    torch.testing.assert_close(normal[0], torch.tensor([0.0, -1, 0]).double())  # the floor's, upwards
    torch.testing.assert_close(normal[3].float(), -rays[3] / rays[3].norm())
    assert (color >= 0).all() and (color <= 1).all() and color[3].argmax() == 2  # the blue sphere


def test_its_points_project_to_the_pixels_they_came_from_in_every_camera():
    """The cloud that the first camera saw, in the last one: it shows what that camera sees, where nothing hides."""
    image, _, _, cloud, cameras = sample.sample()
    assert image.shape == (1, 480, 832, 3) and len(cameras) == 21
    assert (cameras.width, cameras.height) == (832, 480) and centres(cameras.w2c)[-1, 0] < 0
    shown, holes = render(cloud, cameras[20])
    seen, _, _ = sample.photograph(cameras[20])
    difference = (shown[0] - seen).abs().amax(-1)[holes[0] == 0]
    assert 0.02 < holes.mean() < 0.5
    assert difference.median() < 0.03 and (difference > 0.1).float().mean() < 0.15


def test_the_depth_picture_and_the_geometry_say_the_same():
    exact = sample.geometry(pinhole(104, 60, 80))
    read = depth_of_picture(sample.depth_picture(exact["depth"][0]), DEPTH_PICTURES[0], 1.0, 10.0)
    torch.testing.assert_close(read, depth_of_moge(exact), rtol=1e-4, atol=0)
    torch.testing.assert_close(exact["points"][..., 2], exact["depth"])
    assert (exact["normal"].norm(dim=-1) - 1).abs().max() < 1e-5
    assert ((exact["normal"] * exact["points"]).sum(-1) < 1e-6).all()  # towards the camera


def test_the_panorama_is_the_same_room():
    picture, distance = sample.panorama(64)
    cloud = points_of_panorama({"image": picture[None], "depth": distance[None], "mask": distance[None] > 0})
    low, high = (torch.tensor(corner) for corner in sample.ROOM)
    assert ((cloud.points > low - 0.01) & (cloud.points < high + 0.01)).all()
    assert (cloud.points.amax(0) - high).abs().max() < 0.1 and (cloud.points.amin(0) - low).abs().max() < 0.1


def test_the_panorama_takes_the_place_of_ones_own(monkeypatch):
    monkeypatch.setattr(sample, "PANORAMA_HEIGHT", 64)
    image, exact = sample.picture_or_sample(None, None, "panorama")
    assert image.shape == (1, 64, 128, 3) and is_panorama(exact) and not not_whole(64, 128)
    assert 1000 < len(points_of_panorama(exact)) <= 64 * 128


def test_ones_own_picture_passes_and_half_of_it_is_an_error():
    image, exact = sample.picture_or_sample(None, None)
    assert image.shape == (1, 480, 832, 3) and exact["depth"].shape == (1, 480, 832)
    own, geometry = torch.rand(1, 8, 8, 3), {"depth": torch.ones(1, 8, 8)}
    assert sample.picture_or_sample(own, geometry) == (own, geometry)
    for half, missing in (((own, None), "moge_geometry is not"), ((None, geometry), "image is not")):
        with pytest.raises(ValueError, match=missing):
            sample.picture_or_sample(*half)
