"""A drawn scene with exact depth, to try everything without a file or a depth model: a tiled room with four spheres and
two plinths, drawn by ray casting.

World axes are OpenCV's (x right, y down, z forward); the picture's camera is at the origin, level. Lengths are in
metres.
"""

import torch

from ..core import throw_exception_if_processing_interrupted
from .camera_path import Move, depth_of_scene, move_on, pinhole
from .cameras import Cameras, centres
from .depth import points_from_depth
from .panorama import directions
from .pointcloud import PointCloud

WIDTH, HEIGHT, FOCAL = 832, 480, 640.0  # pixels: 66 degrees wide
NEAR, FAR = 1.0, 10.0  # metres: the depths that white and black of the depth picture stand for
MOVE = Move("orbit left", degrees=20.0, distance=0.0, keyframes=21, easing="linear", look_at_centre="auto")
SAMPLES = 2  # rays per pixel along each axis
RAYS = 2**15  # traced at once: what they need stays in the processor's cache
PANORAMA_HEIGHT = 960  # pixels

ROOM = ((-4.0, -2.2, -3.0), (4.0, 1.0, 7.0))
BOXES = (  # low and high corner, colour
    ((-2.3, -0.25, 4.6), (-1.5, 1.0, 5.4), (0.72, 0.66, 0.58)),
    ((1.5, 0.35, 3.4), (2.1, 1.0, 4.0), (0.45, 0.55, 0.42)),
)
SPHERES = (  # centre, radius, colour
    ((-0.9, 0.35, 3.6), 0.65, (0.85, 0.25, 0.2)),
    ((0.7, 0.6, 2.9), 0.4, (0.95, 0.75, 0.15)),
    ((0.9, 0.0, 4.8), 1.0, (0.2, 0.45, 0.85)),
    ((-1.9, -0.6, 5.0), 0.35, (0.3, 0.65, 0.6)),
)
FIRST_SPHERE = 1 + len(BOXES)  # what a ray hits has a number: 0 the room, then the boxes, then the spheres
LAMP = (-1.2, -1.8, 1.0)
AMBIENT = 0.4


def cast(origin: torch.Tensor, rays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each ray [N, 3] from `origin` [3] hits first: its distance [N] as a multiple of the ray's length, the
    surface's normal [N, 3], which faces the ray's origin, and its colour [N, 3] in 0..1."""
    parts = []
    for part in rays.split(RAYS):
        throw_exception_if_processing_interrupted()
        parts.append(_cast(origin.double(), part.double()))
    distance, normal, color = (torch.cat(part) for part in zip(*parts))
    return distance, normal, color


def distances(origin: torch.Tensor, rays: torch.Tensor) -> torch.Tensor:
    """Only the distances [N] that `cast` returns."""
    return torch.cat([_trace(origin.double(), part.double())[0] for part in rays.split(RAYS)])


def _cast(origin, rays):
    distance, hit, axis = _trace(origin, rays)
    point = origin + rays * distance[:, None]
    normal = -torch.nn.functional.one_hot(axis, 3) * rays.sign()
    for number, (centre, radius, _) in enumerate(SPHERES, FIRST_SPHERE):
        normal = torch.where((hit == number)[:, None], (point - point.new_tensor(centre)) / radius, normal)
    to_lamp = point.new_tensor(LAMP) - point
    towards = torch.nn.functional.normalize(to_lamp, dim=1)
    # From slightly above the surface, so that it does not shade itself.
    lit = _trace(point + 1e-6 * normal, to_lamp)[0] >= 1
    light = AMBIENT + (1 - AMBIENT) * lit * (normal * towards).sum(1).clamp(0, 1)
    return distance, normal, (_paint(point, normal, hit) * light[:, None]).clamp(0, 1)


def _trace(origin, rays):
    """The distance and number of what each ray hits first, and the axis across which that box's side lies."""
    distance, axis = _exit(origin, rays, *ROOM)
    hit = torch.zeros_like(axis)
    for number, (low, high, _) in enumerate(BOXES, 1):
        found, side = _entry(origin, rays, low, high)
        near = found < distance
        axis = side.where(near, axis)
        distance, hit = found.where(near, distance), hit.masked_fill(near, number)
    a = (rays * rays).sum(1)
    for number, (centre, radius, _) in enumerate(SPHERES, FIRST_SPHERE):
        from_centre = origin - rays.new_tensor(centre)
        b, c = (rays * from_centre).sum(1), (from_centre**2).sum(-1) - radius**2
        root = b * b - a * c
        found = ((-b - root.clamp_min(0).sqrt()) / a).masked_fill(root < 0, torch.inf)
        near = (found < distance) & (found > 0)
        distance, hit = found.where(near, distance), hit.masked_fill(near, number)
    return distance, hit, axis


def _slabs(origin, rays, low, high):
    steps = torch.stack([(rays.new_tensor(side) - origin) / rays for side in (low, high)])
    return steps.amin(0).nan_to_num(-torch.inf), steps.amax(0).nan_to_num(torch.inf)


def _exit(origin, rays, low, high):
    return _slabs(origin, rays, low, high)[1].min(1)


def _entry(origin, rays, low, high):
    enters, leaves = _slabs(origin, rays, low, high)
    distance, axis = enters.max(1)
    return distance.masked_fill((distance > leaves.amin(1)) | (distance <= 0), torch.inf), axis


def _paint(point, normal, hit):
    """The colours [N, 3] of surface points."""
    x, y, z = point.unbind(1)
    floor, ceiling = normal[:, 1] < -0.5, normal[:, 1] > 0.5
    tiles = (torch.floor(x * 1.5) + torch.floor(z * 1.5)) % 2
    along = torch.where(normal[:, 2].abs() > 0.5, x, z)
    stripes = 0.5 + 0.5 * torch.sin(along * 6)
    wall = torch.stack([0.5 + 0.12 * stripes, 0.66 + 0.16 * stripes, 0.7 + 0.05 * stripes], 1)
    wall = torch.where((y > 0.35)[:, None], point.new_tensor([0.8, 0.78, 0.72]), wall)  # panelling
    wall = torch.where(((y - 0.35).abs() < 0.03)[:, None], point.new_tensor([0.35, 0.28, 0.22]), wall)
    ground = 0.45 + 0.45 * tiles[:, None] * point.new_tensor([1.0, 0.9, 0.8])
    color = torch.where(floor[:, None], ground, wall)
    color = torch.where(ceiling[:, None], point.new_tensor([0.9, 0.88, 0.85]), color)
    for number, (*_, paint) in enumerate((*BOXES, *SPHERES), 1):
        color = torch.where((hit == number)[:, None], point.new_tensor(paint), color)
    return color


def rays_of(camera: Cameras, samples: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The (first) camera's centre [3] and its rays [H·samples, W·samples, 3] in world axes, each of depth 1."""
    w2c, K = camera.w2c[0].double(), camera.K[0].double()
    y, x = (
        (torch.arange(size * samples, dtype=torch.float64) + 0.5) / samples for size in (camera.height, camera.width)
    )
    pixels = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(len(y), len(x), dtype=torch.float64)], -1)
    return centres(w2c), pixels @ torch.linalg.inv(K).T @ w2c[:3, :3]


def photograph(camera: Cameras) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scene seen by the (first) camera: picture [H, W, 3] in 0..1, depth [H, W], and normals [H, W, 3] in the
    camera's axes. Depth and normals are those at the pixels' centres."""
    origin, rays = rays_of(camera)
    distance, normal, _ = cast(origin, rays.reshape(-1, 3))
    normal = normal @ camera.w2c[0, :3, :3].double().T
    fine = rays_of(camera, SAMPLES)[1]
    color = cast(origin, fine.reshape(-1, 3))[2].view(camera.height, SAMPLES, camera.width, SAMPLES, 3).mean((1, 3))
    return color.float(), distance.view(rays.shape[:2]).float(), normal.view(rays.shape).float()


def start_camera() -> Cameras:
    """The camera that took the sample picture."""
    return pinhole(WIDTH, HEIGHT, FOCAL)


def geometry(camera: Cameras) -> dict:
    """The scene seen by the camera as an exact MOGE_GEOMETRY of core: points, depth, mask, intrinsics, normal,
    image."""
    picture, depth, normal = photograph(camera)
    K = camera.K[0].double()
    y, x = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1).double() @ torch.linalg.inv(K).T
    return {
        "image": picture[None],
        "depth": depth[None],
        "points": (rays * depth[..., None]).float()[None],
        "mask": torch.ones_like(depth, dtype=torch.bool)[None],
        "intrinsics": (camera.K[:1] / torch.tensor([camera.width, camera.height, 1.0])[:, None]),
        "normal": normal[None],
    }


def panorama(height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scene all around the origin, equirectangular: the picture [height, 2·height, 3] in 0..1 and the distance
    along each ray [height, 2·height]."""
    rays = directions(height, 2 * height)
    distance, _, color = cast(rays.new_zeros(3), rays.reshape(-1, 3))
    return color.view(rays.shape).float(), distance.view(rays.shape[:2]).float()


def panorama_geometry() -> dict:
    """The panorama as core's panorama inference gives its MOGE_GEOMETRY: image, depth (the distance), mask."""
    picture, distance = panorama(PANORAMA_HEIGHT)
    return {"image": picture[None], "depth": distance[None], "mask": torch.ones_like(distance, dtype=torch.bool)[None]}


def depth_picture(depth: torch.Tensor) -> torch.Tensor:
    """A depth map [H, W] as a grey disparity picture [1, H, W, 3]: white is 1 m, black 10 m, as WorldStereo Render
    reads one by default."""
    grey = ((1 / depth - 1 / FAR) / (1 / NEAR - 1 / FAR)).clamp(0, 1)
    return grey[None, ..., None].expand(-1, -1, -1, 3).contiguous()


def sample() -> tuple[torch.Tensor, dict, torch.Tensor, PointCloud, Cameras]:
    """Picture [1, H, W, 3], MOGE_GEOMETRY, depth picture [1, H, W, 3], points, and 21 cameras: an orbit of 20 degrees
    to the left."""
    camera = start_camera()
    exact = geometry(camera)
    depth = exact["depth"][0]
    cloud = points_from_depth(exact["image"][0], depth, camera.w2c[0], camera.K[0])
    cameras = move_on(camera, MOVE, depth_of_scene(cloud, camera))
    return exact["image"], exact, depth_picture(depth), cloud, cameras


SAMPLE_GEOMETRIES = {"picture": lambda: geometry(start_camera()), "panorama": panorama_geometry}


def picture_or_sample(
    image: torch.Tensor | None, moge_geometry: dict | None, kind: str = "picture"
) -> tuple[torch.Tensor, dict]:
    """The picture [1, H, W, 3] and its MOGE_GEOMETRY, or the sample's if both are None. kind: one of SAMPLE_GEOMETRIES.
    Raises ValueError for one of the two alone, to which the sample's would not belong."""
    if (image is None) != (moge_geometry is None):
        there, missing = ("moge_geometry", "image") if image is None else ("image", "moge_geometry")
        raise ValueError(
            f"{there} is connected and {missing} is not: connect both, or neither (mute both) for the sample scene."
        )
    if image is not None and moge_geometry is not None:
        return image, moge_geometry
    exact = SAMPLE_GEOMETRIES[kind]()
    return exact["image"], exact
