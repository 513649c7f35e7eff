"""The subgraph blueprint: ComfyUI offers it, the page opens it as one node, and it runs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image
from test_geometry_nodes import at_toy_size, prepare  # noqa: F401  what the fixture `comfyui` calls
from web_page import open_workflow, page_of

BLUEPRINT = Path(__file__).parents[1] / "subgraphs" / "Picture to camera move.json"


@pytest.mark.page
def test_the_blueprint_is_offered_opens_and_runs(comfyui):
    offered = requests.get(f"http://{comfyui.address}/global_subgraphs", timeout=60).json()
    ours = [entry for entry in offered.values() if entry["name"] == BLUEPRINT.stem]
    assert len(ours) == 1 and "worldstereo" in ours[0]["info"]["node_pack"]

    errors = []
    with page_of(comfyui, errors) as page:
        faulty, _ = open_workflow(page, json.loads(BLUEPRINT.read_text("utf-8")))
        widgets = page.evaluate("window.app.graph.nodes[0].widgets.map(widget => widget.name)")
        page.evaluate(
            """() => {
                const [subgraph] = window.app.graph.nodes;
                const picture = window.LiteGraph.createNode("LoadImage");
                const save = window.LiteGraph.createNode("SaveImage");
                picture.pos = [-300, 100];
                save.pos = [600, 100];
                window.app.graph.add(picture);
                window.app.graph.add(save);
                picture.widgets[0].value = "picture.png";
                picture.connect(0, subgraph, "image");
                subgraph.connect(3, save, "images");
                window.app.canvas.ds.scale = 1;
                window.app.canvas.ds.offset = [400, 100];
            }"""
        )
        prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
        if folder := os.environ.get("SCREENSHOTS"):
            page.wait_for_timeout(2000)
            page.screenshot(path=Path(folder) / "blueprint.png")
    assert errors == [] and faulty == []
    assert widgets[:4] == ["text", "preset", "degrees", "distance"]
    outputs = comfyui.run(at_toy_size(prompt))
    saved = next(output["images"] for number, output in outputs.items() if prompt[number]["class_type"] == "SaveImage")
    assert len(saved) == 21
    last = Image.open(comfyui.base / "output" / saved[-1]["subfolder"] / saved[-1]["filename"])
    assert np.std(np.asarray(last)) > 5
