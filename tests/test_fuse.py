"""The cloud that grows: depth of unknown scale and shift fitted to it, on a drawn scene whose surfaces are known."""

import math
import time

import numpy as np
import pytest
import torch
from worldstereo_fp8.scene import fuse as fuse_module
from worldstereo_fp8.scene import sample
from worldstereo_fp8.scene.cameras import Cameras
from worldstereo_fp8.scene.depth import points_from_depth
from worldstereo_fp8.scene.fuse import (
    RESIDUAL_LIMIT,
    SAME_SURFACE,
    cloud_depth,
    fit_depth,
    fuse,
    outliers,
    thin_by_voxels,
)
from worldstereo_fp8.scene.memory import frames_to_remember
from worldstereo_fp8.scene.pointcloud import PointCloud, neighbour_distances
from worldstereo_fp8.scene.render import project, render

WIDTH, HEIGHT, FOCAL = 208, 120, 160.0
TARGET = torch.tensor([0.0, 0.2, 4.0], dtype=torch.float64)


def orbit(degrees, width=WIDTH, height=HEIGHT, focal=FOCAL):
    """Cameras that circle the scene's middle, the first at the origin."""
    poses = []
    for angle in map(math.radians, degrees):
        centre = TARGET + 4 * torch.tensor([-math.sin(angle), -0.05, -math.cos(angle)], dtype=torch.float64)
        forward = torch.nn.functional.normalize(TARGET - centre, dim=0)
        right = torch.nn.functional.normalize(torch.linalg.cross(TARGET.new_tensor([0.0, 1, 0]), forward), dim=0)
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
        pose[:3, 3] = -pose[:3, :3] @ centre
        poses.append(pose)
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    return Cameras(torch.stack(poses), K.repeat(len(poses), 1, 1), width, height)


def photographs(cameras):
    pictures, depths, _ = zip(*(sample.photograph(cameras[number]) for number in range(len(cameras))))
    return pictures, depths


def off_the_surface(points):
    """The distance [P] of points from the nearest surface of the drawn scene."""
    points = points.double()
    low, high = (points.new_tensor(corner) for corner in sample.ROOM)
    distances = [torch.minimum((points - low).abs(), (points - high).abs()).amin(1)]
    for low, high, _ in sample.BOXES:
        low, high = points.new_tensor(low), points.new_tensor(high)
        q = (points - (low + high) / 2).abs() - (high - low) / 2
        distances.append((q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0)).abs())
    for centre, radius, _ in sample.SPHERES:
        distances.append(((points - points.new_tensor(centre)).norm(dim=1) - radius).abs())
    return torch.stack(distances).amin(0)


def spoilt(depth, generator, share=0.1):
    """The depth with a share of its pixels anything, and a box that moves through the picture."""
    height, width = depth.shape
    depth = depth.clone()
    wrong = torch.rand(depth.shape, generator=generator) < share
    depth[wrong] = 0.3 + 12 * torch.rand(int(wrong.sum()), generator=generator)
    left = int(torch.randint(width // 2, (1,), generator=generator))
    depth[height // 4 : height // 2, left : left + width // 5] = 1.2
    return depth


@pytest.fixture(scope="module")
def start():
    camera = orbit([0])
    (picture,), (depth,) = photographs(camera)
    return points_from_depth(picture, depth, camera.w2c[0], camera.K[0])


@pytest.mark.parametrize("seed", range(3))
def test_new_frames_are_fitted_and_added_where_the_cloud_has_holes(start, seed):
    generator = torch.Generator().manual_seed(seed)
    cameras = orbit([6, 12, 18, 24, 30])
    pictures, depths = photographs(cameras)
    scales = torch.exp(torch.randn(len(cameras), generator=generator))
    shifts = torch.randn(len(cameras), generator=generator).clamp(-0.6, 0.6)  # metres
    given = [
        (spoilt(depth, generator) - shift) / scale
        for depth, scale, shift in zip(depths, scales.tolist(), shifts.tolist())
    ]
    before = start.points.clone()
    frames = (torch.stack(pictures) * 255).round().byte()
    done = []
    fused, report = fuse(start, frames, given, cameras, progress=done.append)
    assert (start.points == before).all() and done == [1] * 5
    assert report.before == len(start) and report.after == len(fused) > 1.2 * len(start)
    for fit, scale, shift in zip(report.frames, scales.tolist(), shifts.tolist()):
        assert not fit.refused and fit.added > 0 and 0.5 < fit.overlap < 1
        assert fit.scale == pytest.approx(scale, rel=0.01)
        assert fit.shift == pytest.approx(shift, abs=0.02)
        assert fit.residual < 0.01
    added = fused.points[len(start) :]
    distance = off_the_surface(added) / (added - orbit([15]).w2c[0, :3, 3]).norm(dim=1)
    assert distance.median() < 0.01 and (distance < 0.01).float().mean() > 0.95
    assert report.seen_through > 1000  # the box that moved
    assert f"{len(start):,} points before, {len(fused):,} after" in str(report)

    holes_before = render(start, cameras[[4]], radius=0.03)[1].mean()
    picture, holes = render(fused, cameras[[4]], radius=0.03)
    assert holes.mean() < 0.3 * holes_before
    inside = torch.nn.functional.max_pool2d(holes, 5, 1, 2)[0] == 0  # not the rims, which fade to the background
    assert (picture[0] - pictures[4])[inside].abs().mean() < 0.05


@pytest.mark.parametrize("error", [0.0, 0.02])
def test_the_remembered_frames_fill_the_holes_as_all_frames_do(start, error):
    """Of 21 frames the eight that are remembered, with exact depth and with one that is wavy, as a model's is."""
    generator = torch.Generator().manual_seed(0)
    cameras = orbit([1.5 * frame for frame in range(21)])
    pictures, depths = photographs(cameras)
    noise = torch.randn(21, 1, 5, 8, generator=generator)
    waves = torch.nn.functional.interpolate(noise, (HEIGHT, WIDTH), mode="bicubic")[:, 0]
    wavy = torch.stack(depths) * torch.exp(error * waves)
    unfilled = render(start, cameras[[10, 20]], radius=0.03)[1].mean()
    filled = []
    for frames in (list(range(1, 21)), frames_to_remember(21)):
        given = [pictures[frame] for frame in frames], [wavy[frame] for frame in frames], cameras[frames]
        fused, report = fuse(start, *given)
        assert not any(fit.refused for fit in report.frames)
        filled.append(unfilled - render(fused, cameras[[10, 20]], radius=0.03)[1].mean())
    assert filled[0] > 0.5 * unfilled and filled[1] > 0.95 * filled[0]


def test_without_errors_nothing_that_is_known_is_added_again(start):
    camera = orbit([0])
    (picture,), (depth,) = photographs(camera)
    fused, report = fuse(start, picture[None], [depth * 3], camera)
    assert report.frames[0].scale == pytest.approx(1 / 3, rel=1e-4) and report.frames[0].shift == 0
    assert report.frames[0].overlap > 0.7  # at this size, a quarter lies on depth edges
    assert report.frames[0].added < 0.01 * len(start)
    assert len(fused) <= len(start) + report.frames[0].added


@pytest.mark.parametrize("nothing", [float("nan"), float("inf"), 0.0, -3.0])
def test_pixels_without_a_depth_give_no_points(start, nothing):
    cameras = orbit([12])
    (picture,), (depth,) = photographs(cameras)
    given = depth.clone()
    given[:, 150:] = nothing
    fused, report = fuse(start, [picture], [given], cameras)
    added = fused.points[len(start) :]
    (fit,) = report.frames
    assert not fit.refused and fit.scale == pytest.approx(1, rel=0.01) and len(added) > 100
    u, _, z = project(added, cameras.w2c[0], cameras.K[0])
    assert u.max() < 150 and (z > 0).all()
    assert len(added) < len(fuse(start, [picture], [depth], cameras)[0]) - len(start)  # there would have been more


def test_far_depths_are_drawn_in(start):
    """As in the render: at most twice 8 medians away."""
    cameras = orbit([12])
    (picture,), (depth,) = photographs(cameras)
    given = depth.clone()
    given[:40, 170:] = 1000
    fused, _ = fuse(start, [picture], [given], cameras)
    _, _, z = project(fused.points[len(start) :], cameras.w2c[0], cameras.K[0])
    assert 8 * depth.median() < z.max() < 2 * 8 * 1.1 * depth.median()


def test_frames_that_do_not_fit_are_refused_by_name(start, caplog):
    cameras = orbit([5, 10, 170, 15])
    pictures, depths = photographs(cameras)
    generator = torch.Generator().manual_seed(0)
    other = (
        1
        + 5
        * torch.nn.functional.interpolate(
            torch.rand(1, 1, 6, 9, generator=generator), (HEIGHT, WIDTH), mode="bicubic"
        ).clamp(0)[0, 0]
    )
    missing = torch.full_like(other, torch.nan)
    given = [depths[0], other, missing, depths[3]]
    names = ["walk/0003", "cellar/0003", "walk/0009", "walk/0012"]
    fused, report = fuse(start, pictures, given, cameras, names=names)
    assert [bool(fit.refused) for fit in report.frames] == [False, True, True, False]
    assert report.frames[1].residual > RESIDUAL_LIMIT and report.frames[1].added == 0
    for text in (str(report), caplog.text):
        assert "cellar/0003" in text and f"residual {report.frames[1].residual:.1%}" in text
        assert "walk/0009" in text and "too little of the cloud" in text
    alone, _ = fuse(start, [pictures[0], pictures[3]], [depths[0], depths[3]], cameras[[0, 3]])
    assert torch.equal(alone.points, fused.points)


def test_depth_that_is_affine_in_disparity_is_refused_and_reported(start, caplog):
    cameras = orbit([5, 10])
    pictures, (near, far) = photographs(cameras)
    _, report = fuse(start, pictures, [1 / (0.5 / near - 0.066), 2 / far + 0.1], cameras)
    shifted, disparity = (fit.refused for fit in report.frames)
    assert SAME_SURFACE < report.frames[0].residual < RESIDUAL_LIMIT  # which alone would be let through
    assert "does not fit" in shifted and "affine in disparity" in shifted and "MoGe" in shifted
    assert "is a disparity (large is near)" in disparity
    assert "NO POINTS ADDED: none of the 2 frames fits the scene" in str(report)
    assert "none of the 2 frames fits the scene's point cloud" in caplog.text


def test_a_frame_of_another_room_is_refused(start, monkeypatch):
    """A room of other size and spheres, at the same camera: scale and shift cannot make it this one."""
    monkeypatch.setattr(sample, "ROOM", ((-2.0, -1.0, -3.0), (6.0, 2.0, 4.0)))
    monkeypatch.setattr(sample, "BOXES", ())
    monkeypatch.setattr(sample, "SPHERES", (((1.2, 0.6, 2.2), 0.7, (1, 0, 0)), ((-0.8, -0.3, 1.6), 0.4, (0, 1, 0))))
    cameras = orbit([8])
    pictures, depths = photographs(cameras)
    _, report = fuse(start, pictures, depths, cameras, names=["elsewhere"])
    assert "elsewhere refused: its depth does not fit" in str(report)


def test_the_depth_of_the_cloud_is_that_of_its_nearest_points():
    camera = orbit([0], 8, 4, 8.0)
    behind, before = [-0.25, 0.25, 4.0], [-0.125, 0.125, 2.0]  # both in column 3, row 2 of the camera at the origin
    pose = torch.eye(4)
    depth, number = cloud_depth(torch.tensor([behind, before, [0, 0, -1.0]]), pose, camera.K[0], 4, 8)
    assert depth[2, 3] == 2 and number[2, 3] == 1
    assert depth.isfinite().sum() == 1 and (number >= 0).sum() == 1


def test_a_shift_is_not_made_up_where_there_is_one_depth_alone():
    generator = torch.Generator().manual_seed(0)
    target = 5 * (1 + 0.01 * torch.randn(4000, generator=generator))
    depth = torch.full((4000,), 2.5)
    scale, shift, residual = fit_depth(depth * (1 + 0.01 * torch.randn(4000, generator=generator)), target)
    assert scale == pytest.approx(2, rel=0.01) and shift == 0 and residual < 0.02


def test_the_fit_stands_a_third_of_wrong_pairs():
    generator = torch.Generator().manual_seed(0)
    target = 2 + 6 * torch.rand(9000, generator=generator)
    depth = (target - 0.4) / 1.7 * (1 + 0.01 * torch.randn(9000, generator=generator))
    depth[:3000] = 0.5 + torch.rand(3000, generator=generator)  # a thing in front, on one side
    scale, shift, _ = fit_depth(depth, target)
    assert scale == pytest.approx(1.7, rel=0.01) and shift == pytest.approx(0.4, abs=0.03)
    # The pairs drawn are the same every time; sums over threads differ in the last digits.
    assert fit_depth(depth, target) == pytest.approx(fit_depth(depth, target), rel=1e-9)
    assert fit_depth(depth, target, shift=False)[1] == 0


def test_far_points_are_outliers():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(5000, 3, generator=generator)
    points[4990:] += 3 + 5 * torch.arange(10)[:, None]
    assert outliers(points)[4990:].all() and outliers(points)[:4990].float().mean() < 0.06
    assert outliers(points, 4000).shape == (1000,)
    assert not outliers(points[:5]).any()


def test_outliers_by_all_distances_and_in_pieces():
    points = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    for start in (0, 150):
        mean = torch.cdist(points[start:], points).sort(1).values[:, 1:21].mean(1)
        assert torch.equal(outliers(points, start), mean > mean.mean() + 2 * mean.std(correction=0))
    many = torch.rand(70_000, 3, generator=torch.Generator().manual_seed(0))
    many[69_000] = 9.0
    found = outliers(many, 100)
    assert found[68_900]
    assert found.float().mean() < 0.06


@pytest.mark.parametrize("limit", [1, 700, 20_000, 49_999])
def test_voxels_thin_to_within_a_fifth_of_what_is_wanted(limit):
    points = torch.rand(50_000, 3, generator=torch.Generator().manual_seed(0)) ** 3
    keep, size = thin_by_voxels(points, limit)
    assert 0.8 * limit <= len(keep) <= limit and size > 0
    assert (keep.diff() > 0).all() and (limit == 1 or keep[0] == 0)


def test_voxels_are_the_same_piece_by_piece(monkeypatch):
    points = torch.rand(5000, 3, generator=torch.Generator().manual_seed(0)) ** 3
    whole = thin_by_voxels(points, 700)
    monkeypatch.setattr(fuse_module, "VOXEL_PIECE", 300)
    in_pieces = thin_by_voxels(points, 700)
    assert torch.equal(in_pieces[0], whole[0]) and in_pieces[1] == whole[1]


def test_what_cannot_be_thinned_apart_is_thinned_together():
    points = torch.tensor([[1.0, 2, 3]]).repeat(100, 1)
    assert thin_by_voxels(points, 10)[0].tolist() == [0]
    points = torch.cat([points, torch.full((1, 3), 1e30)])
    assert thin_by_voxels(points, 10)[0].tolist() == [0, 100]
    assert thin_by_voxels(points, 1000)[0].tolist() == list(range(101))


def test_memory_is_bounded_while_it_grows(start):
    cameras = orbit(np.linspace(5, 60, 6))
    pictures, depths = photographs(cameras)
    fused, report = fuse(start, pictures, depths, cameras, limit=5000)
    assert 3000 <= len(fused) <= 5000 < sum(fit.added for fit in report.frames)
    assert not any(fit.refused for fit in report.frames)


def test_counts_must_match(start):
    cameras = orbit([5, 10])
    with pytest.raises(ValueError, match="1 frames, 2 depth maps and 2 cameras"):
        fuse(start, torch.zeros(1, 4, 4, 3), [torch.ones(4, 4)] * 2, cameras)
    with pytest.raises(ValueError, match="cloud is empty"):
        fuse(PointCloud(torch.zeros(0, 3), torch.zeros(0, 3)), torch.zeros(2, 4, 4, 3), [torch.ones(4, 4)] * 2, cameras)


def test_neighbours_of_points_in_one_place():
    """A leaf of the tree with all of them would take each query minutes."""
    points = torch.ones(200_000, 3)
    points[::2] += torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0))
    begun = time.monotonic()
    distances = neighbour_distances(points, 3)
    assert time.monotonic() - begun < 40
    assert distances[1::2].max() < 1e-8 and distances[::2].median() > 1e-3


def test_neighbours_of_points_in_one_place_far_from_the_origin():
    """What moves them apart is less than a step of float64 there."""
    begun = time.monotonic()
    assert neighbour_distances(torch.full((40_000, 3), 1e7), 3).max() < 1e-8
    assert time.monotonic() - begun < 5
