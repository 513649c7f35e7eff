"""A scene as Gaussians: core's splat nodes take them, and core's renderer shows the view from its camera."""

import math
import os

import comfy_extras.nodes_gaussian_splat as core
import pytest
import torch
from PIL import Image
from test_fuse import off_the_surface, orbit, photographs, spoilt
from worldstereo_fp8.comfy_nodes.common import splat_of
from worldstereo_fp8.comfy_nodes.scene_files import WorldStereoSceneToSplat
from worldstereo_fp8.scene import sample
from worldstereo_fp8.scene.cameras import (
    Cameras,
    centres,
    quaternion_to_rotation,
    rigid_inverse,
    rotation_to_quaternion,
)
from worldstereo_fp8.scene.depth import points_from_depth
from worldstereo_fp8.scene.pointcloud import PointCloud
from worldstereo_fp8.scene.render import project, render
from worldstereo_fp8.scene.scene import Scene, to_bytes
from worldstereo_fp8.scene.splat import FINER, OPACITY, SIGMA_PIXELS, STEEPEST, STRETCH, _slopes, gaussians_of_scene

WIDTH, HEIGHT, FOCAL = 416, 240, 320.0


@pytest.fixture(scope="module")
def scene():
    cameras = orbit([0, 12, 24], WIDTH, HEIGHT, FOCAL)
    pictures, depths = photographs(cameras)
    cloud = points_from_depth(pictures[0], depths[0], cameras.w2c[0], cameras.K[0])
    return Scene(to_bytes(torch.stack(pictures)), cameras, ("a", "b", "c"), depths, cloud)


@pytest.fixture(scope="module")
def splat(scene):
    WorldStereoSceneToSplat.hidden = type("Hidden", (), {"unique_id": None})
    return WorldStereoSceneToSplat.execute(scene, 1_000_000).args[0]


def core_camera(cameras, number):
    """Core's camera_info: a camera with y up that looks along -z, in a world with y up."""
    flip = torch.tensor([1.0, -1.0, -1.0])
    x, y, z = (centres(cameras.w2c[number]) * flip).tolist()
    rotation = flip[:, None] * rigid_inverse(cameras.w2c)[number, :3, :3] * flip
    qw, qx, qy, qz = rotation_to_quaternion(rotation[None])[0].tolist()
    fov = math.degrees(2 * math.atan(min(WIDTH, HEIGHT) / 2 / FOCAL))
    quaternion = {"w": qw, "x": qx, "y": qy, "z": qz}
    return {"position": {"x": x, "y": y, "z": z}, "quaternion": quaternion, "fov": fov}


def drawn(splat, cameras, number):
    """Core's render [H, W, 3] of a splat on mid-grey, and where it covers the picture [H, W]."""
    image, mask = core.RenderSplat.execute(
        splat, WIDTH, HEIGHT, 1, 1.0, 1.0, 0.0, 0.0, "#808080", "color", core_camera(cameras, number)
    ).args
    return image[0].cpu(), mask[0].cpu() > 0.5


def decibels(picture, truth, where):
    return -10 * math.log10((picture - truth)[where].square().mean().item())


def test_from_new_cameras_it_is_nearer_to_the_truth_than_the_render_of_the_points(scene, splat):
    cameras = orbit([6, 18, -4], WIDTH, HEIGHT, FOCAL)
    truth, _ = photographs(cameras)
    clouds = [
        points_from_depth(scene.picture(n)[0], scene.depths[n], scene.cameras.w2c[n], scene.cameras.K[n])
        for n in range(len(scene))
    ]
    points = PointCloud(torch.cat([cloud.points for cloud in clouds]), torch.cat([cloud.colors for cloud in clouds]))
    pictures, holes = render(points, cameras)
    for number, degrees in enumerate((6, 18, -4)):
        image, covered = drawn(splat, cameras, number)
        both = (holes[number] == 0) & covered
        of_splat, of_points = (decibels(picture, truth[number], both) for picture in (image, pictures[number]))
        if folder := os.environ.get("SCREENSHOTS"):
            print(
                f"{degrees} degrees: splat {of_splat:.1f} dB, points {of_points:.1f} dB, on {both.float().mean():.1%}"
            )
            row = torch.cat([truth[number], pictures[number], image], 1)
            Image.fromarray((row * 255).byte().numpy()).save(f"{folder}/splat_{degrees}.png")
        assert of_splat > 30 and of_splat > of_points + 0.1
        assert (~covered).float().mean() < holes[number].mean() + 0.015


@pytest.mark.parametrize("view", [0, 2])
def test_cores_render_from_a_views_camera_shows_the_view(scene, splat, view):
    image, covered = drawn(splat, scene.cameras, view)
    assert decibels(image, scene.picture(view)[0], covered) > 30 and covered.float().mean() > 0.97


def test_core_writes_reads_merges_and_counts_it(splat):
    count = splat.positions.shape[1]
    for format in ("ply", "spz", "ksplat"):
        file = core.SplatToFile3D.execute(splat, format).args[0]
        back = core.File3DToSplat.execute(file).args[0]
        assert back.positions.shape == (1, count, 3)
        torch.testing.assert_close(back.positions, splat.positions, rtol=1e-4, atol=3e-4)
        torch.testing.assert_close(back.scales, splat.scales, rtol=0.07, atol=1e-5)
    merged = core.MergeSplat.execute({"splat_0": splat, "splat_1": splat}).args[0]
    assert merged.positions.shape == (1, 2 * count, 3)


def alone(scene, depth=None):
    """The scene's first view, with another depth if one is given."""
    depth = scene.depths[0] if depth is None else depth
    return Scene(scene.pictures[:1], scene.cameras[[0]], ("a",), (depth,), scene.cloud)


def test_each_covers_its_pixel_on_the_surface_and_is_flat_along_the_normal(scene):
    made = gaussians_of_scene(alone(scene), 10**6)
    _, depth, normal = sample.photograph(scene.cameras[[0]])
    assert 0.9 < len(made) / depth.numel() < 1  # all but those on depth edges
    u, v, z = project(made.points, scene.cameras.w2c[0], scene.cameras.K[0])
    x, y = u.long(), v.long()
    assert ((u - 0.5 - x).abs() < 1e-2).all() and (z / depth[y, x] - 1).abs().max() < 1e-4
    assert (made.colors - scene.picture(0)[0][y, x]).abs().max() < 1e-6
    R = quaternion_to_rotation(made.rotations)
    true = normal[y, x] @ scene.cameras.w2c[0, :3, :3]
    cosine = (R[:, :, 2] * true).sum(1).abs()
    assert cosine.quantile(0.1) > math.cos(math.radians(3))
    pixel = z / FOCAL
    long, short, thick = (made.sizes / pixel[:, None]).unbind(1)
    torch.testing.assert_close(short.median(), torch.tensor(SIGMA_PIXELS), rtol=0.1, atol=0)
    assert (long >= short - 1e-6).all() and (long <= STRETCH * short + 1e-4).all() and (thick < 0.3 * short).all()
    # The footprint: a pixel's area, divided by the cosine of the angle under which the surface is seen.
    ray = torch.nn.functional.normalize(made.points - centres(scene.cameras.w2c[0]), dim=1)
    seen = (ray * true).sum(1).abs() * torch.linalg.vector_norm(
        (made.points @ scene.cameras.w2c[0, :3, :3].T) / z[:, None], dim=1
    )
    area = long * short * seen / SIGMA_PIXELS**2
    assert area.quantile(0.1) > 0.9 and area.quantile(0.95) < 1.1


@pytest.mark.parametrize("across", [False, True])
def test_what_is_seen_too_flat_is_no_surface(across):
    """A floor, and a wall beside the camera, whose lens is off the picture's centre: by the angle to the normal."""
    height, width = 60, 90
    K = torch.tensor([[100.0, 0, 20], [0, 80, 12], [0, 0, 1]])
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rays = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)])
    down = rays[0 if across else 1]
    cosine = down / rays.norm(dim=0)
    depth = torch.where(down > 0, 1 / down, torch.inf)
    made = _slopes(depth, down > 0.01, K)[1]
    inner = torch.zeros_like(made)
    inner[3:-3, 3:-3] = True
    assert made[inner & (cosine > STEEPEST + 0.02) & (down > 0.1)].all()
    assert not made[cosine < STEEPEST - 0.005].any()
    assert made.any() and (cosine < STEEPEST - 0.005).any()


def test_what_lies_on_no_surface_is_left_out(scene):
    blurred = [
        torch.nn.functional.avg_pool2d(depth[None], 3, 1, 1, count_include_pad=False)[0] for depth in scene.depths
    ]
    depths = [spoilt(depth, torch.Generator().manual_seed(seed)) for seed, depth in enumerate(blurred)]
    raw = [
        points_from_depth(scene.picture(n)[0], depth, scene.cameras.w2c[n], scene.cameras.K[n]).points
        for n, depth in enumerate(depths)
    ]
    made = gaussians_of_scene(Scene(scene.pictures, scene.cameras, scene.names, tuple(depths), scene.cloud), 10**6)
    wrong, before = ((off_the_surface(points) > 0.1).float().mean() for points in (made.points, torch.cat(raw)))
    assert before > 0.15 and wrong < 0.01
    assert len(made) > 80_000


def test_a_surface_is_shown_once_by_the_view_that_shows_it_finest(scene):
    alike = [0, 0, 0]
    twice = Scene(
        tuple(scene.pictures[n] for n in alike), scene.cameras[alike], ("a", "b", "c"), tuple(scene.depths[n] for n in alike), scene.cloud
    )  # fmt: skip
    assert len(gaussians_of_scene(twice, 10**6)) == len(gaussians_of_scene(alone(scene), 10**6))
    # Half as far away, the same lens shows twice the detail: the coarser view's Gaussians give way there.
    near = orbit([0], WIDTH, HEIGHT, FOCAL)
    w2c = near.w2c.clone()
    w2c[0, 2, 3] -= 1.8
    near = Cameras(w2c, near.K, WIDTH, HEIGHT)
    (picture,), (depth,) = photographs(near)
    both = alone(scene).with_views(to_bytes(picture[None]), near, ["near"], [depth])
    made = gaussians_of_scene(both, 10**6)
    u, v, z = project(made.points, w2c[0], near.K[0])
    inside = (z > 0.5) & (u > 20) & (u < WIDTH - 20) & (v > 20) & (v < HEIGHT - 20)
    seen = inside.clone()
    seen[inside] = (depth[v[inside].long(), u[inside].long()] / z[inside] - 1).abs() < 0.02
    coarse = made.sizes[:, 1] > 1.1 * FINER * SIGMA_PIXELS * z / FOCAL
    assert seen.sum() > 50_000 and coarse[seen].float().mean() < 0.02


def test_without_depth_the_points_serve(scene):
    made = gaussians_of_scene(Scene(scene.pictures, scene.cameras, scene.names, (None,) * 3, scene.cloud), 10**6)
    assert torch.equal(made.points, scene.cloud.points) and (made.sizes > 0).all()
    nothing = type(scene.cloud)(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="neither depth nor points"):
        gaussians_of_scene(Scene(scene.pictures, scene.cameras, scene.names, (None,) * 3, nothing), 10**6)


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_the_number_is_bounded_and_no_gaps_appear(scene, limit):
    made = gaussians_of_scene(scene, limit)
    assert 0.7 * limit < len(made) <= limit
    image, covered = drawn(splat_of(made.points, made.sizes, made.colors, OPACITY, made.rotations), scene.cameras, 1)
    assert covered.float().mean() > 0.93 and decibels(image, scene.picture(1)[0], covered) > (
        19 if limit == 1000 else 24
    )


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (5, 1), (16, 16)])
def test_tiny_views_with_holes(height, width):
    K = torch.tensor([[[10.0, 0, width / 2], [0, 10, height / 2], [0, 0, 1]]])
    depth = torch.full((height, width), 2.0)
    depth[0, 0] = torch.nan if depth.numel() > 1 else 2.0
    picture = torch.zeros(height, width, 3, dtype=torch.uint8)
    cloud = PointCloud(torch.zeros(0, 3), torch.zeros(0, 3))
    scene = Scene((picture,), Cameras(torch.eye(4)[None], K, width, height), ("a",), (depth,), cloud)
    made = gaussians_of_scene(scene, 1000)
    assert 1 <= len(made) <= depth.numel() and made.points.isfinite().all() and (made.sizes > 0).all()


def test_pixels_may_land_exactly_on_another_views_border():
    """Half a pixel to the right and below: in a column and a row that the view does not have."""
    K = torch.tensor([[[8.0, 0, 8.5], [0, 8, 8.5], [0, 0, 1]]]).expand(2, 3, 3)
    w2c = torch.eye(4).repeat(2, 1, 1)
    w2c[1, :2, 3] = 0.125
    depths, pictures = (torch.full((17, 17), 2.0),) * 2, (torch.zeros(17, 17, 3, dtype=torch.uint8),) * 2
    u, v, _ = project(points_from_depth(pictures[0] / 255, depths[0], w2c[0], K[0]).points, w2c[1], K[1])
    assert u.max() == v.max() == 17
    cloud = PointCloud(torch.zeros(0, 3), torch.zeros(0, 3))
    made = gaussians_of_scene(Scene(pictures, Cameras(w2c, K, 17, 17), ("a", "b"), depths, cloud), 1000)
    assert len(made) == 17**2  # the second view shows nothing new
