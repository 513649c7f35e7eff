"""How the example workflows are laid out, what they write unasked, and which files they let the page download."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "example_workflows"
SCENES = ("explore_picture", "explore_panorama", "continue_scene")  # they save what they are for: a scene
NAMES = tuple(sorted({path.stem for path in EXAMPLES.glob("*.json")} - {*SCENES}))
TITLE = 30  # pixels of a node's title bar, above its position
BYPASSED = 4


def example(name):
    return json.loads((EXAMPLES / f"{name}.json").read_text("utf-8"))


def rectangle(node):
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def meet(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("name", NAMES + SCENES)
def test_nothing_overlaps(name):
    workflow = example(name)
    nodes = {f"{node['id']} {node['type']}": rectangle(node) for node in workflow["nodes"]}
    groups = {}
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        groups[group["title"]] = (x, y, x + width, y + height)
    for boxes in (nodes, groups):
        names = list(boxes)
        overlaps = [(a, b) for i, a in enumerate(names) for b in names[:i] if meet(boxes[a], boxes[b])]
        assert not overlaps
    for title, group in groups.items():
        for label, box in nodes.items():
            inside = group[0] <= box[0] and group[1] <= box[1] and box[2] <= group[2] and box[3] <= group[3]
            assert inside or not meet(box, group), f"{label} juts out of {title}"


@pytest.mark.parametrize("name", NAMES)
def test_only_the_video_is_written_unasked(name):
    active = {node["type"] for node in example(name)["nodes"] if node["mode"] != BYPASSED}
    assert {kind for kind in active if "Save" in kind} <= {"SaveVideo"}


@pytest.mark.parametrize("name", [name for name in NAMES + SCENES if name != "cook_fp8"])
def test_the_page_can_offer_every_file_that_is_published(name):
    """`properties.models` of each loader names the very file that its widget asks for."""
    for node in example(name)["nodes"]:
        if "Load" not in node["type"] or node["type"] in (
            "LoadImage",
            "LoadVideo",
            "WorldStereoLoadCamera",
            "WorldStereoLoadScene",
        ):
            continue
        file = node["widgets_values"][0]
        if file.startswith("WorldStereo-camera"):  # made with Cook FP8
            continue
        (model,) = node["properties"]["models"]
        assert model["name"] == file and "/resolve/main/" in model["url"] and model["url"].endswith("/" + file)
        assert model["directory"]


@pytest.mark.parametrize("name", NAMES + SCENES)
def test_notes_have_no_code_spans(name):
    """Nodes 2.0 shows them unreadably on a note's colour."""
    assert not [
        n["id"] for n in example(name)["nodes"] if n["type"] == "MarkdownNote" and "`" in n["widgets_values"][0]
    ]
