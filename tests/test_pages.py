"""What a user finds about every node: a page, a description, search words, tooltips, a place in an example workflow."""

import inspect
import json
import re
from pathlib import Path

import pytest
from comfy_api.latest import io
from worldstereo_fp8.nodes import available

ROOT = Path(__file__).parents[1]
NODES = {node.define_schema().node_id: node for node in available()}
PAGES = {path.stem: path.read_text("utf-8") for path in (ROOT / "web/docs").glob("*.md")}

# Links whose type and name say it all need no tooltip; every widget does, and every other link.
PLAIN = {"scene", "points", "positive", "negative", "samples", "cameras"}

# Nodes in no example workflow, and why.
UNUSED = {
    "WorldStereoKeyframeEncode": "for sampling from frames of one's own, with a denoise below 1",
    "WorldStereoSampleScene": "WorldStereo Picture or Sample has its picture and depth",
    "WorldStereoSamplePanorama": "WorldStereo Picture or Sample has it too",
}


def used():
    """The types of the nodes in the example workflows and in the subgraphs they hold."""
    for path in (ROOT / "example_workflows").glob("*.json"):
        workflow = json.loads(path.read_text("utf-8"))
        graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
        yield from (node["type"] for graph in graphs for node in graph["nodes"])


@pytest.mark.parametrize("name", NODES)
def test_a_node_describes_itself(name):
    schema = NODES[name].define_schema()
    assert schema.display_name and schema.category and schema.search_aliases
    assert len(schema.description) > 40 and schema.description.endswith(".")
    for each in schema.inputs:
        if isinstance(each, io.WidgetInput) or each.id not in PLAIN:
            assert each.tooltip, f"{each.id} has no tooltip"


# Explore Scene shows what the nodes of its paths show, and a cached Continue of the first would hide the last's video.
@pytest.mark.parametrize("name", sorted(set(NODES) - {"WorldStereoExploreScene", "WorldStereoContinue"}))
def test_what_a_node_shows_comes_from_the_cache_too(name):
    """ComfyUI sends the previews and texts of a cached node if the schema asks for it, or of an output node."""
    schema = NODES[name].define_schema()
    shows = "show_on_node(" in inspect.getsource(NODES[name]) or "ui=" in inspect.getsource(NODES[name])
    assert not shows or schema.has_intermediate_output or schema.is_output_node


@pytest.mark.parametrize("name", NODES)
def test_a_node_has_a_page_that_names_each_input(name):
    schema = NODES[name].define_schema()
    assert PAGES[name].startswith(f"# {schema.display_name}\n")
    missing = [each.id for each in schema.inputs if not re.search(rf"\b{each.id}\b", PAGES[name])]
    assert not missing


def test_every_page_is_of_a_node():
    assert set(PAGES) == set(NODES)


def test_every_node_is_in_an_example_workflow():
    assert set(NODES) - set(used()) == set(UNUSED)
