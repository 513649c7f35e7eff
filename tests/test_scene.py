"""The scene as a value: views, names, paths, limits."""

import pytest
import torch
from worldstereo_fp8.scene.cameras import Cameras
from worldstereo_fp8.scene.pointcloud import PointCloud
from worldstereo_fp8.scene.scene import MAX_POINTS, MAX_VIEWS, Scene, to_bytes

WIDTH, HEIGHT = 8, 6


def cameras(count, width=WIDTH, height=HEIGHT):
    w2c = torch.eye(4).repeat(count, 1, 1)
    w2c[:, 0, 3] = torch.arange(count)
    K = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
    return Cameras(w2c, K.expand(count, 3, 3), width, height)


def pictures(count, seed=0):
    return torch.rand(count, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(seed))


def start():
    cloud = PointCloud(torch.zeros(2, 3), torch.ones(2, 3))
    return Scene(to_bytes(pictures(1)), cameras(1), ("start",), (torch.ones(HEIGHT, WIDTH),), cloud)


def test_a_path_adds_named_views_and_leaves_the_old_scene_as_it_was():
    old = start()
    path, frames = cameras(21, 2 * WIDTH, 2 * HEIGHT), pictures(21, 1)
    new = old.with_path("left", path, [3, 20], to_bytes(frames[[3, 20]]))
    assert (len(old), old.names, old.paths) == (1, ("start",), ())
    assert new.names == ("start", "left/0003", "left/0020")
    assert new.paths[0].views == (1, 2) and new.path("left").cameras is path
    assert new.view("left/0020") == 2
    assert new.pictures[0] is old.pictures[0]  # shared, not copied
    assert torch.equal(new.cameras.w2c[1:], path.w2c[[3, 20]])
    assert torch.equal(new.cameras.K[1], old.cameras.K[0])  # the same lens, in pixels of the scene's pictures
    assert new.depths[0] is old.depths[0] and new.depths[1] is None
    assert (new.picture(2) - frames[20]).abs().max() <= 0.5 / 255 + 1e-6


def test_names_are_found_or_the_error_lists_what_there_is():
    scene = start().with_path("left", cameras(3), [2], to_bytes(pictures(1)))
    with pytest.raises(ValueError, match="no view named 'right/0001'.*'start', 'left/0002'"):
        scene.view("right/0001")
    with pytest.raises(ValueError, match="no path named 'right'.*'left'"):
        scene.path("right")
    with pytest.raises(ValueError, match="a view named 'left/0002' already"):
        scene.with_path("left", cameras(3), [2], to_bytes(pictures(1)))
    with pytest.raises(ValueError, match="printable"):
        scene.with_path("\x1b[2J", cameras(3), [2], to_bytes(pictures(1)))


def test_what_does_not_match_or_passes_a_limit_is_refused():
    scene = start()
    with pytest.raises(ValueError, match="pictures 2, cameras 1"):
        Scene(to_bytes(pictures(2)), cameras(1), ("start",), (None,), scene.cloud)
    with pytest.raises(ValueError, match=r"view 'start' is \[6, 8, 3\] of torch.float32"):
        Scene((pictures(1)[0],), cameras(1), ("start",), (None,), scene.cloud)
    with pytest.raises(ValueError, match="depth of view 'start'"):
        Scene(scene.pictures, cameras(1), ("start",), (torch.ones(2, 2),), scene.cloud)
    with pytest.raises(ValueError, match="at most 1000"):
        scene.with_path("long", cameras(MAX_VIEWS), list(range(MAX_VIEWS)), to_bytes(pictures(MAX_VIEWS)))
    zeros = torch.zeros(1, 3).expand(MAX_POINTS + 1, 3)
    with pytest.raises(ValueError, match="thin it to at most 4,000,000"):
        scene.with_cloud(PointCloud(zeros, zeros))
