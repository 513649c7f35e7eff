"""A scene as Gaussians: core's splat nodes take them, and core's renderer shows the view from its camera."""

import math
import os

import comfy_extras.nodes_gaussian_splat as core
import pytest
import torch
from PIL import Image
from test_fuse import orbit, photographs
from worldstereo_fp8.comfy_nodes.scene_files import WorldStereoSceneToSplat
from worldstereo_fp8.scene.cameras import centres, rigid_inverse, rotation_to_quaternion
from worldstereo_fp8.scene.depth import points_from_depth
from worldstereo_fp8.scene.scene import Scene, to_bytes
from worldstereo_fp8.scene.splat import gaussians_of_scene

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


@pytest.mark.parametrize("view", [0, 2])
def test_cores_render_from_a_views_camera_shows_the_view(scene, splat, view):
    image, mask = core.RenderSplat.execute(
        splat, WIDTH, HEIGHT, 1, 1.0, 1.0, 0.0, 0.0, "#000000", "color", core_camera(scene.cameras, view)
    ).args
    picture = scene.picture(view)[0]
    psnr = -10 * math.log10((image[0].cpu() - picture).square().mean().item())
    if folder := os.environ.get("SCREENSHOTS"):
        both = torch.cat([picture, image[0].cpu()])
        Image.fromarray((both * 255).byte().numpy()).save(f"{folder}/splat_{view}.png")
        print(f"view {view}: {psnr:.1f} dB")
    assert psnr > 25 and mask.mean() > 0.94


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


def test_each_pixel_with_depth_is_a_gaussian_of_its_size(scene):
    made = gaussians_of_scene(
        Scene(scene.pictures[:1], scene.cameras[[0]], ("a",), scene.depths[:1], scene.cloud), 10**6
    )
    assert torch.equal(made.points, scene.cloud.points)  # the first camera's pixels, without depth edges
    depth = (made.points @ scene.cameras.w2c[0, :3, :3].T + scene.cameras.w2c[0, :3, 3])[:, 2]
    torch.testing.assert_close(made.sizes, 0.5 * depth / FOCAL, rtol=1e-3, atol=0)
    assert (made.colors - scene.cloud.colors).abs().max() <= 0.5001 / 255


def test_without_depth_the_points_serve(scene):
    made = gaussians_of_scene(Scene(scene.pictures, scene.cameras, scene.names, (None,) * 3, scene.cloud), 10**6)
    assert torch.equal(made.points, scene.cloud.points) and (made.sizes > 0).all()
    nothing = type(scene.cloud)(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="neither depth nor points"):
        gaussians_of_scene(Scene(scene.pictures, scene.cameras, scene.names, (None,) * 3, nothing), 10**6)


def test_the_number_is_bounded_and_gaps_are_closed(scene):
    made, all_of_it = gaussians_of_scene(scene, 10_000), gaussians_of_scene(scene, 10**6)
    assert 8_000 <= len(made.points) <= 10_000 < len(all_of_it.points)
    assert made.sizes.median() > 2 * all_of_it.sizes.median()
