"""The path flown by hand: its text, its curve, and what the viewer is sent."""

import json
import math
import os
from dataclasses import replace

import folder_paths
import numpy as np
import pytest
import torch
from worldstereo_fp8.comfy_nodes import files
from worldstereo_fp8.scene import fly_path
from worldstereo_fp8.scene.camera_path import EASINGS, Move, PathStart, move_on, pinhole
from worldstereo_fp8.scene.cameras import Cameras, centres, quaternion_to_rotation
from worldstereo_fp8.scene.fly_path import DEFAULT_PATH, fly, fly_on, plan_flight, read_fly_path, viewer_scene
from worldstereo_fp8.scene.pointcloud import PointCloud

START = pinhole(64, 48, 60.0, yaw=30, pitch=-10)


def view(position=(0, 0, 0), yaw=0.0):
    half = math.radians(yaw) / 2
    return {"position": list(position), "rotation": [math.cos(half), 0, math.sin(half), 0]}


def text(*views, **changes):
    return json.dumps({"keyframes": 21, "easing": "linear", "views": list(views)} | changes)


def test_the_default_orbits_the_centre_to_the_right():
    cameras = fly_on(pinhole(64, 48, 60.0), read_fly_path(DEFAULT_PATH), 2.0)
    orbit = move_on(pinhole(64, 48, 60.0), Move("orbit right", 24.0, 0.0, 21, "ease in and out", "on"), 2.0)
    torch.testing.assert_close(cameras.w2c, orbit.w2c, atol=2e-2, rtol=0)
    torch.testing.assert_close(cameras.w2c[-1], orbit.w2c[-1], atol=1e-4, rtol=0)


def test_the_curve_goes_through_the_views():
    """Three views a step apart are reached a third of the way apart."""
    views = [view((0.1, 0, 0)), view((0.1, 0.1, 0)), view((0.1, 0.1, 0.1))]
    positions, _ = fly(read_fly_path(text(*views, keyframes=7)))
    expected = torch.tensor([[0, 0, 0], *(v["position"] for v in views)], dtype=torch.float64)
    torch.testing.assert_close(positions[::2], expected)


def test_a_straight_line_is_flown_at_one_speed_and_a_turn_too():
    positions, rotations = fly(read_fly_path(text(view((0.2, 0, 0), 60), view((0.4, 0, 0), 120))))
    torch.testing.assert_close(positions[:, 0], torch.linspace(0, 0.4, 21, dtype=torch.float64))
    angle = 2 * torch.atan2(rotations[:, 2], rotations[:, 0]).rad2deg()
    torch.testing.assert_close(angle, torch.linspace(0, 120, 21, dtype=torch.float64))


def test_the_path_has_no_corner():
    """The direction of travel at a view is the same from both sides."""
    path = read_fly_path(text(view((0.3, 0, 0)), view((0.3, 0.4, 0)), view((0, 0.4, 0.2))))
    fine = fly_path.FlyPath(20001, "linear", path.positions, path.rotations)
    step = torch.nn.functional.normalize(fly(fine)[0].diff(dim=0), dim=1)
    assert (step[1:] - step[:-1]).norm(dim=1).max() < 0.01


@pytest.mark.parametrize("easing", EASINGS)
def test_easing_changes_when_not_where(easing):
    positions, _ = fly(read_fly_path(text(view((0, 0, 1)), easing=easing)))
    torch.testing.assert_close(positions[:, 2], EASINGS[easing](torch.linspace(0, 1, 21, dtype=torch.float64)))


def test_slerp_turns_the_short_way():
    turned = view(yaw=40)
    turned["rotation"] = [-value for value in turned["rotation"]]  # the same rotation
    _, rotations = fly(read_fly_path(text(turned, view(yaw=80), keyframes=9)))
    R = quaternion_to_rotation(rotations)
    heading = torch.atan2(R[:, 0, 2], R[:, 2, 2]).rad2deg()
    torch.testing.assert_close(heading, torch.linspace(0, 80, 9, dtype=torch.float64))


@pytest.mark.parametrize("views", [[], [view()], [view(), view(), view()]])
def test_a_path_may_stand_still(views):
    cameras = fly_on(START, read_fly_path(text(*views)), 3.0)
    torch.testing.assert_close(cameras.w2c, START.w2c.expand(21, 4, 4))


def test_the_first_camera_is_the_start_and_the_lens_stays():
    start = Cameras(torch.cat([START.w2c, pinhole(64, 48, 60.0).w2c]), START.K.repeat(2, 1, 1), 64, 48)
    cameras = fly_on(start, read_fly_path(text(view((0, 0, 1)), keyframes=6)), 2.0)
    assert len(cameras) == 7  # another path's cameras stay in front, and the two share one
    assert torch.equal(cameras.w2c[:2], start.w2c)
    assert torch.equal(cameras.K, START.K.expand(7, 3, 3))
    torch.testing.assert_close(centres(cameras.w2c)[-1], torch.tensor([0.0, 0, 2]))


def test_views_are_in_the_starts_axes():
    cameras = fly_on(START, read_fly_path(text(view((0.5, 0, 1)))), 2.0)
    seen_by_the_start = START.w2c[0, :3, :3] @ centres(cameras.w2c)[-1] + START.w2c[0, :3, 3]
    torch.testing.assert_close(seen_by_the_start, torch.tensor([1.0, 0, 2]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "The path is not JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "65536"),
        ("[" * 1000, "nested"),
        (text(keyframes=5), "from 6 to 21"),
        (text(keyframes=22), "from 6 to 21"),
        (text(keyframes=True), "keyframes is True"),
        (text(keyframes=12.5), "12.5"),
        (text(easing="bouncy\x1b"), r"'bouncy\\x1b'.*linear, ease in"),
        (text(easing=["linear"]), "easing"),
        (text(speed=1), "unknown entry 'speed'"),
        (text(views={}), "at most 64"),
        (text(*[view()] * 65), "at most 64"),
        (text("here"), "View 1 of the path is 'here'"),
        (text(view(), {"position": [0, 0, 0]}), "View 2 of the path: rotation is None"),
        (text(view() | {"fov": 3}), "unknown entry 'fov'"),
        (text(view((0, 0))), "a list of 3 numbers"),
        (text(view((0, 0, "1"))), "a list of 3 numbers"),
        (text(view((0, 0, True))), "a list of 3 numbers"),
        (text(view((0, 0, math.nan))), "a list of 3 numbers"),
        (text(view((0, 0, math.inf))), "a list of 3 numbers"),
        (text(view((0, 0, 10**60))), "may exceed 1000"),
        (text(view((0, 0, -1001))), "may exceed 1000"),
        (text({"position": [0, 0, 0], "rotation": [0, 0, 0, 0]}), "quaternion"),
    ],
)
def test_bad_text_is_a_clear_error(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        read_fly_path(bad)
    assert len(str(error.value)) < 400


def test_the_largest_path_is_finite():
    views = [view((1000 * (-1) ** i, 1000, -1000), 179 * i) for i in range(64)]
    positions, rotations = fly(read_fly_path(text(*views)))
    assert positions.isfinite().all() and positions.abs().max() < 1e4
    torch.testing.assert_close(rotations.norm(dim=1), torch.ones(21, dtype=torch.float64))


def test_the_viewer_gets_the_points_as_the_start_sees_them():
    points = torch.tensor([[0.0, 0, 4], [1, 2, 6]])
    cloud = PointCloud(points, torch.tensor([[1.0, 0, 0.5], [0, 1, 0]]))
    scene = viewer_scene(cloud, START, 2.0, 832, 480)
    records = np.frombuffer(scene.points, [("position", "<f4", 3), ("color", "u1", 4)])
    seen = (points @ START.w2c[0, :3, :3].T + START.w2c[0, :3, 3]) / 2
    np.testing.assert_allclose(records["position"], seen, atol=1e-6)
    assert records["color"].tolist() == [[255, 0, 128, 255], [0, 255, 0, 255]]
    info = scene.info
    assert (info["count"], info["width"], info["height"]) == (2, 832, 480)
    assert info["lens"] == pytest.approx([60 / 64, 60 / 48, 0.5, 0.5])
    pitch = math.radians(10)  # it looks down, so the way it looks is partly away from up
    assert info["up"] == pytest.approx([0, -math.cos(pitch), -math.sin(pitch)], abs=1e-6)


def test_many_points_are_thinned_and_grow(monkeypatch):
    monkeypatch.setattr(fly_path, "VIEWER_POINTS", 250)
    cloud = PointCloud(torch.rand(1000, 3), torch.rand(1000, 3))
    scene = viewer_scene(cloud, START, 1.0, 832, 480)
    assert len(scene.points) == 250 * 16
    assert scene.info["count"] == 250
    assert scene.info["radius"] == pytest.approx(2 * 0.008)
    assert viewer_scene(cloud, START, 1.0, 832, 480).points == scene.points


def test_a_flight_without_a_scene():
    cameras, picture, scene = plan_flight(
        PathStart(torch.zeros(1, 48, 64, 3), "auto", 0.0, 0.0, 0.0, None, None), text(view((0, 0, 1))), 768, 576
    )
    assert len(cameras) == 21 and (cameras.width, cameras.height) == (64, 48)
    assert picture.shape == (1, 512, 1024, 3)
    assert scene.info["count"] == 0 and scene.points == b""


def test_a_flight_over_moges_geometry():
    geometry = {
        "depth": torch.full((1, 48, 64), 5.0),
        "intrinsics": torch.tensor([[[0.9, 0, 0.5], [0, 1.2, 0.5], [0, 0, 1]]]),
    }
    cameras, _, scene = plan_flight(
        PathStart(torch.rand(1, 48, 64, 3), "auto", 0.0, 0.0, 0.0, geometry, None), text(view((0, 0, 1))), 96, 72
    )
    torch.testing.assert_close(centres(cameras.w2c)[-1], torch.tensor([0.0, 0, 5]))
    assert scene.info["count"] == 96 * 72  # the points of the render, not of the picture
    assert scene.info["lens"] == pytest.approx([0.9, 1.2, 0.5, 0.5])
    records = np.frombuffer(scene.points, [("position", "<f4", 3), ("color", "u1", 4)])
    np.testing.assert_allclose(records["position"][:, 2], 1, atol=1e-6)


def test_the_pitch_is_guessed_from_moges_normals():
    geometry = {
        "depth": torch.full((1, 48, 64), 5.0),
        "intrinsics": torch.tensor([[[0.9, 0, 0.5], [0, 1.2, 0.5], [0, 0, 1]]]),
        # A floor that a camera sees which looks 30 degrees down: its normal is up, in OpenCV's axes.
        "normal": torch.tensor([0.0, -math.cos(math.pi / 6), -math.sin(math.pi / 6)]).expand(1, 48, 64, 3),
    }
    start = PathStart(torch.rand(1, 48, 64, 3), "auto", 0.0, 0.0, 12.0, geometry, None, guess_pitch=True)
    flight = text(view((0, 0, 1))), 96, 72
    info = plan_flight(start, *flight)[2].info
    assert "-30 degrees" in info["assumed"]
    assert info["up"] == pytest.approx([0, -math.cos(math.pi / 6), -math.sin(math.pi / 6)], abs=0.02)
    del geometry["normal"]
    info = plan_flight(start, *flight)[2].info
    assert info["assumed"].startswith("no pitch could be guessed")
    assert plan_flight(replace(start, guess_pitch=False), *flight)[2].info["up"] == info["up"]  # start_pitch


def test_a_large_picture_becomes_evenly_fewer_points(monkeypatch):
    monkeypatch.setattr(fly_path, "VIEWER_POINTS", 96 * 72 // 4)
    geometry = {"depth": torch.full((1, 48, 64), 5.0), "intrinsics": torch.eye(3)[None]}
    start = PathStart(torch.rand(1, 48, 64, 3), "auto", 0.0, 0.0, 0.0, geometry, None)
    _, _, scene = plan_flight(start, text(), 96, 72)
    assert scene.info["count"] == 48 * 36
    assert scene.info["radius"] == pytest.approx(2 * 0.008)


def test_old_scenes_are_dropped_from_the_temp_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    kept = [files.keep_in_temp("viewer", bytes([i])) for i in range(files.TEMP_FILES)]
    for age, entry in enumerate(kept):
        os.utime(tmp_path / "viewer" / entry["filename"], ns=(age, age))
    assert files.keep_in_temp("viewer", bytes([0])) == kept[0]  # used again, hence the newest
    files.keep_in_temp("viewer", b"new")
    names = {path.name for path in (tmp_path / "viewer").iterdir()}
    assert len(names) == files.TEMP_FILES
    assert kept[0]["filename"] in names and kept[1]["filename"] not in names
    assert kept[0]["type"] == "temp" and kept[0]["subfolder"] == "viewer"
