"""The rules that turn a picture and its depth into points, and the kinds of depth people have."""

import math

import pytest
import torch
from worldstereo_fp8.scene.depth import (
    DEPTH_PICTURES,
    depth_of_moge,
    depth_of_picture,
    draw_in,
    on_edge,
    points_from_depth,
)

W2C = torch.tensor([[0.8, 0, 0.6, 1], [0, 1, 0, 2], [-0.6, 0, 0.8, 3], [0, 0, 0, 1]])
K = torch.tensor([[20.0, 0, 8], [0, 20, 4], [0, 0, 1]])


def test_far_depths_are_drawn_in_without_a_jump():
    depth = torch.tensor([1.0, 1, 1, 1, 7.9, 8, 16, 1e9])
    expected = torch.tensor([1.0, 1, 1, 1, 7.9, 8, 12, 16])
    torch.testing.assert_close(draw_in(depth), expected)


def test_edges_are_where_the_disparity_falls_steeply():
    limit = -math.log(0.35) / 10  # the Sobel magnitude at which exp(-10 g) = 0.35
    disparity = torch.zeros(5, 40)
    disparity[:, 20:] = torch.linspace(0, 1, 20)  # a slope of 1/19 a pixel: a magnitude of 8/19, steep enough
    assert on_edge(disparity)[:, 20:39].all() and not on_edge(disparity)[:, :19].any()
    gentle = torch.linspace(0, 1, int(8 / limit) + 3).expand(5, -1)
    assert not on_edge(gentle).any()
    assert not on_edge(torch.ones(4, 4)).any()


def test_edges_and_pixels_without_depth_leave_no_points():
    picture = torch.zeros(8, 16, 3)
    depth = torch.full((8, 16), 2.0)
    depth[:, 8:] = 1.0  # an edge between columns 7 and 8
    picture[:, 7:9] = 1.0
    cloud = points_from_depth(picture, depth, W2C, K)
    assert len(cloud) == 8 * 14
    assert not cloud.colors.any()  # no point of the columns beside the edge

    depth[:2, 2] = float("nan")  # beside what has no depth the edge is flat
    depth[6, 0], depth[7, 0] = float("inf"), 0.0
    picture[:] = 0.0
    picture[:3, 1:4] = picture[5:, :2] = 1.0
    cloud = points_from_depth(picture, depth, W2C, K)
    assert len(cloud) == 8 * 16 - 9 - 6
    assert not cloud.colors.any()
    with pytest.raises(ValueError, match="no valid depth"):
        points_from_depth(picture, torch.full((8, 16), float("nan")), W2C, K)
    with pytest.raises(ValueError, match="no valid depth"):
        points_from_depth(picture, -depth, W2C, K)


def plain_points(picture, depth, w2c, K):
    """The rules of the renders written down a second time, pixel by pixel, in float64."""
    height, width = depth.shape
    valid = [[math.isfinite(z) and z > 0 for z in row] for row in depth.tolist()]
    known = sorted(z for row, there in zip(depth.tolist(), valid) for z, ok in zip(row, there) if ok)
    far = 8 * known[(len(known) - 1) // 2]
    z = [
        [2 * far - far * far / z if ok and z > far else z for z, ok in zip(*rows)]
        for rows in zip(depth.tolist(), valid)
    ]
    disparity = [[1 / value if ok else 1e7 for value, ok in zip(*rows)] for rows in zip(z, valid)]
    low, high = min(map(min, disparity)), max(map(max, disparity))

    def at(y, x):
        value = disparity[min(max(y, 0), height - 1)][min(max(x, 0), width - 1)]
        return (value - low) / (high - low) if high > low else 0.0

    points, colors = [], []
    for y in range(height):
        for x in range(width):
            across = sum(weight * (at(y + dy, x + 1) - at(y + dy, x - 1)) for dy, weight in ((-1, 1), (0, 2), (1, 1)))
            down = sum(weight * (at(y + 1, x + dx) - at(y - 1, x + dx)) for dx, weight in ((-1, 1), (0, 2), (1, 1)))
            if not valid[y][x] or math.exp(-10 * math.hypot(across, down)) < 0.35:
                continue
            ray = torch.linalg.inv(K.double()) @ torch.tensor([x + 0.5, y + 0.5, 1.0], dtype=torch.float64)
            points.append(torch.linalg.inv(w2c.double()) @ torch.cat([z[y][x] * ray, torch.ones(1)]))
            colors.append(picture[y, x])
    if not points:  # tiny pictures that are all edge
        return torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 3)
    return torch.stack(points)[:, :3], torch.stack(colors)


@pytest.mark.parametrize("height, width", [(7, 13), (12, 5), (9, 16), (1, 6), (3, 3)])
@pytest.mark.parametrize("holes", ["none", "sky", "spots"])
def test_the_points_are_those_of_a_second_plain_implementation(height, width, holes):
    generator = torch.Generator().manual_seed(height * width)
    smooth = torch.nn.functional.interpolate(
        1 + 3 * torch.rand(1, 1, 3, 4, generator=generator), (height, width), mode="bilinear"
    )[0, 0]
    smooth[:, width // 2 :] *= 2.5  # an edge
    smooth[-1, 0] = 300.0  # far beyond eight medians
    if holes == "sky":
        smooth[: height // 3] = torch.inf
    elif holes == "spots":
        for value in (torch.nan, torch.inf, 0.0):
            smooth[torch.rand(smooth.shape, generator=generator) < 0.05] = value
        smooth[-1, -1] = 2.0
    picture = torch.rand(height, width, 3, generator=generator)
    lens = torch.tensor([[11.0, 0, width / 2 + 1], [0, 13, height / 2 - 0.5], [0, 0, 1]])
    cloud = points_from_depth(picture, smooth, W2C, lens)
    points, colors = plain_points(picture, smooth, W2C, lens)
    assert torch.equal(cloud.colors, colors)
    torch.testing.assert_close(cloud.points.double(), points, atol=1e-4, rtol=1e-5)


def test_a_depth_map_of_another_size_is_resized():
    cloud = points_from_depth(torch.zeros(8, 16, 3), torch.full((4, 8), 3.0), W2C, K)
    depth = (cloud.points @ W2C[:3, :3].T + W2C[:3, 3])[:, 2]
    assert len(cloud) == 128
    torch.testing.assert_close(depth, torch.full((128,), 3.0))


def test_points_land_on_the_pixel_centres_they_came_from():
    picture = torch.rand(8, 16, 3, generator=torch.Generator().manual_seed(0))
    cloud = points_from_depth(picture, torch.full((8, 16), 3.0), W2C, K)
    u, v, depth = K @ (W2C[:3, :3] @ cloud.points.T + W2C[:3, 3:])
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    torch.testing.assert_close(torch.stack([u / depth, v / depth]), torch.stack([x.flatten(), y.flatten()]))
    assert torch.equal(cloud.colors, picture.reshape(-1, 3))


def test_moge_depth_is_infinite_outside_its_mask():
    depth = torch.tensor([[[1.0, 2, 3]]])
    mask = torch.tensor([[[True, False, True]]])
    geometry = {"depth": depth, "mask": mask, "intrinsics": torch.eye(3)[None]}
    assert torch.equal(depth_of_moge(geometry), torch.tensor([[1.0, torch.inf, 3]]))


@pytest.mark.parametrize(
    "geometry, message",
    [
        ({"intrinsics": torch.eye(3)[None]}, "holds no depth"),
        ({"depth": torch.ones(1, 2, 4)}, "is a panorama's"),
        ({"depth": torch.ones(3, 2, 4), "intrinsics": torch.eye(3).repeat(3, 1, 1)}, "holds 3 pictures"),
    ],
)
def test_unusable_moge_geometry_is_named(geometry, message):
    with pytest.raises(ValueError, match=message):
        depth_of_moge(geometry)


def test_depth_pictures():
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3, 1).expand(1, 1, 3, 3)
    disparity, depth = DEPTH_PICTURES
    torch.testing.assert_close(depth_of_picture(image, disparity, 1.0, 4.0), torch.tensor([[4.0, 1.6, 1.0]]))
    torch.testing.assert_close(depth_of_picture(image, depth, 1.0, 4.0), torch.tensor([[1.0, 2.5, 4.0]]))


@pytest.mark.parametrize(
    "image, kind, near, far, message",
    [
        (torch.rand(1, 4, 4, 3), DEPTH_PICTURES[0], 1.0, 2.0, "coloured"),
        (torch.ones(2, 4, 4, 3), DEPTH_PICTURES[0], 1.0, 2.0, "batch of 2"),
        (torch.ones(1, 4, 4, 3), DEPTH_PICTURES[1], 2.0, 1.0, "far must be the larger"),
        (torch.ones(1, 4, 4, 3), DEPTH_PICTURES[0], 0.0, 1.0, "needs a near above 0"),
    ],
)
def test_unusable_depth_pictures_are_named(image, kind, near, far, message):
    with pytest.raises(ValueError, match=message):
        depth_of_picture(image, kind, near, far)
