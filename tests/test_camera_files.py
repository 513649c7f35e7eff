"""COLMAP and NeRF camera files: known poses, written in each format's own axes, come back in OpenCV's."""

import json
import math

import pytest
import torch
from worldstereo_fp8.scene.camera_files import read_cameras
from worldstereo_fp8.scene.cameras import Cameras, rotation_to_quaternion, write_camera_json

COS, SIN = math.cos(0.3), math.sin(0.3)
W2C = torch.tensor(
    [
        [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        [[COS, 0, SIN, 1], [0, 1, 0, 2], [-SIN, 0, COS, 3], [0, 0, 0, 1]],
        [[1, 0, 0, -4], [0, COS, -SIN, 5], [0, SIN, COS, 6], [0, 0, 0, 1]],
    ],
    dtype=torch.float64,
)
K = torch.tensor([[500.0, 0, 330], [0, 510, 235], [0, 0, 1]])


def write_colmap(folder, camera="1 PINHOLE 640 480 500 510 330 235", prefix=""):
    quaternions = rotation_to_quaternion(W2C[:, :3, :3])
    poses = torch.cat([quaternions, W2C[:, :3, 3]], 1).tolist()
    poses = [" ".join(map(repr, pose)) for pose in poses]
    (folder / f"{prefix}cameras.txt").write_text(f"# Camera list\n{camera}\n")
    (folder / f"{prefix}images.txt").write_text(
        "\n".join(
            [
                "# Image list",
                "# with a point line after each image",
                f"1 {poses[2]} 1 frame 10.png",
                "12.5 7.5 -1 3 4 88",
                f"7 {poses[0]} 1 frame 1.png",
                "",
                f"2 {poses[1]} 1 frame 2.png",
                "",
            ]
        )
    )
    return folder / f"{prefix}images.txt"


def nerf_content(**changes):
    """The poses as NeRF writes them: camera-to-world, with the camera's y and z axes reversed."""
    c2w = torch.linalg.inv(W2C)
    c2w[:, :3, 1:3] *= -1
    frames = [{"file_path": f"{i}.png", "transform_matrix": pose} for i, pose in enumerate(c2w.tolist())]
    content = {"w": 640, "h": 480, "fl_x": 500, "fl_y": 510, "cx": 330, "cy": 235, "frames": frames} | changes
    return {key: value for key, value in content.items() if value is not None}


def assert_ours(cameras):
    assert (cameras.width, cameras.height) == (640, 480)
    torch.testing.assert_close(cameras.w2c, W2C.float())
    torch.testing.assert_close(cameras.K, K.repeat(3, 1, 1))


@pytest.mark.parametrize("prefix", ["", "room_"])
def test_colmap_comes_in_the_order_of_its_names(tmp_path, prefix):
    cameras, kind = read_cameras(write_colmap(tmp_path, prefix=prefix))
    assert_ours(cameras)
    assert "COLMAP" in kind


def test_colmap_as_other_editors_leave_it(tmp_path):
    """A byte order mark, tabs, and an empty line before the first pose."""
    path = write_colmap(tmp_path, "1\tPINHOLE\t640\t480\t500\t510\t330\t235")
    for file in (path, tmp_path / "cameras.txt"):
        file.write_text("\ufeff" + file.read_text("utf-8").replace("each image\n", "each image\n\n"), "utf-8")
    assert_ours(read_cameras(path)[0])


def test_nerf_axes_are_converted(tmp_path):
    (tmp_path / "transforms.json").write_text(json.dumps(nerf_content()))
    cameras, kind = read_cameras(tmp_path / "transforms.json")
    assert_ours(cameras)
    assert "converted from OpenGL" in kind


def test_nerf_with_a_field_of_view_alone(tmp_path):
    angle = 2 * math.atan(320 / 500)
    content = nerf_content(fl_x=None, fl_y=None, cx=None, cy=None, camera_angle_x=angle)
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    expected = torch.tensor([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    torch.testing.assert_close(read_cameras(tmp_path / "transforms.json")[0].K[1], expected)


def test_frames_of_other_sizes_are_scaled_to_the_first(tmp_path):
    content = nerf_content()
    content["frames"][1] |= {"w": 1280, "h": 960, "fl_x": 1000, "fl_y": 1020, "cx": 660, "cy": 470}
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    assert_ours(read_cameras(tmp_path / "transforms.json")[0])


def test_camera_json_is_recognised_by_its_content(tmp_path):
    write_camera_json(tmp_path / "anything.json", Cameras(W2C, K.repeat(3, 1, 1), 640, 480))
    cameras, kind = read_cameras(tmp_path / "anything.json")
    assert_ours(cameras)
    assert kind == "camera.json"


def test_colmap_distortion_is_left_out_with_a_warning(tmp_path, caplog):
    path = write_colmap(tmp_path, "1 SIMPLE_RADIAL 640 480 500 330 235 0.01")
    torch.testing.assert_close(read_cameras(path)[0].K[0, 1, 1].item(), 500.0)
    assert "camera 1 has lens distortion" in caplog.text
    with pytest.raises(ValueError, match="camera 1 has lens distortion, and its pictures are distorted too: undistort"):
        read_cameras(path, refuse_distortion=True)


def test_a_distorted_lens_of_a_transforms_json_is_named(tmp_path, caplog):
    path = tmp_path / "transforms.json"
    frame = {"file_path": "a.png", "transform_matrix": torch.eye(4).tolist()}
    content = {"w": 64, "h": 48, "fl_x": 50.0, "camera_model": "OPENCV", "k1": 0.0, "p2": 0.0}
    path.write_text(json.dumps(content | {"frames": [frame] * 3}))
    assert len(read_cameras(path, refuse_distortion=True)[0]) == 3 and not caplog.text
    path.write_text(json.dumps(content | {"frames": [frame, frame | {"k1": 0.1}, frame | {"p1": 0.1}]}))
    assert len(read_cameras(path)[0]) == 3
    assert caplog.text.count("has lens distortion") == 1 and "Frame 1 has lens distortion" in caplog.text
    with pytest.raises(ValueError, match="transforms.json. Frame 1 has lens distortion, and its pictures are"):
        read_cameras(path, refuse_distortion=True)
    for lens, word in (({"camera_model": "OPENCV_FISHEYE"}, "OPENCV_FISHEYE"), ({"is_fisheye": True}, "fisheye")):
        path.write_text(json.dumps(content | {"frames": [frame | lens]}))
        with pytest.raises(ValueError, match=f"Frame 0: the camera model {word} is not one of"):
            read_cameras(path)
    path.write_text(json.dumps(content | {"camera_model": ["x" * 500], "frames": [frame]}))
    with pytest.raises(ValueError, match="Frame 0: the camera model"):
        read_cameras(path)


@pytest.mark.parametrize(
    "camera, message",
    [
        ("1 FISHEYE 640 480 500 330 235", "images.txt. cameras.txt, line 2: the camera model FISHEYE is not one of"),
        ("1 PINHOLE 640 480 500", "line 2 is not a camera"),
        ("1 PINHOLE 640 -3 500 510 330 235", "picture size 640x-3"),
        ("9 PINHOLE 640 480 500 510 330 235", "Line 3 names camera 1"),
    ],
)
def test_bad_colmap_cameras_are_named(tmp_path, camera, message):
    with pytest.raises(ValueError, match=message):
        read_cameras(write_colmap(tmp_path, camera))


def test_colmap_needs_both_files_and_poses(tmp_path):
    path = write_colmap(tmp_path)
    path.write_text("1 0.5 0.5 what 1 2 3 1 a.png")
    with pytest.raises(ValueError, match="Line 1 is not a COLMAP pose"):
        read_cameras(path)
    path.write_text("1 1 0 0 0 1 2 3 1 a.png\n2 1 0 0 0 1 2 3 1 b.png")
    with pytest.raises(ValueError, match="Line 2 is not a list of 2-D points"):
        read_cameras(path)
    path.write_text("# nothing")
    with pytest.raises(ValueError, match="It holds no poses"):
        read_cameras(path)
    (tmp_path / "cameras.txt").unlink()
    with pytest.raises(ValueError, match="cameras.txt: put both into the input folder"):
        read_cameras(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"w": None}, "Frame 0 has no `w`"),
        ({"fl_x": None}, "Frame 0 has no `camera_angle_x`"),
        ({"w": 0}, "Frame 0 holds a value that cannot be used"),
        ({"fl_x": "wide"}, "Frame 0 holds a value that cannot be used"),
        ({"frames": []}, "`frames` is not a list"),
        ({"frames": [{"transform_matrix": [[1, 2], [3, 4]]}]}, "Frame 0 holds a value"),
        ({"frames": [{"transform_matrix": torch.ones(4, 4).tolist()}]}, "Camera 0 of 1 .*: the last row"),
        ({"frames": [{"transform_matrix": torch.eye(4).mul(2).tolist()}]}, "Camera 0 of 1 .*: the last row"),
    ],
)
def test_bad_transforms_are_named(tmp_path, changes, message):
    (tmp_path / "transforms.json").write_text(json.dumps(nerf_content(**changes)))
    with pytest.raises(ValueError, match=f"from transforms.json. {message}"):
        read_cameras(tmp_path / "transforms.json")


def test_text_that_is_no_camera_file_is_named(tmp_path):
    (tmp_path / "notes.json").write_text("\x00{")
    with pytest.raises(ValueError, match="No cameras could be read from notes.json"):
        read_cameras(tmp_path / "notes.json")
    (tmp_path / "picture.json").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="No cameras could be read from picture.json"):
        read_cameras(tmp_path / "picture.json")


@pytest.mark.parametrize("head", ["https://example.org/video\n", "", "\n"])
def test_realestate_has_shares_of_the_picture_and_world_to_camera_poses(tmp_path, head):
    first = "0 0.5 0.8888888889 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0"
    second = "33333 0.5 0.8888888889 0.5 0.5 0 0 1 0 0 0.25 0 1 0 0 0 0 1 -0.5"
    (tmp_path / "poses.txt").write_text(f"{head}{first}\n{second}\n")
    cameras, kind = read_cameras(tmp_path / "poses.txt")
    assert (len(cameras), cameras.width, cameras.height) == (2, 1280, 720) and kind.startswith("RealEstate10K")
    torch.testing.assert_close(cameras.K[0], torch.tensor([[640.0, 0, 640], [0, 640, 360], [0, 0, 1]]))
    torch.testing.assert_close(cameras.w2c[1, :3, 3], torch.tensor([0.25, 0, -0.5]))


@pytest.mark.parametrize(
    "line, message",
    [
        ("0 0.5 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1", "Line 3 is not a RealEstate10K camera"),
        ("0 0.5 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 x 0", "Line 3 is not a RealEstate10K camera"),
        ("0 0 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0", "fractions of the picture"),
        ("0 640 640 640 360 0 0 1 0 0 0 0 1 0 0 0 0 1 0", "fractions of the picture"),
        ("0 0.5 0.9 0.5 0.5 0 0 2 0 0 0 0 1 0 0 0 0 1 0", "Camera 1 of 2.*orthonormal"),
        ("0 0.5 0.9 0.5 nan 0 0 1 0 0 0 0 1 0 0 0 0 1 0", "fractions of the picture"),
    ],
)
def test_bad_realestate_lines_are_named(tmp_path, line, message):
    (tmp_path / "poses.txt").write_text(f"address\n0 0.5 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n{line}\n")
    with pytest.raises(ValueError, match=f"poses.txt.*{message}"):
        read_cameras(tmp_path / "poses.txt")
