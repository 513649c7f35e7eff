"""The camera nodes in the web page: Camera Path and Fly Path show only the widgets that their preset and lens use, in both
kinds of graph, and Load Camera uploads files."""

import os
import time
from pathlib import Path

import pytest
from worldstereo_fp8.scene.camera_files import read_cameras


def prepare(base):
    """No files are needed."""


@pytest.mark.parametrize("nodes2", [False, True])
def test_a_preset_shows_the_widgets_that_it_uses(comfyui, page, errors, nodes2):
    page.evaluate(
        """async (nodes2) => {
            await window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", nodes2);
            await window.app.extensionManager.command.execute("Comfy.NewBlankWorkflow");
            window.node = window.LiteGraph.createNode("WorldStereoCameraPath");
            window.node.pos = [200, 200];
            window.app.graph.add(window.node);
            window.app.canvas.ds.scale = 1;
            window.app.canvas.ds.offset = [0, 0];
        }""",
        nodes2,
    )

    def shown():
        if nodes2:  # what the page draws
            text = page.locator(".lg-node").inner_text()
        else:
            text = page.evaluate("window.node.getLayoutWidgets().map(widget => widget.name).join('\\n')")
        return {name for name in ("degrees", "distance", "lens_value") if name in text.split("\n")}

    def wait_for(names):
        deadline = time.monotonic() + 60
        while shown() != names:
            assert time.monotonic() < deadline, f"shown are {shown()} instead of {names}"
            page.wait_for_timeout(200)

    def choose(name, value):
        if nodes2:  # as a user does
            row = page.locator(".lg-node-widget", has_text=name).first
            row.get_by_role("combobox").click()
            page.get_by_role("option", name=value, exact=True).click()
        else:
            page.evaluate(
                """([name, value]) => {
                    const widget = window.node.widgets.find(widget => widget.name === name);
                    widget.value = value;
                    widget.callback(value);
                }""",
                [name, value],
            )
        page.wait_for_timeout(200)

    wait_for({"degrees"})
    choose("preset", "truck right")
    wait_for({"distance"})
    choose("lens", "focal length (mm, full frame)")
    wait_for({"distance", "lens_value"})
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"camera_path_{'nodes2' if nodes2 else 'classic'}.png")

    saved = page.evaluate("window.app.graph.serialize()")
    values = saved["nodes"][0]["widgets_values"]
    assert values[:3] == ["truck right", 30, 0.3] and values[6:8] == ["focal length (mm, full frame)", 60]
    page.evaluate(
        "async saved => { await window.app.loadGraphData(saved); window.node = window.app.graph.nodes[0]; }", saved
    )
    page.wait_for_timeout(1000)
    wait_for({"distance", "lens_value"})
    choose("preset", "tilt up")
    choose("lens", "auto")
    wait_for({"degrees"})

    page.evaluate("""async () => {
        const {app, LiteGraph} = window, fly = LiteGraph.createNode("WorldStereoFlyPath");
        app.graph.clear();
        app.graph.add(fly);
        fly.pos = [200, 200];
        // With an id of its own: else the page gives the node's widgets what an earlier node of its number had.
        await app.loadGraphData({...app.graph.serialize(), id: crypto.randomUUID()});
        window.node = app.graph.nodes[0];
        Object.assign(app.canvas.ds, {scale: 1, offset: [0, 0]});
    }""")
    wait_for(set())
    choose("lens", "focal length (mm, full frame)")
    wait_for({"lens_value"})
    choose("lens", "auto")
    wait_for(set())
    assert errors == []


def upload_cameras(page, files, ending):
    """Gives files to the upload button of a WorldStereo Load Camera. Returns the chosen file's name, with this ending."""
    with page.expect_file_chooser() as chooser:
        page.evaluate("""() => {
            window.app.graph.clear();
            window.redrawn = false;
            const node = window.LiteGraph.createNode("WorldStereoLoadCamera");
            window.app.graph.add(node);
            const redraw = node.setDirtyCanvas;
            node.setDirtyCanvas = (...layers) => { window.redrawn = true; redraw.apply(node, layers); };
            node.widgets.find(widget => widget.name === "upload camera file").callback();
        }""")
    chooser.value.set_files(files)
    chosen = page.wait_for_function(
        """ending => window.app.graph.nodes.flatMap(node => node.widgets ?? [])
            .map(widget => String(widget.value)).find(value => value.endsWith(ending))""",
        arg=ending,
    ).json_value()
    page.wait_for_function("window.redrawn")
    return chosen


def test_camera_upload(comfyui, page, errors, tmp_path):
    """The file comes into the input folder and is chosen, whatever the case of its letters."""
    file = tmp_path / "My_Cameras.JSON"
    file.write_text('{"extrinsic": []}', "utf-8")
    assert upload_cameras(page, file, file.name) == file.name
    assert (comfyui.base / "input" / file.name).read_bytes() == file.read_bytes()
    assert errors == []


def test_an_uploaded_colmap_pair_stays_together(comfyui, page, errors, tmp_path):
    """Each time both files get a name of their own, and the images are chosen."""
    for focal, images, lenses in ((40, "images.txt", "cameras.txt"), (80, "IMAGES.TXT", "CAMERAS.TXT")):
        (tmp_path / images).write_text("1 1 0 0 0 0 0 0 1 a.png\n\n")
        (tmp_path / lenses).write_text(f"1 PINHOLE 64 48 {focal} {focal} 32 24\n")
        chosen = upload_cameras(page, [tmp_path / images, tmp_path / lenses], f"_{images}")
        cameras, _ = read_cameras(comfyui.base / "input" / chosen)
        assert cameras.K[0, 0, 0] == focal
    assert errors == []
