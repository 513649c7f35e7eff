"""How a scene starts, what a path through it finds, and what is kept of the result, on the drawn room."""

import pytest
import torch
from test_memory import poses
from worldstereo_fp8.scene import sample, walk
from worldstereo_fp8.scene.camera_path import Move, move_on, pinhole
from worldstereo_fp8.scene.cameras import Cameras, rigid_inverse, thin
from worldstereo_fp8.scene.depth import depths_of_moge
from worldstereo_fp8.scene.explore import LISTS, read_walks
from worldstereo_fp8.scene.memory import choose_references
from worldstereo_fp8.scene.scene import to_bytes
from worldstereo_fp8.scene.start import level_view, panorama_cameras, scene_of_panorama, scene_of_picture

WIDTH, HEIGHT = 208, 120
CAMERA = pinhole(WIDTH, HEIGHT, 160.0)
ORBIT = Move("orbit left", 12.0, 0.0, 9, "linear", "auto")


def taken(cameras):
    """What each camera sees of the room: pictures [N, H, W, 3] and depths [N, H, W]."""
    pictures, depths, _ = zip(*(sample.photograph(cameras[frame]) for frame in range(len(cameras))))
    return torch.stack(pictures), torch.stack(depths)


def moge(depth):
    lens = torch.tensor([[CAMERA.K[0, 0, 0] / WIDTH, 0, 0.5], [0, CAMERA.K[0, 1, 1] / HEIGHT, 0.5], [0, 0, 1]])
    return {"depth": depth, "intrinsics": lens.expand(len(depth), 3, 3), "mask": depth < 100}


@pytest.fixture(scope="module")
def scene():
    picture, depth = taken(CAMERA)
    return scene_of_picture(picture, moge(depth), None, "", 1, 10, WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def path(scene):
    cameras = move_on(scene.cameras, ORBIT, 4.0)
    return cameras, *taken(cameras)


def add(scene, images, cameras, name="", count=3, depths=None):
    return walk.remember_clip(scene, images, cameras, name, count, depths, 100_000, "cpu", lambda frames: None)


def look(scene, image, cameras, limit=8, ask=walk.ASK_NOTHING, ask_path="", embed=None):
    return walk.prepare_path(scene, image, cameras, 21, limit, ask, ask_path, embed, 0.03, "cpu", lambda frames: None)


def test_a_scene_of_one_picture(scene):
    assert scene.names == ("start",) and scene.pictures[0].shape == (HEIGHT, WIDTH, 3)
    torch.testing.assert_close(scene.cameras.K, CAMERA.K)
    torch.testing.assert_close(scene.depths[0], taken(CAMERA)[1][0])
    assert 0.7 * WIDTH * HEIGHT < len(scene.cloud) <= WIDTH * HEIGHT


def test_the_panoramas_cameras_are_those_of_worldstereos_bank():
    """Its world is ours turned: x forward of ours is -z … by one rotation, the same for all 27."""
    ours, theirs = panorama_cameras(832, 480).w2c.double(), poses("bank")
    turn = rigid_inverse(ours[0]) @ theirs[0]
    torch.testing.assert_close(ours @ turn, theirs, atol=1e-5, rtol=0)


def test_a_scene_of_a_panorama_has_the_rooms_views_and_depths():
    picture, distance = sample.panorama(256)
    geometry = {"image": picture[None], "depth": distance[None], "mask": torch.ones_like(distance[None]) > 0}
    scene = scene_of_panorama(geometry, WIDTH, HEIGHT)
    assert len(scene) == 27 and scene.names[0] == level_view(0) and level_view(8) == "panorama/0010"
    pictures, depths = taken(scene.cameras)
    for view in (0, 1, 5, 10, 14, 26):
        error = (scene.depths[view] / depths[view] - 1).abs()
        assert error.median() < 0.02 and (error > 0.1).float().mean() < 0.05
        assert (scene.picture(view)[0] - pictures[view]).abs().mean() < 0.06
    heading = [scene.cameras.w2c[scene.view(level_view(number)), 2, :3] for number in range(9)]
    turns = [torch.rad2deg(torch.atan2(forward[0], forward[2])).item() % 360 for forward in heading]
    assert turns == pytest.approx([40 * number for number in range(9)], abs=1e-3)


def test_a_clip_is_remembered_and_its_points_added(scene, path):
    cameras, pictures, depths = path
    grown, report = add(scene, pictures, cameras, depths=list(1.7 * depths))
    assert grown.names == ("start", "path_1/0003", "path_1/0006", "path_1/0008")
    assert grown.paths[0].views == (1, 2, 3) and len(scene) == 1
    assert [frame.name for frame in report.frames] == [f"path_1/{number:04}" for number in range(1, 9)]
    assert all(frame.scale == pytest.approx(1 / 1.7, rel=0.01) for frame in report.frames)
    assert len(grown.cloud) > 1.03 * len(scene.cloud) and report.after == len(grown.cloud)
    for view, frame in zip((1, 2, 3), (3, 6, 8)):
        assert (grown.depths[view] / depths[frame] - 1).abs().median() < 0.01
        assert torch.equal(grown.pictures[view], to_bytes(pictures[frame : frame + 1])[0])
    more, report = add(grown, pictures, cameras)
    assert more.paths[1].name == "path_2" and report is None and more.cloud is grown.cloud


def test_depth_of_the_remembered_frames_alone(scene, path):
    cameras, pictures, depths = path
    remembered = [3, 6, 8]
    grown, report = add(scene, pictures, cameras, depths=list(1.7 * depths[remembered]))
    assert [frame.name for frame in report.frames] == ["path_1/0003", "path_1/0006", "path_1/0008"]
    assert len(grown.cloud) > 1.03 * len(scene.cloud)
    for view, frame in zip((1, 2, 3), remembered):
        assert (grown.depths[view] / depths[frame] - 1).abs().median() < 0.01
        assert torch.equal(grown.pictures[view], to_bytes(pictures[frame : frame + 1])[0])
    with pytest.raises(ValueError, match="9 images, of which 3 are remembered, but depth for 4"):
        add(scene, pictures, cameras, depths=list(depths[:4]))


def test_frames_of_another_place_are_refused_by_name_and_keep_no_depth(scene, path):
    cameras, pictures, _ = path
    noise = torch.rand(len(cameras), HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 5 + 0.5
    grown, report = add(scene, pictures, cameras, "elsewhere", depths=list(noise))
    assert "elsewhere/0001 refused" in str(report) and len(grown.cloud) == len(scene.cloud)
    assert grown.depths[1:] == (None, None, None)


def test_a_path_finds_the_render_and_the_views(scene, path):
    cameras, pictures, depths = path
    grown, _ = add(scene, pictures, cameras, depths=list(depths))
    path = look(grown, pictures[:1], cameras)
    assert path.video.shape == (9, HEIGHT, WIDTH, 3) and not path.holes[0].any()
    torch.testing.assert_close(path.video[0], pictures[0], atol=1e-4, rtol=0)
    assert (path.video[5] - pictures[5]).abs().mean() < 0.05
    assert path.holes.mean() < look(scene, pictures[:1], cameras).holes.mean()
    # Frame 1 and 2 stand nearest to the start, 3 and 4 to frame 3, and so on.
    assert (path.views, path.ref_index) == ((0, 1, 2, 3), (0, 1, 4, 6))
    torch.testing.assert_close(path.pictures[1], grown.picture(1)[0])
    assert look(grown, pictures[:1], cameras, ask=walk.ASK_OFTEN).views[0] == 3  # with fewer than 4 the last one
    with pytest.raises(ValueError, match="no earlier path"):
        look(scene, pictures[:1], cameras, ask=walk.ASK_MIRRORED)
    with pytest.raises(ValueError, match="no path named 'x'"):
        look(grown, pictures[:1], cameras, ask=walk.ASK_OFTEN, ask_path="x")


@pytest.mark.parametrize("count", [41, 81, 161])
def test_the_references_of_a_long_path_belong_to_the_keyframes(scene, path, count):
    """The model is given `thin`ned cameras: every fourth of 81, others of 41 and 161."""
    cameras, pictures, _ = path
    grown = add(scene, pictures, cameras, "left", 8)[0]
    long = move_on(scene.cameras, Move("orbit left", 12.0, 0.0, count, "linear", "auto"), 4.0)
    keyframes = thin(count, 21).tolist()
    path = walk.prepare_path(
        grown, pictures[:1], long, 21, 8, walk.ASK_NOTHING, "", None, 0.03, "cpu", lambda frames: None
    )
    bank = grown.cameras
    expected = choose_references(bank.w2c, bank.K, WIDTH, HEIGHT, long.w2c[keyframes], long.K[keyframes])
    assert (list(path.views), list(path.ref_index)) == expected and max(path.ref_index) > 10
    assert len(path.video) == count  # the render is thinned by the conditioning
    assert (keyframes == list(range(0, count, 4))) == (count == 81)


def test_only_the_candidates_are_embedded_and_only_where_there_are_too_many(scene, path):
    cameras, pictures, _ = path
    elsewhere = Cameras(cameras.w2c.clone(), cameras.K, WIDTH, HEIGHT)
    elsewhere.w2c[:, 2, 3] += 1000
    grown = add(add(scene, pictures, elsewhere, "far", 8)[0], pictures, cameras, "near", 8)[0]
    seen = []

    def embed(batch):
        seen.append(batch)
        return batch.mean((1, 2))

    assert len(look(grown, pictures[:1], cameras, limit=8, embed=embed).views) == 8 and not seen
    views = look(grown, pictures[:1], cameras, limit=4, embed=embed).views
    assert len(seen) == 1 and len(seen[0]) == 8  # not the eight far away
    assert len(views) <= 4 and all(grown.names[view].startswith(("near", "start")) for view in views)


def test_where_a_path_goes_on(scene, path):
    cameras, pictures, _ = path
    assert walk.start_view(scene, "last") == walk.start_view(scene, "first") == 0
    grown, _ = add(scene, pictures, cameras, "left")
    assert (
        walk.start_view(grown, "last") == walk.start_view(grown, "left/0008") == 3
        and walk.start_view(grown, "first") == 0
    )
    with pytest.raises(ValueError, match="no view named 'left/0001'"):
        walk.start_view(grown, "left/0001")
    with pytest.raises(ValueError, match="9 images and 1 cameras"):
        add(scene, pictures, cameras[0])


def test_depths_of_a_batch():
    depth = torch.ones(2, 3, 4)
    mask = depth > 0
    mask[1, 0, 0] = False
    depths = depths_of_moge({"depth": depth, "mask": mask, "intrinsics": torch.eye(3).expand(2, 3, 3)})
    assert len(depths) == 2 and len(depths[1:]) == 1
    for first, second in (depths, (depths[0], depths[1:][0])):
        assert first.isfinite().all() and second[0, 0] == torch.inf
    with pytest.raises(ValueError, match="no depth"):
        depths_of_moge({"image": depth})
    with pytest.raises(ValueError, match="panorama"):
        depths_of_moge({"depth": depth, "mask": mask})


@pytest.mark.parametrize("name", LISTS)
def test_the_lists_of_the_pack_can_be_read(name):
    walks = read_walks(LISTS[name])
    starts = {"first", "last", *(level_view(heading) for heading in range(9))}
    assert all(walk.view in starts and (walk.degrees > 0) != (walk.distance > 0) for walk in walks)
    assert len(walks) == {"9": 27, "3": 9}.get(name.removeprefix("panorama: ")[0], len(LISTS[name].splitlines()))


def test_a_list_of_ones_own():
    walks = read_walks(
        "# two\nleft-1 from panorama/0003: orbit left 12.5\n\n on : dolly in 0.2 mirrors left-1 # back\n"
    )
    assert [walk.name for walk in walks] == ["left-1", "on"]
    assert (walks[0].view, walks[0].preset, walks[0].degrees, walks[0].distance) == (
        "panorama/0003",
        "orbit left",
        12.5,
        0,
    )
    assert (walks[1].view, walks[1].distance, walks[1].ask, walks[1].asked) == (
        "last",
        0.2,
        walk.ASK_MIRRORED,
        "left-1",
    )
    for text, message in (
        ("", "holds 0 paths"),
        ("a: fly 3", "line 1 is 'a: fly 3'.*pan left"),
        ("a: pan left 3\na: pan left 3", "line 2: a is the name of an earlier line"),
        ("a: pan left 3 asks b", "b is not the name of an earlier line"),
        ("\n".join(f"p{number}: pan left 3" for number in range(101)), "holds 101 paths: give 1 to 100"),
    ):
        with pytest.raises(ValueError, match=message):
            read_walks(text)
