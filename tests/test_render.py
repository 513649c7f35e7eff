"""The splat renderer against WorldStereo's own renders and a reference that looks at every point for every pixel."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from toy import GOLDEN
from worldstereo_fp8.scene import render as render_module
from worldstereo_fp8.scene.camera_path import Move, move_on, pinhole
from worldstereo_fp8.scene.cameras import Cameras, quaternion_to_rotation
from worldstereo_fp8.scene.depth import DEPTH_PICTURES, points_from_depth
from worldstereo_fp8.scene.pictures import resize_pictures
from worldstereo_fp8.scene.pointcloud import PointCloud
from worldstereo_fp8.scene.render import mostly_holes, pixels_of, render, render_start


def cameras_of(count=3, width=40, height=24, focal=35.0, seed=0):
    """Cameras near the origin that look about along z, with a little skew and an off-centre principal point."""
    generator = torch.Generator().manual_seed(seed)
    quaternion = torch.tensor([[1.0, 0, 0, 0]]) + 0.1 * torch.randn(count, 4, generator=generator)
    w2c = torch.eye(4).repeat(count, 1, 1)
    w2c[:, :3, :3] = quaternion_to_rotation(quaternion.double()).float()
    w2c[:, :3, 3] = 0.2 * torch.randn(count, 3, generator=generator)
    K = torch.tensor([[focal, 0.5, width / 2 + 1], [0, focal, height / 2 - 1], [0, 0, 1]]).repeat(count, 1, 1)
    return Cameras(w2c, K, width, height)


def cloud_of(count=1500, seed=1):
    """Points all around, also behind the cameras, with some at equal depth."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, generator=generator) * 6 - torch.tensor([3.0, 3.0, 1.5])
    points[count // 2 :] = points[: count - count // 2] + 0.01
    return PointCloud(points, torch.rand(count, 3, generator=generator))


def brute_force(cloud, cameras, radius, points_per_pixel, background):
    """Every pixel asks every point, in float64, one after the other."""
    radius = radius * min(cameras.width, cameras.height) / 2
    pictures = torch.zeros(len(cameras), cameras.height, cameras.width, 3, dtype=torch.float64)
    holes = torch.ones(len(cameras), cameras.height, cameras.width)
    for n in range(len(cameras)):
        camera = cameras.w2c[n].double() @ torch.cat([cloud.points.double(), torch.ones(len(cloud), 1)], 1).T
        uvw = cameras.K[n].double() @ camera[:3]
        depth = uvw[2]
        for row in range(cameras.height):
            for column in range(cameras.width):
                d2 = (uvw[0] / depth - column - 0.5) ** 2 + (uvw[1] / depth - row - 0.5) ** 2
                near = ((depth > 0) & (d2 < radius**2)).nonzero().squeeze(1)
                near = near[depth[near].sort(stable=True).indices][:points_per_pixel]
                left = 1.0
                for point in near.tolist():
                    opacity = 1 - d2[point].item() / radius**2
                    pictures[n, row, column] += left * opacity * cloud.colors[point].double()
                    left *= 1 - opacity
                pictures[n, row, column] += left * torch.tensor(background, dtype=torch.float64)
                holes[n, row, column] = float(len(near) == 0)
    return pictures.float(), holes


@pytest.mark.parametrize(
    "radius, points_per_pixel, tile, chunk",
    [
        (0.15, 20, 1 << 16, 1 << 22),
        (0.15, 3, 1 << 16, 1 << 22),  # more points than a pixel takes
        (0.3, 4, 90, 4096),  # several tiles, several chunks each, full pixels from one chunk to the next
        (0.02, 20, 1 << 16, 1 << 22),  # smaller than a pixel
    ],
)
def test_equals_the_brute_force_reference(monkeypatch, radius, points_per_pixel, tile, chunk):
    monkeypatch.setattr(render_module, "TILE_PIXELS", tile)
    monkeypatch.setattr(render_module, "CHUNK_CELLS", chunk)
    cloud, cameras, background = cloud_of(), cameras_of(), (0.2, 0.4, 0.6)
    pictures, holes = render(cloud, cameras, radius, points_per_pixel, background)
    expected, expected_holes = brute_force(cloud, cameras, radius, points_per_pixel, background)
    torch.testing.assert_close(pictures, expected, atol=2e-4, rtol=0)
    assert torch.equal(holes, expected_holes)
    assert 0 < holes.mean() < 1


@pytest.mark.parametrize("case", ["valid", "sky"])
def test_equals_the_originals_points_and_renders(case):
    """Its splats and points of one picture: with every depth valid, and with sky."""
    golden = load_file(GOLDEN / "render.safetensors")
    depth = golden["depth"].where(golden[f"{case}.invalid"] == 0, torch.inf)
    cloud = points_from_depth(golden["picture"], depth, golden["w2c"][0], golden["K"][0])
    torch.testing.assert_close(cloud.points, golden[f"{case}.points"], atol=1e-5, rtol=0)
    torch.testing.assert_close(cloud.colors, golden[f"{case}.colors"], atol=1e-5, rtol=0)
    height, width = depth.shape
    pictures, holes = render(cloud, Cameras(golden["w2c"], golden["K"], width, height), radius=0.032)
    assert torch.equal(holes, golden[f"{case}.mask"])
    torch.testing.assert_close(pictures, golden[f"{case}.render"], atol=1e-4, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_is_bounded_by_tiles_and_chunks(monkeypatch):
    """Working tensors grow with neither the picture, nor the points, nor their radius."""
    tile, chunk = 1000, 4000
    monkeypatch.setattr(render_module, "TILE_PIXELS", tile)
    monkeypatch.setattr(render_module, "CHUNK_CELLS", chunk)
    monkeypatch.setattr(render_module, "CHUNK_POINTS", 1000)
    cameras = cameras_of(1, width=100, height=80, focal=60.0)
    for count, radius in ((10_000, 0.02), (10_000, 0.3), (2_000, 0.3)):
        cloud = cloud_of(count)
        with LargestTensor() as largest:
            render(cloud, cameras, radius, points_per_pixel=5)
        own = max(3 * count, 3 * 100 * 80)  # the cloud and the finished frame
        assert largest.elements <= max(own, chunk, tile * (5 + 1) + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_picture():
    cloud, cameras = cloud_of(200_000), cameras_of(width=256, height=160, focal=200.0)
    pictures, holes = render(cloud, cameras)
    cuda_pictures, cuda_holes = render(cloud, cameras, device="cuda")
    assert torch.equal(cuda_holes, holes)
    torch.testing.assert_close(cuda_pictures, pictures, atol=1e-5, rtol=0)


def test_one_point_is_a_disc_of_falling_opacity():
    cameras = Cameras(torch.eye(4)[None], torch.tensor([[[10.0, 0, 10], [0, 10, 10], [0, 0, 1]]]), 20, 20)
    cloud = PointCloud(torch.tensor([[0.05, 0.05, 1.0]]), torch.ones(1, 3))  # at the centre of pixel (10, 10)
    pictures, holes = render(cloud, cameras, radius=0.21, background=(0.0, 0.0, 0.0))  # 2.1 pixels
    row = pictures[0, 10, :, 0]
    expected = torch.tensor([1 - 4 / 2.1**2, 1 - 1 / 2.1**2, 1, 1 - 1 / 2.1**2, 1 - 4 / 2.1**2])
    torch.testing.assert_close(row[8:13], expected, atol=1e-5, rtol=0)
    assert (holes[0] == 0).sum() == 13 and holes[0, 10, 7] == 1


def test_a_splat_does_not_cover_what_is_a_radius_away():
    cameras = Cameras(torch.eye(4)[None], torch.tensor([[[8.0, 0, 8.5], [0, 8, 8.5], [0, 0, 1]]]), 16, 16)
    cloud = PointCloud(torch.tensor([[0.0, 0.0, 1.0]]), torch.ones(1, 3))  # at the centre of pixel (8, 8)
    assert (render(cloud, cameras, radius=0.125)[1][0] == 0).nonzero().tolist() == [[8, 8]]  # a radius of one pixel


def test_which_points_fall_into_the_picture():
    """Its left and upper border belong to it, the others do not; nor does what is not in front of the camera."""
    K = torch.tensor([[4.0, 0, 4], [0, 4, 2], [0, 0, 1]])  # of 8x4 pixels
    points = [
        [-1, -0.5, 1],
        [1, 0, 1],
        [0, 0.5, 1],
        [0.99, 0.49, 1],
        [-1.01, 0, 1],
        [0, -0.51, 1],
        [0, 0, 0.01],
        [0, 0, -1],
    ]
    index, row, column, z = pixels_of(torch.tensor(points), torch.eye(4), K, 4, 8)
    assert index.tolist() == [0, 3, 6]
    assert list(zip(row.tolist(), column.tolist())) == [(0, 0), (3, 7), (2, 4)]
    torch.testing.assert_close(z, torch.tensor([1, 1, 0.01]))


@pytest.mark.parametrize("radius, points_per_pixel", [(0, 1), (2.01, 1), (float("nan"), 1), (0.1, 0)])
def test_a_splat_without_a_size_is_refused(radius, points_per_pixel):
    with pytest.raises(ValueError, match="the radius must be above 0 and at most 2, and points_per_pixel at least 1"):
        render(cloud_of(3), cameras_of(1), radius, points_per_pixel)


def test_a_camera_that_sees_nothing_gives_the_background():
    cloud = PointCloud(torch.tensor([[0.0, 0, -1], [0.0, 0, 0], [1e3, 0, 1]]), torch.ones(3, 3))
    pictures, holes = render(cloud, cameras_of(1), background=(0.0, 0.5, 1.0))
    assert holes.all()
    assert torch.equal(pictures, torch.tensor([0.0, 0.5, 1.0]).expand_as(pictures))
    nothing = render(PointCloud(torch.zeros(0, 3), torch.zeros(0, 3)), cameras_of(1), background=(0.0, 0.5, 1.0))
    assert torch.equal(nothing[0], pictures) and nothing[1].all()


def test_progress_counts_every_frame():
    done = []
    render(cloud_of(10), cameras_of(4), progress=done.append)
    assert done == [1, 1, 1, 1]


def test_the_first_camera_sees_its_own_picture():
    generator = torch.Generator().manual_seed(2)
    cameras = cameras_of(1, width=30, height=20)
    picture = torch.rand(20, 30, 3, generator=generator)
    cloud = points_from_depth(picture, torch.full((20, 30), 2.5), cameras.w2c[0], cameras.K[0])
    assert len(cloud) == 600
    pictures, holes = render(cloud, cameras, radius=0.1)  # one pixel: a splat ends at its neighbours' centres
    torch.testing.assert_close(pictures[0], picture, atol=1e-3, rtol=0)
    assert not holes.any()


def start_of(image, scene, cameras, progress=lambda frames: None, **changes):
    """`render_start` with the node's defaults."""
    options = {
        "depth_picture": DEPTH_PICTURES[1],
        "near": 1.0,
        "far": 3.0,
        "width": 64,
        "height": 48,
        "radius": 0.01,
        "points_per_pixel": 20,
        "background": (0.0, 0.0, 0.0),
        "device": "cpu",
    } | changes
    return render_start(image, scene, cameras, progress=progress, **options)


def test_the_first_frame_is_the_picture():
    image = torch.rand(1, 24, 32, 3, generator=torch.Generator().manual_seed(3))
    depth = torch.linspace(0, 1, 48)[None, :, None, None].expand(1, 48, 64, 3)
    cameras = cameras_of(2, width=64, height=48)
    video, holes, cloud = start_of(image, depth, cameras, width=48, height=36)
    assert torch.equal(video[0], resize_pictures(image, 36, 48)[0]) and not holes[0].any()
    assert 0 < holes[1].mean() < 1
    again, _, same = start_of(image, cloud, cameras, width=48, height=36)  # its points in place of the depth
    assert same is cloud
    torch.testing.assert_close(again, video)


def test_frames_that_are_mostly_holes_are_named():
    holes = torch.zeros(4, 2, 4)
    holes[1] = 1
    holes[2, 0] = 1  # half
    holes[3, 0], holes[3, 1, 0] = 1, 1
    assert mostly_holes(holes) == [1, 3]


@pytest.mark.parametrize(
    "count, shape, message", [(2, (48, 64), "image holds 2 pictures"), (1, (48, 48), "depth is 48x48 and image 64x48")]
)
def test_a_picture_and_its_depth_must_belong_together(count, shape, message):
    with pytest.raises(ValueError, match=message):
        start_of(torch.zeros(count, 48, 64, 3), torch.zeros(1, *shape, 3), cameras_of(1))


@pytest.mark.parametrize(
    "size, radius, holes", [((96, 56), 0.008, False), ((96, 56), 0.0081, True), ((832, 480), 0.008, False)]
)
def test_the_trained_radius_grows_where_a_small_render_would_show_gaps(size, radius, holes):
    """A wall, seen from a little to the right; another radius is taken as it is."""
    width, height = size
    wall = {"depth": torch.full((1, height, width), 2.0), "intrinsics": torch.eye(3)[None]}
    cameras = move_on(pinhole(width, height, float(width)), Move("truck right", 0, 0.005, 2, "linear", "off"), 2.0)
    image = torch.rand(1, height, width, 3)
    settings = (DEPTH_PICTURES[0], 1.0, 10.0, width, height, radius, 20, (0.5, 0.5, 0.5), "cpu", lambda frames: None)
    _, masks, _ = render_start(image, wall, cameras, *settings)
    seen = masks[1, 2:-2, 8:-8]
    assert seen.mean() > 0.5 if holes else not seen.any()
