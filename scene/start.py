"""How a scene starts: from one picture with its depth, or from a panorama, from which 27 views are taken."""

import math

import torch
import torch.nn.functional as F

from .camera_path import LENSES, camera_of_moge, focal_length, pinhole
from .cameras import Cameras
from .depth import depth_of_moge, depth_of_picture, in_front, points_from_depth
from .fuse import POINTS_LIMIT, thin_by_voxels
from .panorama import depth_of_view, points_of_panorama, reduced, view_of_panorama
from .pictures import resize_pictures, same_shape
from .pointcloud import PointCloud
from .render import check_size
from .scene import Scene, to_bytes

START = "start"  # the name of the view in a scene from one picture
HEADINGS = 9  # level views of a panorama
TILT = math.degrees(math.atan(0.5))
VIEW_SIZE = (832, 480)  # pixels wide and high
VIEW_FOV = (120.0, 90.0)  # degrees wide and high


def is_panorama(geometry: object) -> bool:
    """Whether this is core's MOGE_GEOMETRY of a panorama, which has no intrinsics."""
    return isinstance(geometry, dict) and "intrinsics" not in geometry


def scene_of_picture(
    image: torch.Tensor,
    depth: dict | torch.Tensor,
    camera: Cameras | None,
    depth_picture: str,
    near: float,
    far: float,
    width: int,
    height: int,
) -> Scene:
    """A scene with one view, "start": a picture [1, H, W, C] in 0..1 resized to width x height.

    depth: core's MOGE_GEOMETRY or a grey picture, as for `render.render_start`. camera: the first one took the picture;
    without it the camera is at the origin, level, with MoGe's lens or else one of 60 degrees. Raises ValueError for
    more than one picture, a depth that cannot be used, and a size that `check_size` refuses.
    """
    check_size(1, height, width)
    if len(image) != 1:
        raise ValueError(f"image holds {len(image)} pictures; a scene starts from one.")
    moge = isinstance(depth, dict)
    if camera is None and moge:
        camera = camera_of_moge(depth, width, height, LENSES[0], 0, 0)
    elif camera is None:
        camera = pinhole(width, height, focal_length(LENSES[0], 0, width))
    else:
        camera = camera[0].scaled_to(width, height)
    depth = depth_of_moge(depth) if moge else depth_of_picture(depth, depth_picture, near, far)
    if not same_shape(*depth.shape, *image.shape[1:3]):
        raise ValueError(
            f"depth is {depth.shape[1]}x{depth.shape[0]} and image {image.shape[2]}x{image.shape[1]}: they have "
            "different shapes. Take the depth of this very picture, uncropped."
        )
    picture = resize_pictures(image, height, width)
    depth = F.interpolate(depth[None, None].float(), (height, width), mode="nearest-exact")[0, 0]
    cloud = points_from_depth(picture[0], depth, camera.w2c[0], camera.K[0])
    return Scene(to_bytes(picture), camera, (START,), (_or_infinite(depth),), _thinned(cloud))


def scene_of_panorama(geometry: dict, width: int, height: int) -> Scene:
    """A scene with the 27 views of WorldStereo's panorama bank, named from "panorama/0000", and the panorama's points.

    geometry: core's MOGE_GEOMETRY of a panorama. Raises ValueError for an ordinary picture's, for one without valid
    depth, and for a size that `check_size` refuses.
    """
    check_size(1, height, width)
    cloud = points_of_panorama(geometry)
    distance = geometry["depth"][0].float().cpu().where(geometry["mask"][0].cpu(), torch.inf)
    cameras = panorama_cameras(width, height)
    views = [cameras[number] for number in range(len(cameras))]
    panorama = reduced(geometry["image"], cameras)  # once: all views have one lens
    pictures = [to_bytes(view_of_panorama(panorama, view))[0] for view in views]
    depths = tuple(_or_infinite(depth_of_view(distance, view)) for view in views)
    names = tuple(panorama_view(number) for number in range(len(views)))
    return Scene(tuple(pictures), cameras, names, depths, _thinned(cloud))


def panorama_cameras(width: int, height: int) -> Cameras:
    """The cameras of the 27 views, in the bank's order: the panorama's middle level, tilted up and tilted down, then
    the other eight headings, every 40 degrees to the right: all level, all up, all down."""
    others = [360 / HEADINGS * number for number in range(1, HEADINGS)]
    turns = [(0.0, pitch) for pitch in (0.0, TILT, -TILT)]
    turns += [(yaw, pitch) for pitch in (0.0, TILT, -TILT) for yaw in others]
    fx, fy = (side / 2 / math.tan(math.radians(fov / 2)) for side, fov in zip((width, height), VIEW_FOV))
    w2c = torch.cat([pinhole(width, height, fx, yaw, pitch).w2c for yaw, pitch in turns])
    K = torch.tensor([[fx, 0, width / 2], [0, fy, height / 2], [0, 0, 1]])
    return Cameras(w2c, K.expand(len(w2c), 3, 3), width, height)


def panorama_view(number: int) -> str:
    """The name of a view of `panorama_cameras`."""
    return f"panorama/{number:04}"


def level_view(heading: int) -> str:
    """The name of the level view at a heading: 0 is the panorama's middle, each next one 40 degrees farther right."""
    return panorama_view(heading + 2 if heading else 0)


def _or_infinite(depth):
    return depth.where(in_front(depth), torch.inf)


def _thinned(cloud):
    keep, _ = thin_by_voxels(cloud.points, POINTS_LIMIT)
    return PointCloud(cloud.points[keep], cloud.colors[keep])
