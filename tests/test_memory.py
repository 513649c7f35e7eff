"""What a scene's memory gives to a new path, against what WorldStereo chose on its published panorama scene.

`golden/retrieval.safetensors`: the cameras of the 27 views of the panorama and of 17 paths in order (w2c without its
last row, K without its own), for the path with more than eight views the picture features of the candidates in order
of their numbers, and in its metadata the views that each path was given as references.
"""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation
from worldstereo_fp8.comfy_nodes.scene import WorldStereoScenePath
from worldstereo_fp8.scene import memory, walk
from worldstereo_fp8.scene.cameras import Cameras, rigid_inverse
from worldstereo_fp8.scene.folder import read_scene
from worldstereo_fp8.scene.memory import asked_views, choose_references, frames_to_remember, picture_quality
from worldstereo_fp8.scene.pointcloud import PointCloud
from worldstereo_fp8.scene.render import RADIUS

GOLDEN = Path(__file__).parent / "golden" / "retrieval.safetensors"
WIDTH, HEIGHT = 832, 480
TENSORS = load_file(GOLDEN)
with safe_open(GOLDEN, framework="pt") as file:
    PATHS = json.loads(file.metadata()["paths"])
BEFORE = {"view": {"traj0": "traj2", "traj1": "traj2"}, "target": {"traj1": "traj0"}}  # what a path asks for


def poses(name):
    w2c = TENSORS[f"{name}.w2c"]
    return torch.cat([w2c, w2c.new_tensor([0, 0, 0, 1]).expand(len(w2c), 1, 4)], dim=1)


def intrinsics(name, count):
    K = TENSORS[f"{name}.K"].expand(count, 2, 3)
    return torch.cat([K, K.new_tensor([0, 0, 1]).expand(count, 1, 3)], dim=1)


def bank_before(number):
    """The memory before a path: the panorama's views, then eight of each earlier path; and where each path's begin."""
    w2c, K, firsts = [poses("bank")], [intrinsics("bank", 27)], {}
    for path in PATHS[:number]:
        firsts[path["path"]] = sum(map(len, w2c))
        frames = frames_to_remember(21)
        w2c.append(poses(path["path"])[frames])
        K.append(intrinsics(path["path"], len(frames)))
    return torch.cat(w2c), torch.cat(K), firsts


@pytest.mark.parametrize("number", range(len(PATHS)), ids=[path["path"] for path in PATHS])
def test_the_references_are_those_of_the_original(number):
    expected = PATHS[number]
    w2c, K, firsts = bank_before(number)
    place, move = expected["path"].split("/")
    kind = place.removesuffix(place.lstrip("abcdefghijklmnopqrstuvwxyz")).removesuffix("_")
    ask = None
    if earlier := BEFORE[kind].get(move):
        first = firsts[f"{place}/{earlier}"]
        mirrored = kind == "view" and move == "traj1"
        ask = asked_views(list(range(first, first + 8)), 21, mirrored, sparsely=kind == "view")
    features = quality = None
    if selection := expected.get("selection"):
        features, quality = torch.full((len(w2c), 192), torch.nan), torch.full((len(w2c),), torch.nan)
        features[sorted(set(selection["candidates"]))] = TENSORS[f"{expected['path']}.features"].float()
        quality[selection["candidates"]] = torch.tensor(selection["quality"])
    views, ref_index = choose_references(
        w2c,
        K,
        WIDTH,
        HEIGHT,
        poses(expected["path"]),
        intrinsics(expected["path"], 21),
        features=features,
        quality=quality,
        ask=ask,
    )
    assert (views, ref_index) == (expected["views"], expected["ref_index"])


def test_the_nodes_choose_the_originals_references_as_the_scene_grows(tmp_path, monkeypatch):
    """The panorama's views read from a folder, then path after path through Scene Path. The picture of view n is all of
    the byte n, so that the stand-ins for CLIP and for `picture_quality` know which view they are shown."""
    width, height = WIDTH // 8, HEIGHT // 8

    def picture(view):
        return torch.full((height, width, 3), view, dtype=torch.uint8)

    def cameras_of(name, count):
        K = intrinsics(name, count).clone()
        K[:, :2] /= 8
        return Cameras(poses(name), K, width, height)

    bank = cameras_of("bank", 27)
    listed = {}
    for view, (w2c, K) in enumerate(zip(bank.w2c.tolist(), bank.K.tolist())):
        listed[f"{view:04}"] = {"extrinsic": w2c, "intrinsic": K}
        Image.fromarray(picture(view).numpy()).save(tmp_path / f"{view:04}.png")
    (tmp_path / "cameras.json").write_text(json.dumps(listed))
    scene, kind = read_scene(tmp_path)
    assert kind == "a bank of views" and len(scene) == 27
    scene = scene.with_cloud(PointCloud(torch.tensor([[1.0, 1, 0]]), torch.ones(1, 3)))
    asked = {"view": {"traj0": walk.ASK_SPARSELY, "traj1": walk.ASK_MIRRORED}, "target": {"traj1": walk.ASK_OFTEN}}
    node = type("Node", (WorldStereoScenePath,), {"hidden": SimpleNamespace(unique_id=None)})
    for expected in PATHS:
        place, move = expected["path"].split("/")
        kind = "view" if place.startswith("view") else "target"
        ask, selection = asked[kind].get(move, walk.ASK_NOTHING), expected.get("selection")
        features, quality, embedded = {}, {}, []
        if selection:
            candidates = sorted(set(selection["candidates"]))
            features = dict(zip(candidates, TENSORS[f"{expected['path']}.features"].float()))
            quality = dict(zip(selection["candidates"], selection["quality"]))

        def embed(pictures, features=features, embedded=embedded):
            views = (pictures[:, 0, 0, 0] * 255).round().int().tolist()
            embedded += views
            return SimpleNamespace(image_embeds=torch.stack([features[view] for view in views]))

        monkeypatch.setattr(walk, "picture_quality", lambda shown, quality=quality: quality[int(shown[0, 0, 0])])
        cameras = cameras_of(expected["path"], 21)
        asked_path = f"{place}/{BEFORE[kind][move]}" if ask != walk.ASK_NOTHING else ""
        outputs = node.execute(
            scene, scene.picture(0), cameras, 8, ask, asked_path, RADIUS, SimpleNamespace(encode_image=embed)
        )
        references, pictures = outputs.result[2:]
        shown = (pictures[:, 0, 0, 0] * 255).round().int().tolist()
        assert (shown, list(references.indices)) == (expected["views"], expected["ref_index"]), expected["path"]
        torch.testing.assert_close(references.cameras.w2c, scene.cameras.w2c[expected["views"]])
        assert bool(embedded) == bool(selection)
        frames = frames_to_remember(21)
        scene = scene.with_path(
            expected["path"], cameras, frames, [picture(len(scene) + number) for number in range(len(frames))]
        )
    assert len(scene) == 27 + 8 * len(PATHS) == 163


class Plain:
    """Retrieval written down a second time, view by view and number by number, to compare with."""

    def __init__(self, w2c, K, targets_w2c, targets_K):
        self.views = list(zip(w2c.numpy(), K.numpy()))
        self.targets = list(zip(targets_w2c.numpy(), targets_K.numpy()))

    @staticmethod
    def box(w2c, K):
        corners = []
        for x, y in ((0, 0), (WIDTH, 0), (WIDTH, HEIGHT), (0, HEIGHT)):
            ray = np.array([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], 1.0])
            ray = ray / math.sqrt(sum(ray**2))
            for distance in (0.1, 10):
                corners.append(np.linalg.inv(w2c) @ [*(distance * ray), 1.0])
        return [(min(corner[axis] for corner in corners), max(corner[axis] for corner in corners)) for axis in range(3)]

    def score(self, view, target):
        one, other = self.box(*self.views[view]), self.box(*self.targets[target])
        shared = volume = others = 1.0
        for (low, high), (other_low, other_high) in zip(one, other):
            shared *= max(0.0, min(high, other_high) - max(low, other_low))
            volume *= high - low
            others *= other_high - other_low
        forward, other_forward = (np.linalg.inv(pose)[:3, 2] for pose in (self.views[view][0], self.targets[target][0]))
        angle = math.degrees(math.acos(max(-1.0, min(1.0, float(forward @ other_forward)))))
        return shared / (volume + others - shared + 1e-8) * min(1.0, math.exp(5 * (90 - angle) / 180))

    def best(self, target, among, ask):
        best, view_of_best = -1.0, None
        for view in among:
            score = self.score(view, target) + (1.0 if ask.get(target) == view else 0.0)
            if score > best + 1e-12:
                best, view_of_best = score, view
        return view_of_best

    def spread(self, candidates, features, quality, limit):
        rows = []
        for view in candidates:
            w2c = self.views[view][0]
            quaternion = Rotation.from_matrix(w2c[:3, :3]).as_quat()
            rows.append([*np.linalg.inv(w2c)[:3, 3], *(quaternion if quaternion[3] >= 0 else -quaternion)])

        def standard(table):
            table = np.array(table, float)
            return (table - table.mean(0)) / (np.sqrt(((table - table.mean(0)) ** 2).mean(0)) + 1e-8)

        place = 0.3 * standard(rows)
        if features is not None:
            place = np.concatenate([place, 0.7 * standard([features[view] for view in candidates])], 1)
        q = [0.5] * len(candidates)
        if quality is not None:
            raw = [quality[view] for view in candidates]
            q = [(value - min(raw)) / (max(raw) - min(raw) + 1e-8) for value in raw]

        def far(one, other):
            return math.sqrt(sum((one - other) ** 2))

        gains = [0.1 * q[i] - far(place[i], place.mean(0)) for i in range(len(q))]
        picked = [gains.index(max(gains))]
        while len(picked) < limit:
            gains = [
                -1.0 if i in picked else min(far(place[i], place[j]) for j in picked) * (1 + 0.1 * (q[i] - 0.5))
                for i in range(len(q))
            ]
            picked.append(gains.index(max(gains)))
        return [candidates[i] for i in picked]

    def choose(self, features, quality, ask, limit):
        every = range(len(self.views))
        chosen = [self.best(target, every, ask or {}) for target in range(1, len(self.targets))]
        if len(set(chosen)) > limit:
            picked = self.spread(chosen, features, quality, limit)
            chosen = [self.best(target, picked, {}) for target in range(1, len(self.targets))]
        views = list(dict.fromkeys(chosen))
        return views, [chosen.index(view) for view in views]


def rig(generator, count, spread):
    """Cameras of a walk that turns: their w2c and K."""
    eyes = torch.randn(count, 3, generator=generator, dtype=torch.float64) * spread
    turns = Rotation.from_rotvec((torch.randn(count, 3, generator=generator, dtype=torch.float64) * 0.9).numpy())
    R = torch.from_numpy(turns.as_matrix())
    w2c = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    w2c[:, :3, :3], w2c[:, :3, 3] = R, -(R @ eyes[:, :, None])[:, :, 0]
    focal = 200 + 500 * torch.rand(count, generator=generator, dtype=torch.float64)
    K = torch.zeros(count, 3, 3, dtype=torch.float64)
    K[:, 0, 0], K[:, 1, 1], K[:, 2, 2] = focal, focal * 1.1, 1
    K[:, 0, 2], K[:, 1, 2] = WIDTH / 2 + 7, HEIGHT / 2 - 5
    return w2c, K


@pytest.mark.parametrize("seed", range(12))
def test_any_rig_is_answered_as_by_a_second_plain_implementation(seed):
    generator = torch.Generator().manual_seed(seed)
    w2c, K = rig(generator, [1, 5, 40][seed % 3], spread=[0.5, 4.0][seed % 2])
    again = torch.randint(len(w2c), (6,), generator=generator)  # cameras that are there twice: the first of them wins
    w2c, K = torch.cat([w2c, w2c[again]]), torch.cat([K, K[again]])
    targets, targets_K = rig(generator, 21, spread=[0.5, 4.0][seed % 2])
    targets[3], targets_K[3] = w2c[-1], K[-1]
    features = torch.rand(len(w2c), 12, generator=generator, dtype=torch.float64) if seed % 4 < 2 else None
    quality = torch.rand(len(w2c), generator=generator, dtype=torch.float64) * 3 if seed % 4 in (0, 3) else None
    ask = {0: 0, 1: 2, 2: len(w2c) - 1, 9: 0} if seed % 2 else None
    plain = Plain(w2c, K, targets, targets_K)
    crowded = 0
    for limit in (1, 3, 8, 20):
        expected = plain.choose(features, quality, ask, limit)
        crowded += len(expected[0]) == limit
        found = choose_references(
            w2c, K, WIDTH, HEIGHT, targets, targets_K, features=features, quality=quality, ask=ask, limit=limit
        )
        assert found == expected
        assert len(found[0]) <= limit
    assert crowded or len(w2c) < 8


def test_more_than_eight_are_spread_out_as_in_the_original():
    number = next(i for i, path in enumerate(PATHS) if "selection" in path)
    selection = PATHS[number]["selection"]
    candidates = torch.tensor(selection["candidates"])
    features = TENSORS[f"{PATHS[number]['path']}.features"][torch.searchsorted(candidates.unique(), candidates)]
    picked = memory.spread_out(
        bank_before(number)[0][candidates], features, torch.tensor(selection["quality"], dtype=torch.float64), 8
    )
    assert picked == selection["selected"]


def test_the_limit_holds_and_without_features_the_cameras_decide():
    generator = torch.Generator().manual_seed(0)
    w2c, K = poses("view0/traj0"), intrinsics("view0/traj0", 21)
    moved = w2c.clone()
    moved[:, :3, 3] += 0.01 * torch.randn(21, 3, generator=generator)
    assert len(choose_references(moved, K, WIDTH, HEIGHT, w2c, K, limit=20)[0]) > 8
    for limit in (8, 3, 1):
        views, ref_index = choose_references(moved, K, WIDTH, HEIGHT, w2c, K, limit=limit)
        assert 1 <= len(views) <= limit and len(set(views)) == len(views) == len(ref_index)
        assert ref_index == sorted(ref_index) and ref_index[0] == 0 and max(ref_index) <= 19


def test_a_path_of_one_frame_takes_no_references_and_wrong_inputs_are_named():
    w2c, K = poses("bank"), intrinsics("bank", 27)
    assert choose_references(w2c, K, WIDTH, HEIGHT, w2c[:1], K[:1]) == ([], [])
    with pytest.raises(ValueError, match=r"w2c has the shape \[0, 4, 4\]"):
        choose_references(w2c[:0], K[:0], WIDTH, HEIGHT, w2c, K)
    with pytest.raises(ValueError, match="targets_K"):
        choose_references(w2c, K, WIDTH, HEIGHT, w2c, K[:3])
    with pytest.raises(ValueError, match="features holds 3 entries for 27 views"):
        choose_references(w2c, K, WIDTH, HEIGHT, w2c, K, features=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="target 1 asks for view 27"):
        choose_references(w2c, K, WIDTH, HEIGHT, w2c, K, ask={1: 27})
    with pytest.raises(ValueError, match="limit is 0"):
        choose_references(w2c, K, WIDTH, HEIGHT, w2c, K, limit=0)


def test_views_that_look_away_score_less_and_target_0_asks_for_nothing():
    K = intrinsics("bank", 27)[:1].expand(4, 3, 3)
    c2w = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)  # all at one place, turned by 0, 90, 120 and 180 degrees
    for number, degrees in enumerate((0.0, 90.0, 120.0, 180.0)):
        a = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        c2w[number, 0, 0], c2w[number, 0, 2], c2w[number, 2, 0], c2w[number, 2, 2] = a.cos(), a.sin(), -a.sin(), a.cos()
    w2c = rigid_inverse(c2w)
    low, high = memory._boxes(w2c, K, WIDTH, HEIGHT)
    shared = (torch.minimum(high, high[0]) - torch.maximum(low, low[0])).clamp(min=0).prod(1)
    volume = (high - low).prod(1)
    factors = torch.tensor([1, 1, 5 * (90 - 120) / 180, 5 * (90 - 180) / 180], dtype=torch.float64)
    factors[2:] = factors[2:].exp()
    scores = memory.view_scores(w2c, K, w2c[:1], K[:1], WIDTH, HEIGHT)[0]
    torch.testing.assert_close(scores, shared / (volume + volume[0] - shared) * factors, rtol=1e-6, atol=1e-9)
    targets = w2c[[0, 0, 1]]
    asked = choose_references(w2c, K, WIDTH, HEIGHT, targets, K[:3], ask={0: 3})
    assert asked == choose_references(w2c, K, WIDTH, HEIGHT, targets, K[:3]) == ([0, 1], [0, 1])


def test_a_better_picture_outweighs_a_tenth_of_the_distance():
    """After the middle one the quality decides between two candidates whose distances differ by 10 %."""
    w2c = torch.eye(4, dtype=torch.float64).repeat(5, 1, 1)
    w2c[:, 0, 3] = torch.tensor([0.0, 1.15, -0.95, 0.05, -0.05])
    quality = torch.tensor([2.0, 1.0, 3.0, 2.0, 2.0], dtype=torch.float64)
    assert memory.spread_out(w2c, None, quality, 2) == [3, 2]
    assert memory.spread_out(w2c, None, None, 2)[1] == 1


def test_remembered_frames():
    assert frames_to_remember(21) == [3, 6, 9, 12, 14, 16, 18, 20]
    assert frames_to_remember(5) == [1, 2, 3, 4]
    assert frames_to_remember(5, 1) == [4] and frames_to_remember(2, 1) == [1]
    for frames in range(2, 100):
        remembered = frames_to_remember(frames)
        gaps = [b - a for a, b in zip([0, *remembered], remembered)]
        assert remembered[-1] == frames - 1 and len(remembered) == min(8, frames - 1)
        assert gaps == sorted(gaps, reverse=True) and gaps[-1] >= 1
    with pytest.raises(ValueError, match="needs 2 frames"):
        frames_to_remember(1)
    with pytest.raises(ValueError, match="at least 1 is remembered"):
        frames_to_remember(5, 0)


def test_asked_views():
    views = list(range(27, 35))
    assert asked_views(views, 21) == {1: 30, 2: 30, 3: 30, 5: 30, 7: 32, 9: 32, 13: 32, 17: 34}
    assert set(asked_views(views, 21, mirrored=True).values()) == {30}
    assert sorted(asked_views(views, 21, sparsely=False)) == [i for i in range(1, 21) if i not in (4, 8, 12, 16)]
    assert set(asked_views([7], 21).values()) == {7} and set(asked_views([7, 8, 9], 21).values()) == {9}
    assert set(asked_views([7, 8, 9, 10], 21).values()) == {10}
    assert set(asked_views([7, 8, 9], 21, mirrored=True).values()) == {9}  # none in the first half: the first of them
    with pytest.raises(ValueError, match="no remembered views"):
        asked_views([], 21)


def test_the_quality_of_a_picture():
    flat = torch.full((16, 16, 3), 77, dtype=torch.uint8)
    assert picture_quality(flat) == 0
    checks = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2)[..., None].expand(-1, -1, 3).byte() * 255
    # Laplacian ±1020 everywhere, one bit of entropy, deviation 127.5
    expected = 0.4 * torch.log1p(torch.tensor(1020.0**2)) + 0.3 + 0.3 * 127.5 / 128
    assert picture_quality(checks) == pytest.approx(expected.item(), rel=1e-6)
    picture = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    grey = np.rint(picture @ np.array([0.114, 0.587, 0.299]))
    around = np.pad(grey, 1, mode="reflect")
    laplacian = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:] - 4 * grey
    share = np.unique(grey, return_counts=True)[1] / grey.size
    entropy = -(share * np.log2(share)).sum()
    expected = 0.4 * np.log(1 + laplacian.var()) + 0.3 * entropy + 0.3 * grey.std() / 128
    assert picture_quality(torch.from_numpy(picture)) == pytest.approx(expected, rel=1e-6)


def test_retrieval_from_a_thousand_views_is_quick():
    generator = torch.Generator().manual_seed(0)
    c2w = poses("bank")[torch.randint(27, (1000,), generator=generator)]
    c2w[:, :3, 3] = torch.randn(1000, 3, generator=generator, dtype=torch.float64)
    w2c, K = rigid_inverse(c2w), intrinsics("bank", 27)[:1].expand(1000, 3, 3)
    features, quality = torch.randn(1000, 1024, generator=generator), torch.rand(1000, generator=generator)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        choose_references(w2c, K, WIDTH, HEIGHT, w2c[::48], K[::48], features=features, quality=quality)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.2
