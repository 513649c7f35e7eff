"""Panorama starts: our axes against core's, and pinhole views against directions known by construction."""

import pytest
import torch
from comfy.ldm.moge.panorama import _uv_grid, spherical_uv_to_directions
from worldstereo_fp8.scene import sample
from worldstereo_fp8.scene.camera_path import LENSES, focal_length, pinhole
from worldstereo_fp8.scene.cameras import Cameras
from worldstereo_fp8.scene.panorama import directions, points_of_panorama, too_coarse, view_of_panorama
from worldstereo_fp8.scene.render import render

HEIGHT, WIDTH = 64, 128
CORE_TO_OPENCV = torch.tensor([[0.0, 1, 0], [0, 0, -1], [-1, 0, 0]])  # core: x backward, y right, z up


def geometry(**changes):
    distance = torch.full((1, HEIGHT, WIDTH), 2.0)
    image = directions(HEIGHT, WIDTH)[None] / 2 + 0.5  # every pixel's colour says where it lies
    return {"depth": distance, "mask": torch.ones(1, HEIGHT, WIDTH, dtype=torch.bool), "image": image} | changes


def test_directions_are_cores_in_opencv_axes():
    core = torch.from_numpy(spherical_uv_to_directions(_uv_grid(HEIGHT, WIDTH)))
    torch.testing.assert_close(directions(HEIGHT, WIDTH), core @ CORE_TO_OPENCV.T, atol=1e-5, rtol=0)
    assert directions(3, 4)[1].sum(0)[1].abs() < 1e-6  # the middle row is the horizon


def test_the_points_lie_where_the_panorama_shows_them():
    cloud = points_of_panorama(geometry())
    assert len(cloud) == HEIGHT * WIDTH
    torch.testing.assert_close(cloud.points / 2, (cloud.colors - 0.5) * 2)


def test_masked_pixels_leave_no_points():
    mask = torch.ones(1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[:, :20] = False
    assert points_of_panorama(geometry(mask=mask)).points[:, 1].min() > -1.75
    with pytest.raises(ValueError, match="no valid depth"):
        points_of_panorama(geometry(mask=~mask & mask))
    with pytest.raises(ValueError, match="ordinary picture"):
        points_of_panorama(geometry(intrinsics=torch.eye(3)[None]))


@pytest.mark.parametrize(
    "yaw, pitch, forward",
    [
        (0, 0, (0, 0, 1)),
        (90, 0, (1, 0, 0)),
        (180, 0, (0, 0, -1)),
        (0, 60, (0, -0.866, 0.5)),
        (-90, -30, (-0.866, 0.5, 0)),
    ],
)
def test_a_view_shows_what_lies_in_its_direction(yaw, pitch, forward):
    camera = pinhole(48, 32, focal_length(LENSES[1], 60.0, 48), yaw, pitch)
    view = view_of_panorama(geometry()["image"], camera)
    assert view.shape == (1, 32, 48, 3)
    direction = torch.nn.functional.normalize((view[0] - 0.5) * 2, dim=-1)
    middle = direction[15:17, 23:25].mean((0, 1))
    torch.testing.assert_close(middle, torch.tensor(forward, dtype=torch.float), atol=0.02, rtol=0)
    pixel = torch.tensor([40.5, 5.5, 1])
    ray = torch.nn.functional.normalize(camera.w2c[0, :3, :3].T @ torch.linalg.inv(camera.K[0]) @ pixel, dim=0)
    torch.testing.assert_close(direction[5, 40], ray, atol=0.02, rtol=0)


def test_a_panorama_too_small_for_its_splats_names_the_width_it_needs():
    """And it is so: half-way to the wall, its points leave gaps, and those of the wide one do not."""
    camera = pinhole(384, 240, focal_length(LENSES[1], 120.0, 384), yaw=-90)
    nearer = Cameras(camera.w2c.clone(), camera.K, 384, 240)
    nearer.w2c[0, :3, 3] = -camera.w2c[0, :3, :3] @ torch.tensor([-2.0, 0.0, 0.0])  # the wall is 4 away
    holes = {}
    for width in (512, 1088):
        picture, distance = sample.panorama(width // 2)
        mask = torch.ones_like(distance, dtype=torch.bool)
        cloud = points_of_panorama({"image": picture[None], "depth": distance[None], "mask": mask[None]})
        holes[width] = render(cloud, nearer)[1][0, 100:140, 172:212].mean()  # of the wall
    message = too_coarse(512, camera)
    assert "512 pixels wide" in message and "about 1088 wide" in message and too_coarse(1088, camera) is None
    assert holes[512] > 0.05 and holes[1088] == 0
