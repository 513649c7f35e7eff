"""Cameras, camera.json, and the model's inputs computed from a path: equal to the original model's inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worldstereo_fp8.scene.camera_files import read_cameras
from worldstereo_fp8.scene.cameras import (
    Cameras,
    centres,
    normalise,
    plucker,
    quaternion_to_rotation,
    quaternions_and_translations,
    rotation_to_quaternion,
    thin,
    write_camera_json,
)

GOLDEN = Path(__file__).parent / "golden"


def path_of(count, width=64, height=48):
    """Cameras that step along x and turn about y."""
    angle = torch.linspace(0, 1, count, dtype=torch.float64)
    quaternion = torch.stack([(angle / 2).cos(), 0 * angle, (angle / 2).sin(), 0 * angle], 1)
    w2c = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    w2c[:, :3, :3] = quaternion_to_rotation(quaternion)
    w2c[:, 0, 3] = angle
    K = torch.tensor([[57.6, 0, width / 2], [0, 57.6, height / 2], [0, 0, 1]]).repeat(count, 1, 1)
    return Cameras(w2c, K, width, height)


@pytest.mark.parametrize("name", ["camera", "memory_dmd"])
def test_plucker_equals_the_original(name):
    golden = load_file(GOLDEN / f"{name}.io.safetensors")
    rays = plucker(normalise(golden["cam.w2c"]), golden["cam.K"], 48, 64)
    torch.testing.assert_close(rays, golden["in.camera_embedding"][0], atol=1e-5, rtol=0)


def test_quaternions_with_references_equal_the_original():
    golden = load_file(GOLDEN / "memory_dmd.io.safetensors")
    poses = normalise(torch.cat([golden["cam.w2c"], golden["cam.ref_w2c"]]), targets=len(golden["cam.w2c"]))
    expected = torch.cat([golden["in.camera_qt"][0], golden["in.camera_qt_ref"][0]])
    torch.testing.assert_close(quaternions_and_translations(poses), expected, atol=1e-5, rtol=0)


def test_an_outlier_does_not_move_the_mean():
    w2c = torch.eye(4).repeat(41, 1, 1)
    w2c[:, 0, 3] = torch.linspace(-1, 1, 41)
    w2c[-1, 0, 3] = -1e4
    kept = normalise(w2c[:-1])
    torch.testing.assert_close(normalise(w2c)[:-1], kept)


def test_a_path_that_stands_still_is_scaled_by_two():
    w2c = torch.eye(4).repeat(3, 1, 1)
    reference = torch.eye(4)[None].clone()
    reference[:, 0, 3] = 1.0
    torch.testing.assert_close(normalise(torch.cat([w2c, reference]), targets=3)[-1, 0, 3].item(), 2.0)


def test_quaternions_round_trip_for_every_half_turn():
    generator = torch.Generator().manual_seed(0)
    quaternion = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    quaternion[:3] = torch.eye(4, dtype=torch.float64)[1:]  # half turns, where w = 0
    R = quaternion_to_rotation(quaternion)
    result = rotation_to_quaternion(R)
    assert (result[:, 0] >= 0).all()
    torch.testing.assert_close(quaternion_to_rotation(result), R)


def test_scaled_and_thinned():
    cameras = path_of(81)
    thinned = cameras.thinned(21).scaled_to(128, 24)
    assert len(thinned) == 21 and (thinned.width, thinned.height) == (128, 24)
    torch.testing.assert_close(thinned.w2c[[0, 7, 20]], cameras.w2c[[0, 28, 80]])
    torch.testing.assert_close(thinned.K[0], torch.tensor([[115.2, 0, 64], [0, 28.8, 12], [0, 0, 1]]))
    assert torch.equal(cameras.thinned(100).w2c, cameras.w2c)


def test_thinning_is_numpys():
    for count in (1, 2, 20, 21, 22, 81, 165, 329, 657):
        wanted = np.linspace(0, count - 1, min(count, 21)).astype(int)
        assert thin(count, 21).tolist() == wanted.tolist()


def test_camera_json_round_trip(tmp_path):
    cameras = path_of(5)
    write_camera_json(tmp_path / "camera.json", cameras)
    again = read_cameras(tmp_path / "camera.json")[0]
    assert torch.equal(again.w2c, cameras.w2c) and torch.equal(again.K, cameras.K)
    assert (again.width, again.height) == (64, 48)


def test_camera_json_without_a_size_takes_twice_the_principal_point(tmp_path):
    cameras = path_of(2)
    content = {"extrinsic": cameras.w2c.tolist(), "intrinsic": cameras.K.tolist()}
    (tmp_path / "camera.json").write_text(json.dumps(content))
    again = read_cameras(tmp_path / "camera.json")[0]
    assert (again.width, again.height) == (64, 48)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "No cameras could be read from camera.json"),
        ("[" * 100_000, "No cameras could be read from camera.json"),
        ("[1, 2]", "no `extrinsic` and `intrinsic`"),
        ('{"extrinsic": [], "intrinsic": []}', "`intrinsic` has the shape"),
        ('{"extrinsic": [[[1, 2], [3]]], "intrinsic": [[[1, 2], [3]]]}', "`extrinsic` is not a list of matrices"),
        ('{"extrinsic": {"a": 1}, "intrinsic": [[[1, 2], [3]]]}', "`extrinsic` is not a list of matrices"),
        ('{"extrinsic": [[1]], "intrinsic": [[[9,0,5],[0,9,5],[0,0,1]]], "width": "big"}', "`width` is 'big'"),
        ('{"extrinsic": [[1]], "intrinsic": [[[9,0,5],[0,9,5],[0,0,1]]]}', "The poses have the shape"),
    ],
)
def test_a_bad_camera_json_is_named(tmp_path, content, message):
    (tmp_path / "camera.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_cameras(tmp_path / "camera.json")[0]


def broken(change):
    cameras = path_of(4)
    w2c, K = cameras.w2c.clone(), cameras.K.clone()
    change(w2c[2], K[2])
    return lambda: Cameras(w2c, K, 64, 48)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w2c, K: w2c.fill_(float("nan")), "Camera 2 of 4 .*: its pose holds NaN"),
        (lambda w2c, K: K.mul_(float("inf")), "Camera 2 of 4 .*: its intrinsics hold NaN"),
        (lambda w2c, K: w2c[:3, :3].mul_(1.01), "Camera 2 of 4 .*: its rotation is not orthonormal"),
        (lambda w2c, K: w2c[:3, 0].mul_(-1), "Camera 2 of 4 .*: its rotation mirrors"),
        (lambda w2c, K: w2c.copy_(w2c.T.clone()), "Camera 2 of 4 .*: the last row of its pose"),
        (lambda w2c, K: K[1, 1].mul_(-1), "Camera 2 of 4 .*: its focal length is not positive"),
        (lambda w2c, K: K.copy_(K.T.clone()), "Camera 2 of 4 .*: the last row of its intrinsics"),
    ],
)
def test_impossible_cameras_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        broken(change)()


def test_counts_and_sizes_must_match():
    cameras = path_of(4)
    with pytest.raises(ValueError, match="4 poses need one 3x3 matrix each"):
        Cameras(cameras.w2c, cameras.K[:3], 64, 48)
    with pytest.raises(ValueError, match="picture size 0x48"):
        Cameras(cameras.w2c, cameras.K, 0, 48)
    with pytest.raises(IndexError):
        cameras[4]


def test_centres_are_where_the_pose_maps_to_zero():
    w2c = path_of(6).w2c
    centre = torch.cat([centres(w2c), torch.ones(6, 1)], 1)
    torch.testing.assert_close((w2c @ centre[..., None])[:, :3, 0], torch.zeros(6, 3), atol=1e-6, rtol=0)


def test_the_horizontal_field_of_view():
    K = torch.tensor([[[400.0, 0, 400], [0, 300, 200], [0, 0, 1]]])
    assert Cameras(torch.eye(4)[None], K, 800, 400).fov.tolist() == pytest.approx([90])
