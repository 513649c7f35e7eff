"""Camera paths: where each preset goes, which way it looks, how paths are chained and started."""

import math

import pytest
import torch
from worldstereo_fp8.scene import sample
from worldstereo_fp8.scene.camera_path import (
    DEFAULT_FOV,
    EASINGS,
    LENSES,
    PRESETS,
    Move,
    PathStart,
    camera_of_moge,
    camera_of_viewer,
    depth_of_scene,
    draw_path,
    extent,
    focal_length,
    move_on,
    pinhole,
    plan_path,
)
from worldstereo_fp8.scene.cameras import centres
from worldstereo_fp8.scene.pointcloud import PointCloud

START = pinhole(64, 48, 60.0)
DEPTH = 2.0


def path(preset, degrees=30.0, distance=0.5, keyframes=5, easing="linear", look_at_centre="auto", start=START):
    return move_on(start, Move(preset, degrees, distance, keyframes, easing, look_at_centre), DEPTH)


def end(cameras):
    """Centre and forward direction of the last camera."""
    return centres(cameras.w2c)[-1].tolist(), cameras.w2c[-1, 2, :3].tolist()


HALF, ROOT = 0.5, math.sqrt(3) / 2  # sine and cosine of 30 degrees


@pytest.mark.parametrize(
    "preset, centre, forward",
    [
        ("orbit left", (-1, 0, 2 - 2 * ROOT), (HALF, 0, ROOT)),
        ("orbit right", (1, 0, 2 - 2 * ROOT), (-HALF, 0, ROOT)),
        ("arc up", (0, -1, 2 - 2 * ROOT), (0, HALF, ROOT)),
        ("arc down", (0, 1, 2 - 2 * ROOT), (0, -HALF, ROOT)),
        ("dolly in", (0, 0, 1), (0, 0, 1)),
        ("dolly out", (0, 0, -1), (0, 0, 1)),
        ("truck left", (-1, 0, 0), (0, 0, 1)),
        ("truck right", (1, 0, 0), (0, 0, 1)),
        ("pedestal up", (0, -1, 0), (0, 0, 1)),
        ("pedestal down", (0, 1, 0), (0, 0, 1)),
        ("pan left", (0, 0, 0), (-HALF, 0, ROOT)),
        ("pan right", (0, 0, 0), (HALF, 0, ROOT)),
        ("tilt up", (0, 0, 0), (0, -HALF, ROOT)),
        ("tilt down", (0, 0, 0), (0, HALF, ROOT)),
        ("ellipse loop", (0, 0, 0), (0, 0, 1)),
    ],
)
def test_where_each_preset_ends(preset, centre, forward):
    got_centre, got_forward = end(path(preset))
    assert got_centre == pytest.approx(centre, abs=1e-5)
    assert got_forward == pytest.approx(forward, abs=1e-5)


def test_roll_turns_the_picture_about_its_middle():
    cameras = path("roll clockwise")
    assert end(cameras)[1] == pytest.approx((0, 0, 1))
    assert cameras.w2c[-1, 0, :3].tolist() == pytest.approx((ROOT, HALF, 0), abs=1e-6)  # its right side goes down
    assert path("roll counter-clockwise").w2c[-1, 0, :3].tolist() == pytest.approx((ROOT, -HALF, 0), abs=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_starts_where_it_stands_and_keeps_the_lens(preset):
    cameras = path(preset, keyframes=7)
    assert len(cameras) == 7
    assert torch.equal(cameras.w2c[0], START.w2c[0])
    assert torch.equal(cameras.K, START.K.expand(7, 3, 3))


def test_the_first_step_is_no_jump():
    for preset in PRESETS:
        step = (path(preset, keyframes=101).w2c[1] - START.w2c[0]).abs().max()
        assert 0 < step < 0.1, preset


@pytest.mark.parametrize("preset", ["orbit left", "arc up", "truck left", "pedestal up", "spiral", "ellipse loop"])
def test_look_at_centre_keeps_it_in_the_middle(preset):
    centre = torch.tensor([0.0, 0, DEPTH])
    on, off = path(preset, look_at_centre="on"), path(preset, look_at_centre="off")
    seen = on.w2c[:, :3, :3] @ centre + on.w2c[:, :3, 3]
    torch.testing.assert_close(seen[:, :2], torch.zeros(5, 2), atol=1e-5, rtol=0)
    assert torch.equal(off.w2c[:, :3, :3], START.w2c[:, :3, :3].expand(5, 3, 3))
    torch.testing.assert_close(centres(on.w2c), centres(off.w2c))


def test_the_ellipse_is_a_third_higher_than_wide():
    centre = centres(path("ellipse loop", distance=0.3, keyframes=5).w2c)
    torch.testing.assert_close(centre[:, 0], torch.tensor([0, 0.6, 0, -0.6, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(centre[:, 1], torch.tensor([0, -0.8, -1.6, -0.8, 0]), atol=1e-6, rtol=0)


def test_a_tilted_start_orbits_level():
    start = pinhole(64, 48, 60.0, pitch=-20)
    assert start.w2c[0, 2, :3].tolist() == pytest.approx((0, math.sin(math.radians(20)), math.cos(math.radians(20))))
    orbit = path("orbit left", degrees=180, start=start)
    torch.testing.assert_close(centres(orbit.w2c)[:, 1], torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(orbit.w2c[:, 2, 1], start.w2c[:, 2, 1].expand(5))  # looks down as much all the way


def test_easing_moves_the_keyframes_not_the_ends():
    for easing, curve in EASINGS.items():
        x = centres(path("truck right", easing=easing).w2c)[:, 0]
        torch.testing.assert_close(x, curve(torch.linspace(0, 1, 5)))
    assert EASINGS["ease in"](0.5) < 0.5 < EASINGS["ease out"](0.5)


def test_paths_are_chained_without_a_double_frame():
    chained = path("dolly in", start=path("pan right", degrees=90))
    assert len(chained) == 9
    torch.testing.assert_close(centres(chained.w2c)[-1], torch.tensor([1.0, 0, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "change, depth, message",
    [({"keyframes": 1}, 1.0, "at least 2"), ({}, 0.0, "depth is 0.0"), ({}, math.nan, "depth is nan")],
)
def test_impossible_moves_are_named(change, depth, message):
    move = Move(
        **{
            "preset": "truck left",
            "degrees": 1.0,
            "distance": 1.0,
            "keyframes": 3,
            "easing": "linear",
            "look_at_centre": "off",
        }
        | change
    )
    with pytest.raises(ValueError, match=message):
        move_on(START, move, depth)


def test_looking_along_its_own_down_axis_has_no_upright():
    start = pinhole(64, 48, 60.0, pitch=-45)
    with pytest.raises(ValueError, match="no direction is up"):
        move_on(start, Move("pedestal down", 0, math.sqrt(2), 2, "linear", "on"), DEPTH)


def test_lenses():
    assert focal_length(LENSES[1], 90.0, 640) == pytest.approx(320)
    assert focal_length(LENSES[2], 18.0, 640) == pytest.approx(320)
    assert focal_length(LENSES[0], 1.0, 640) == focal_length(LENSES[1], DEFAULT_FOV, 640)
    with pytest.raises(ValueError, match="between 0 and 180"):
        focal_length(LENSES[1], 180.0, 640)
    with pytest.raises(ValueError, match="above 0"):
        focal_length(LENSES[2], 0.0, 640)


def test_moge_gives_its_lens_unless_another_is_chosen():
    geometry = {"intrinsics": torch.tensor([[[0.8, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]]])}
    K = camera_of_moge(geometry, 640, 480, LENSES[0], 0.0, 0.0).K[0]
    torch.testing.assert_close(K, torch.tensor([[512.0, 0, 320], [0, 480, 240], [0, 0, 1]]))
    assert camera_of_moge(geometry, 640, 480, LENSES[1], 90.0, 0.0).K[0, 0, 0].item() == pytest.approx(320)


def viewer_info(**changes):
    """A viewer's camera at z = 4 that looks back at the origin."""
    return {
        "position": {"x": 0, "y": 0, "z": 4},
        "target": {"x": 0, "y": 0, "z": 0},
        "zoom": 1,
        "cameraType": "perspective",
        "quaternion": {"x": 0, "y": 0, "z": 0, "w": 1},
        "fov": 90,
    } | changes


def test_the_viewers_camera_is_turned_into_opencv():
    camera, distance = camera_of_viewer(viewer_info(), 640, 480, LENSES[0], 0.0)
    torch.testing.assert_close(centres(camera.w2c)[0], torch.tensor([0.0, 0, -4]))
    torch.testing.assert_close(camera.w2c[0, :3, :3], torch.eye(3))
    assert camera.K[0, 0, 0].item() == pytest.approx(240) and distance == pytest.approx(4)  # 90 degrees, vertical


def test_the_viewers_target_stands_in_for_its_rotation():
    above = viewer_info(position={"x": 0, "y": 3, "z": 4}, quaternion=None)
    forward = camera_of_viewer(above, 640, 480, LENSES[0], 0.0)[0].w2c[0, 2, :3]
    torch.testing.assert_close(forward, torch.tensor([0, 0.6, 0.8]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cameraType": "orthographic"}, "orthographic"),
        ({"position": {}}, "cannot be used"),
        ({"fov": "wide"}, "cannot be used"),
    ],
)
def test_unusable_viewer_cameras_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        camera_of_viewer(viewer_info(**changes), 640, 480, LENSES[0], 0.0)


def test_the_scenes_depth_is_the_median_of_what_the_camera_sees():
    points = torch.tensor([[0.0, 0, 1], [0, 0, 3], [0.1, 0, 9], [0, 0, -5], [80, 0, 1]])
    cloud = PointCloud(points, torch.ones_like(points))
    assert depth_of_scene(cloud, START) == 3
    with pytest.raises(ValueError, match="sees none"):
        depth_of_scene(PointCloud(points[3:], torch.ones(2, 3)), START)
    corner = torch.tensor([[-31.9 / 60, -23.9 / 60, 1.0]]) / 4  # in the first pixel, near
    assert depth_of_scene(PointCloud(corner, torch.ones(1, 3)), START) == 0.25


def test_a_chained_orbit_goes_round_what_the_last_camera_sees():
    scene, lens = PointCloud(torch.tensor([[0.0, 0.0, 4.0]]), torch.ones(1, 3)), ("auto", 60.0, 0.0, 0.0)
    image, moves = torch.zeros(1, 48, 64, 3), {"keyframes": 3, "easing": "linear", "look_at_centre": "auto"}
    near, _, _ = plan_path(PathStart(image, *lens, scene, None), Move("dolly in", 0.0, 0.5, **moves))
    orbit, _, _ = plan_path(PathStart(image, *lens, scene, near), Move("orbit left", 90.0, 0.0, **moves))
    torch.testing.assert_close(centres(orbit.w2c)[-1].abs(), torch.tensor([2.0, 0, 4]), atol=1e-5, rtol=0)
    away, _, _ = plan_path(PathStart(image, *lens, scene, near), Move("pan left", 170.0, 0.0, **moves))
    assert depth_of_scene(scene, away) == 4  # sees nothing: what the first camera saw


@pytest.mark.parametrize(
    "cloud",
    [None, PointCloud(torch.rand(50, 3) + 1, torch.ones(50, 3)), PointCloud(torch.zeros(0, 3), torch.zeros(0, 3))],
)
def test_the_drawing_shows_first_and_last_camera_in_their_colours(cloud):
    image = draw_path(path("truck right", keyframes=9), DEPTH, cloud)
    assert image.shape == (1, 512, 1024, 3) and image.min() >= 0 and image.max() <= 1
    above = image[0, :, :512]
    blue = ((above[..., 2] > 0.6) & (above[..., 0] < 0.4)).nonzero()[:, 1].float().mean()
    red = ((above[..., 0] > 0.6) & (above[..., 2] < 0.2)).nonzero()[:, 1].float().mean()
    assert blue < red  # it goes to the right


@pytest.mark.parametrize("preset, above, side", [("dolly in", (0, -1), (1, 0)), ("pedestal up", None, (0, -1))])
def test_the_drawing_has_forward_up_and_to_the_right_and_up_above(preset, above, side):
    """The way from the mark of the start to that of the end, in columns and rows, on each of the two views."""
    image = draw_path(path(preset, keyframes=9), DEPTH)[0]
    for view, expected in ((image[:, :512], above), (image[:, 512:], side)):
        if expected is None:  # one mark over the other
            continue
        blue = ((view[..., 2] > 0.6) & (view[..., 0] < 0.4)).nonzero().float().mean(0)
        red = ((view[..., 0] > 0.6) & (view[..., 2] < 0.2)).nonzero().float().mean(0)
        row, column = (red - blue).tolist()
        assert [0 if abs(way) < 20 else math.copysign(1, way) for way in (column, row)] == list(expected)


@pytest.mark.parametrize("distance", [0.1, 0.4, 2.0, 30.0])
def test_the_drawings_bar_is_a_tenth_to_a_half_of_its_width(distance):
    image = draw_path(path("truck right", distance=distance), 1e-3 * distance)[0]
    bar = (image[512 - 16, :512] > 0.8).all(1).sum().item()
    assert 0.05 * 400 - 3 <= bar <= 0.5 * 400 + 3


def test_the_extent_is_the_farthest_from_the_first_camera():
    assert extent(path("truck right", distance=0.5, start=path("dolly in"))[4:]) == pytest.approx(1.0)
    assert extent(path("pan left")) == 1.0


def test_a_scene_out_of_sight_needs_a_depth():
    behind = PointCloud(torch.tensor([[0.0, 0.0, -2.0]]), torch.zeros(1, 3))
    move, lens = Move("dolly in", 0.0, 0.5, 3, "linear", "auto"), (torch.zeros(1, 48, 64, 3), "auto", 60.0)
    with pytest.raises(ValueError, match="sees none of the scene's points.*or give scene_depth"):
        plan_path(PathStart(*lens, 0.0, 0.0, behind, None), move)
    cameras, _, _ = plan_path(PathStart(*lens, 2.0, 0.0, behind, None), move)
    assert centres(cameras.w2c)[-1, 2].item() == pytest.approx(1.0)  # half of the depth


def test_a_path_says_what_it_assumes(caplog):
    """Without a scene a warning; with MoGe's normals the guessed pitch, by which an orbit stays level."""
    geometry = sample.geometry(pinhole(104, 60, 80))
    image = geometry["image"]
    move = Move("orbit left", 40.0, 0.0, 3, "linear", "auto")
    lens = ("auto", 60.0, 0.0, 0.0)
    cameras, _, said = plan_path(PathStart(image, *lens, None, None), move)
    assert said.startswith("no scene is connected") and centres(cameras.w2c)[-1, 2].item() == pytest.approx(
        1 - math.cos(math.radians(40)), abs=1e-6
    )  # an orbit of radius 1
    assert "no scene is connected" in caplog.text
    tilted = sample.geometry(pinhole(104, 60, 80, pitch=-25))
    cameras, _, said = plan_path(PathStart(tilted["image"], *lens, tilted, None, True), move)
    assert "pitch of the camera: -25 degrees" in said and "scene depth" in said
    assert centres(cameras.w2c)[:, 1].abs().max() < 0.05  # level, where the tilted camera's orbit would climb
    torch.testing.assert_close(cameras.w2c[0], pinhole(104, 60, 80, pitch=-25).w2c[0], rtol=0, atol=0.02)
    without = {key: value for key, value in geometry.items() if key != "normal"}
    assert plan_path(PathStart(image, *lens, without, None, True), move)[2].startswith("no pitch could be guessed")
