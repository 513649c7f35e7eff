"""The viewer of WorldStereo Fly Path in ComfyUI's real web page, in the classic graph and in Nodes 2.0."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worldstereo_fp8.scene.camera_files import read_cameras
from worldstereo_fp8.scene.camera_path import EASINGS, Move, move_on, pinhole
from worldstereo_fp8.scene.cameras import Cameras, quaternion_to_rotation, rigid_inverse
from worldstereo_fp8.scene.depth import points_from_depth
from worldstereo_fp8.scene.fly_path import DEFAULT_PATH, VIEWER_POINTS, fly, fly_on, read_fly_path
from worldstereo_fp8.scene.pictures import resize_pictures
from worldstereo_fp8.scene.render import render
from worldstereo_fp8.worldstereo.conditioning import keyframe_size
from worldstereo_fp8.worldstereo.config import WorldStereoConfig

WEBGL = True
MODES = {"classic": False, "Nodes 2.0": True}
HEIGHT, WIDTH = 240, 416  # fewer rows would make the stand-in's depth rise in steps, which count as edges
PICTURE = np.random.default_rng(0).integers(0, 256, (120, 208, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
SCENE_COLOURS, PATH_COLOURS = 1000, 200  # the viewer shows more with a scene, and fewer with the drawn path alone
PATIENCE = 180_000  # ms; other work may have the machine
POLLING = 100  # ms; asked at every frame, the page would draw each


def prepare(base):
    Image.fromarray(PICTURE).save(base / "input" / "picture.png")


def set_up_flight(page, mode="classic"):
    """A WorldStereo Fly Path over a picture and the demo's depth of it: a floor that runs up into a wall."""
    page.evaluate("on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", MODES[mode])
    page.evaluate("""() => {
        app.graph.clear();
        const types = ["LoadImage", "WorldStereoDemoGeometry", "WorldStereoFlyPath"];
        const [picture, geometry, fly] = types.map((type, i) => {
            const node = LiteGraph.createNode(type);
            app.graph.add(node);
            node.pos = [i * 320, 60];
            return node;
        });
        picture.widgets[0].value = "picture.png";
        picture.connect(0, geometry, 0);
        picture.connect(0, fly, 0);
        geometry.connect(0, fly, fly.inputs.findIndex(input => input.name === "scene"));
        Object.assign(app.canvas.ds, {scale: 1, offset: [80, 60]});
        // Loaded, as a person's workflow is: that gives the graph an id, and undo a state to go back to.
        return app.loadGraphData({...app.graph.serialize(), id: crypto.randomUUID()});
    }""")
    page.locator(".ws-fly").wait_for()
    page.wait_for_timeout(1000)


def button(page, name):
    return page.locator(".ws-fly").get_by_role("button", name=name, exact=True)


PATH = """app.graph.nodes.find(node => node.type === "WorldStereoFlyPath")
    ?.widgets.find(widget => widget.name === "path").value"""


def path_text(page):
    return page.evaluate(PATH)


def wait_for_path(page, text):
    page.wait_for_function(f"text => {PATH} === text", arg=text, timeout=PATIENCE, polling=POLLING)


def wait_for_status(page, pattern):
    page.wait_for_function(
        "pattern => new RegExp(pattern).test(document.querySelector('.ws-status').textContent)",
        arg=pattern,
        timeout=PATIENCE,
        polling=POLLING,
    )


def show_scene(page):
    """Presses Show scene and waits until holes are counted."""
    button(page, "Show scene").click()
    wait_for_status(page, "holes")


def colours(page):
    """How many colours the viewer's picture shows."""
    return page.evaluate("""() => {
        const canvas = document.querySelector(".ws-stage canvas");
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size;
    }""")


def wait_for_colours(page, least):
    """Waits until the viewer's picture shows more colours than this, as it does with a scene."""
    deadline = time.monotonic() + PATIENCE / 1000
    while (shown := colours(page)) <= least:
        assert time.monotonic() < deadline, f"{shown} colours, expected more than {least}"
        page.wait_for_timeout(100)


def of_curve(page, expression, argument=None):
    """Evaluates a JavaScript expression of (curve: the module of the viewer's path, argument)."""
    return page.evaluate(
        f"""async argument => {{
            const modules = await (await fetch("/extensions")).json();
            const curve = await import(modules.find(name => name.endsWith("/fly_curve.js")));
            return ({expression});
        }}""",
        argument,
    )


def keyframes(page, text):
    """Positions [N, 3] and quaternions [N, 4] of a path's keyframes as the viewer has them."""
    cameras = of_curve(page, "curve.keyframesOf(curve.parsePath(argument))", text)
    return (torch.tensor([camera[key] for camera in cameras]).double() for key in ("position", "rotation"))


def random_path(seed, views):
    random = np.random.default_rng(seed)
    content = {
        "keyframes": int(random.integers(6, 22)),
        "easing": list(EASINGS)[seed % len(EASINGS)],
        "views": [
            {"position": random.normal(size=3).tolist(), "rotation": random.normal(size=4).tolist()}
            for _ in range(views)
        ],
    }
    return json.dumps(content)


def test_the_viewer_computes_the_servers_curve(comfyui, page, errors):
    still = '{"views": [{"position": [0, 0, 0], "rotation": [1, 0, 0, 0]}]}'
    for text in (DEFAULT_PATH, still, "{}", *(random_path(seed, views) for seed, views in enumerate((1, 2, 3, 9)))):
        for of_viewer, of_server in zip(keyframes(page, text), fly(read_fly_path(text)), strict=True):
            torch.testing.assert_close(of_viewer, of_server, atol=1e-6, rtol=0)
    written = of_curve(page, "curve.formatPath(curve.parsePath(argument))", DEFAULT_PATH)
    assert json.loads(written) == json.loads(DEFAULT_PATH)

    # The presets end where Camera Path's of the same names do.
    start = pinhole(64, 48, 60.0)
    presets = of_curve(page, "Object.entries(curve.PRESETS).map(([name, make]) => [name, make([0, -1, 0])])")
    for name, views in presets:
        path = read_fly_path(json.dumps({"views": views}))
        move = Move(name, 30.0, 0.3, 21, "linear", "off" if name.startswith(("truck", "pedestal")) else "auto")
        wanted = move_on(start, move, 1.0).w2c[-1]
        torch.testing.assert_close(fly_on(start, path, 1.0).w2c[-1], wanted, atol=1e-5, rtol=0, msg=name)
    assert len(presets) > 8
    assert errors == []


@pytest.mark.parametrize("mode", MODES)
def test_flying(comfyui, page, errors, mode):
    """Three views by mouse and keys give the cameras that the server computes; undo, reload and bad text work."""
    set_up_flight(page, mode)
    assert path_text(page) == DEFAULT_PATH
    page.wait_for_timeout(300)
    assert colours(page) < PATH_COLOURS  # grey, and the drawn path
    show_scene(page)
    wait_for_colours(page, SCENE_COLOURS)

    page.locator(".ws-fly select").first.select_option("dolly in")
    texts = [path_text(page)]
    assert len(json.loads(texts[0])["views"]) == 1
    stage = page.locator(".ws-stage canvas").bounding_box()
    middle = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    for drag, key in ((60, "w"), (-90, "d"), (40, "e")):
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] + drag, middle[1] + 10, steps=3)
        page.mouse.up()
        page.keyboard.down(key)
        page.wait_for_timeout(400)
        page.keyboard.up(key)
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        texts.append(path_text(page))
    views = json.loads(texts[-1])["views"]
    assert len(views) == 4
    positions = np.array([view["position"] for view in views])
    assert np.linalg.norm(np.diff(positions[1:], axis=0), axis=1).min() > 0.01  # the keys moved
    assert len({tuple(view["rotation"]) for view in views}) == 4  # and the mouse turned

    # Keys of the viewer are not ComfyUI's: the node is still there, and no sidebar has opened.
    assert page.evaluate("app.graph.nodes.length") == 3
    assert page.evaluate("app.extensionManager.sidebarTab?.activeSidebarTabId ?? null") is None
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(5000)
        page.screenshot(path=Path(folder) / f"fly_path_{mode}.png")

    # The server's cameras are the viewer's.
    position, rotation = keyframes(page, texts[-1])
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    name, node = next((n, node) for n, node in prompt.items() if node["class_type"] == "WorldStereoFlyPath")
    assert node["inputs"]["path"] == texts[-1]
    prefix = f"fly/{mode[0]}"
    prompt["save"] = {
        "class_type": "WorldStereoSaveCamera",
        "inputs": {"cameras": [name, 0], "filename_prefix": prefix},
    }
    comfyui.run(prompt)
    cameras = read_cameras(comfyui.base / "output" / f"{prefix}_00001_.json")[0]
    relative = cameras.w2c[0].double() @ rigid_inverse(cameras.w2c.double())
    depth = relative[-1, :3, 3].norm() / position[-1].norm()
    torch.testing.assert_close(relative[:, :3, 3], position * depth, atol=1e-4, rtol=0)
    torch.testing.assert_close(relative[:, :3, :3], quaternion_to_rotation(rotation), atol=1e-4, rtol=0)

    # And so are the holes of the last one.
    page.locator(".ws-time input").fill("20")
    wait_for_status(page, "21 of 21, .*holes")
    shown = int(page.locator(".ws-status").inner_text().split(",")[1].split()[0])
    size = keyframe_size(WorldStereoConfig(), HEIGHT, WIDTH)
    image = resize_pictures(torch.from_numpy(PICTURE)[None] / 255, *size)
    depth = 1 / torch.linspace(-0.5, 0.5, size[0])[:, None].expand(size).clamp_min(0.15)
    cameras = cameras.scaled_to(size[1], size[0])
    points = points_from_depth(image[0], depth, cameras.w2c[0], cameras.K[0])
    _, holes = render(points, Cameras(cameras.w2c[-1:], cameras.K[-1:], cameras.width, cameras.height))
    assert shown == pytest.approx(100 * holes.mean().item(), abs=3)
    wait_for_colours(page, SCENE_COLOURS)

    # Undo, twice, and redo.
    page.locator(".ws-fly").focus()
    page.keyboard.press("Control+z")
    wait_for_path(page, texts[-2])
    page.wait_for_timeout(800)
    wait_for_colours(page, SCENE_COLOURS)  # the scene is still there
    page.keyboard.press("Control+z")
    wait_for_path(page, texts[-3])
    page.wait_for_timeout(500)
    page.keyboard.press("Control+y")
    wait_for_path(page, texts[-2])

    # Choose, move, reorder, delete.
    button(page, "1").click()
    page.keyboard.press("s")
    button(page, "Move here").click()
    moved = json.loads(path_text(page))["views"]
    button(page, "▶").click()
    assert json.loads(path_text(page))["views"] == [moved[1], moved[0], *moved[2:]]
    page.keyboard.press("Delete")
    assert json.loads(path_text(page))["views"] == [moved[1], *moved[2:]]
    assert page.evaluate("app.graph.nodes.length") == 3

    # Reload.
    saved, text = page.evaluate("app.graph.serialize()"), path_text(page)
    page.reload()
    page.wait_for_function("window.app?.extensionManager?.workflow?.activeWorkflow", timeout=90_000)
    page.wait_for_load_state("networkidle")
    page.evaluate("workflow => app.loadGraphData(workflow)", saved)
    page.locator(".ws-fly").wait_for()
    assert path_text(page) == text
    assert page.locator(".ws-fly .ws-row .ws-row button").count() == 1 + len(json.loads(text)["views"])
    show_scene(page)
    wait_for_colours(page, SCENE_COLOURS)
    assert errors == []


def test_keys_without_the_focus_are_the_pages(comfyui, page, errors):
    """And the viewer reports bad text."""
    set_up_flight(page)
    page.mouse.click(1400, 860)  # the empty graph
    scale = page.evaluate("app.canvas.ds.scale")
    stage = page.locator(".ws-stage canvas").bounding_box()
    page.mouse.move(stage["x"] + 50, stage["y"] + 50)
    page.mouse.wheel(0, 100)
    page.wait_for_timeout(300)
    assert page.evaluate("app.canvas.ds.scale") != scale  # the wheel zooms the graph
    page.keyboard.press("Enter")
    assert path_text(page) == DEFAULT_PATH

    scale = page.evaluate("app.canvas.ds.scale")
    page.locator(".ws-fly").focus()
    page.mouse.wheel(0, 100)
    page.wait_for_timeout(300)
    assert page.evaluate("app.canvas.ds.scale") == scale

    button(page, "Text").click()
    page.locator(".ws-fly textarea").fill('{"views": 3}')
    page.locator(".ws-fly").focus()
    wait_for_status(page, "views must be a list")
    page.locator(".ws-fly select").first.select_option("pan left")
    wait_for_status(page, "^$")
    assert len(json.loads(path_text(page))["views"]) == 2
    assert errors == []


def strip_has(page, color):
    """Whether the strip of holes has a pixel of this colour."""
    return page.evaluate(
        """color => {
            const strip = document.querySelector(".ws-strip");
            const {data} = strip.getContext("2d").getImageData(0, 0, strip.width, strip.height);
            for (let i = 0; i < data.length; i += 4) if (color.every((c, j) => data[i + j] === c)) return true;
            return false;
        }""",
        color,
    )


def chosen(page):
    return page.locator(".ws-fly .ws-chosen").inner_text()


def test_what_a_flight_shows(comfyui, page, errors):
    """Show scene runs what it needs alone; red holes, playing, picking in the picture, and a lost WebGL context."""
    set_up_flight(page)
    page.evaluate("""() => {
        const [picture] = app.graph.nodes.filter(node => node.type === "LoadImage");
        const [loader, sized, preview] = ["LoadWorldStereoFP8", "WorldStereoPicture", "PreviewImage"].map(type => {
            const node = LiteGraph.createNode(type);
            app.graph.add(node);
            return node;
        });
        picture.connect(0, sized, sized.inputs.findIndex(input => input.name === "image"));
        loader.connect(0, sized, sized.inputs.findIndex(input => input.name === "model"));
        sized.connect(0, preview, 0);
        window.ran = [];
        app.api.addEventListener("executing", event => event.detail && window.ran.push(String(event.detail)));
    }""")
    show_scene(page)
    ran = page.evaluate("window.ran.map(id => app.graph.getNodeById(id).type)")
    # What an earlier flight on this server computed is cached.
    assert {"WorldStereoFlyPath"} <= set(ran) <= {"LoadImage", "WorldStereoDemoGeometry", "WorldStereoFlyPath"}

    # A turn to where nothing is known.
    red = [0xE5, 0x48, 0x4D]
    assert not strip_has(page, red)
    button(page, "Text").click()
    behind = '{"views": [{"position": [0, 0, 0], "rotation": [0, 0.9, 0, 0.1]}]}'
    page.locator(".ws-fly textarea").fill(behind)
    page.locator(".ws-fly").focus()
    wait_for_status(page, "more than half in")
    page.wait_for_function("() => document.querySelector('.ws-status').textContent.includes('100 % holes')")
    assert strip_has(page, red)

    # Play goes through all keyframes and ends.
    button(page, "Play").click()
    button(page, "Stop").wait_for()
    button(page, "Play").wait_for(timeout=PATIENCE)
    assert page.locator(".ws-time input").input_value() == "20"

    # A click on a view in the picture chooses it.
    page.locator(".ws-fly select").first.select_option("dolly in")
    button(page, "P").click()
    assert chosen(page) == "P"
    stage = page.locator(".ws-stage canvas").bounding_box()
    page.mouse.click(stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2)
    assert chosen(page) == "1"

    # The driver takes the context away and gives it back.
    page.evaluate("""async () => {
        const modules = await (await fetch("/extensions")).json();
        const {sharedRenderer} = await import(modules.find(name => name.endsWith("/fly_renderer.js")));
        window.lost = sharedRenderer().gl.getExtension("WEBGL_lose_context");
        window.lost.loseContext();
    }""")
    page.wait_for_timeout(300)
    button(page, "P").click()
    page.wait_for_timeout(300)
    assert colours(page) < PATH_COLOURS  # nothing to draw with
    page.evaluate("window.lost.restoreContext()")
    page.wait_for_timeout(500)
    wait_for_colours(page, SCENE_COLOURS)
    assert errors == []


def test_a_copy_a_subgraph_and_another_start(comfyui, page, errors):
    set_up_flight(page)
    page.locator(".ws-fly select").first.select_option("dolly in")
    text = path_text(page)
    page.evaluate("""() => {
        const fly = app.graph.nodes.find(node => node.type === "WorldStereoFlyPath");
        app.canvas.selectItems([fly]);
        app.canvas.copyToClipboard();
        app.canvas.pasteFromClipboard();
    }""")
    texts = """app.graph.nodes.filter(node => node.type === "WorldStereoFlyPath")
        .map(node => node.widgets.find(widget => widget.name === "path").value)"""
    assert page.evaluate(texts) == [text, text]
    page.evaluate("app.graph.remove(app.graph.nodes.filter(node => node.type === 'WorldStereoFlyPath')[1])")
    page.locator(".ws-fly select").first.select_option("pan left")

    # The viewer sees from where another path ends.
    page.evaluate("""() => {
        const fly = app.graph.nodes.find(node => node.type === "WorldStereoFlyPath");
        const before = LiteGraph.createNode("WorldStereoCameraPath");
        before.pos = [320, 500];
        app.graph.add(before);
        before.widgets.find(widget => widget.name === "preset").value = "pan right";
        const picture = app.graph.nodes.find(node => node.type === "LoadImage");
        picture.connect(0, before, before.inputs.findIndex(input => input.name === "image"));
        before.connect(0, fly, fly.inputs.findIndex(input => input.name === "start"));
    }""")
    show_scene(page)
    button(page, "Picture's view").click()
    page.wait_for_timeout(500)
    right, left = page.evaluate("""() => {  // 30 degrees further to the right nothing is known
        const canvas = document.querySelector(".ws-stage canvas"), {width, height} = canvas;
        return [width * 0.9, width * 0.1].map(x =>
            [...canvas.getContext("2d").getImageData(x, height / 2, 1, 1).data].slice(0, 3));
    }""")
    assert right == [128, 128, 128] != left

    # In a subgraph.
    page.evaluate("""() => {
        const fly = app.graph.nodes.find(node => node.type === "WorldStereoFlyPath");
        app.canvas.selectItems([fly]);
        const {node} = app.graph.convertToSubgraph(new Set([fly]));
        app.canvas.openSubgraph(node.subgraph, node);
        Object.assign(app.canvas.ds, {scale: 1, offset: [80 - node.subgraph.nodes[0].pos[0], 60]});
    }""")
    page.locator(".ws-fly").wait_for()
    page.wait_for_timeout(500)
    button(page, "Show scene").click()
    wait_for_status(page, "holes")
    button(page, "Picture's view").click()
    wait_for_colours(page, SCENE_COLOURS)  # of a part of the picture
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    (flown,) = [node for node in prompt.values() if node["class_type"] == "WorldStereoFlyPath"]
    assert len(json.loads(flown["inputs"]["path"])["views"]) == 2
    assert errors == []


FIND_VIEWER = """async () => {
    const modules = await (await fetch("/extensions")).json();
    const {FlyViewer} = await import(modules.find(name => name.endsWith("/fly_viewer.js")));
    const {draw} = FlyViewer.prototype;
    FlyViewer.prototype.draw = function (...args) { window.viewer = this; return draw.apply(this, args); };
}"""


@pytest.mark.parametrize("mode", MODES)
def test_a_trackpad_flies_and_does_not_zoom(comfyui, page, errors, mode):
    """Small fractions of a pixel, a sideways swipe, a pinch (Ctrl) and a flick: the page and the graph stay."""
    set_up_flight(page, mode)
    page.evaluate(FIND_VIEWER)
    show_scene(page)
    note = page.locator(".ws-note")
    assert "W A S D" in note.inner_text()
    button(page, "Picture's view").click()
    before = page.evaluate("[app.canvas.ds.scale, ...app.canvas.ds.offset, visualViewport.scale, devicePixelRatio]")

    def scroll(count=1, **event):
        """Where `count` such wheel events take the camera, and whether the page was kept from scrolling each time."""
        page.evaluate("viewer.choose(0)")
        return page.evaluate(
            """([count, event]) => {
                const stage = document.querySelector(".ws-stage canvas");
                let kept = true;
                for (let i = 0; i < count; i++) {
                    const wheel = new WheelEvent("wheel", {bubbles: true, cancelable: true, ...event});
                    kept &&= !stage.dispatchEvent(wheel);
                }
                return {kept, position: viewer.memory.camera.position};
            }""",
            [count, event],
        )

    speed = 0.25  # the slider's default, in units of the scene's depth a second
    small = scroll(10, deltaY=-0.375, deltaX=0.125)
    assert small["kept"] and small["position"] == pytest.approx([0.002 * speed * 1.25, 0, 0.002 * speed * 3.75])
    pinch = scroll(10, deltaY=-0.75, ctrlKey=True)
    assert pinch["kept"] and pinch["position"] == pytest.approx([0, 0, 0.002 * speed * 75])
    flick = scroll(60, deltaY=-900.5)  # a second of it
    assert flick["kept"] and flick["position"][2] == pytest.approx(60 * 0.002 * speed * 120)
    page.wait_for_function("document.querySelector('.ws-note').innerText === ''")  # it goes at the next frame
    slider = page.get_by_title("How fast you fly")
    slider.fill("-1")  # twice as fast
    assert scroll(10, deltaY=-1)["position"][2] == pytest.approx(2 * 0.002 * speed * 10)
    slider.fill("-2")
    page.locator(".ws-fly").focus()
    # As Chromium itself sends them.
    page.evaluate("viewer.choose(0)")
    stage = page.locator(".ws-stage canvas").bounding_box()
    page.mouse.move(stage["x"] + 50, stage["y"] + 50)
    page.mouse.wheel(1.5, -2.5)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -1.25)
    page.keyboard.up("Control")
    page.wait_for_timeout(300)
    right, _, forward = page.evaluate("viewer.memory.camera.position")
    assert 0 < right < 0.01 and 0 < forward < 0.1
    after = page.evaluate("[app.canvas.ds.scale, ...app.canvas.ds.offset, visualViewport.scale, devicePixelRatio]")
    assert after == before
    assert errors == []


def test_the_viewer_draws_only_on_change(comfyui, page, errors):
    """And keeps four clouds on the GPU, each sent once."""
    set_up_flight(page)
    page.evaluate(FIND_VIEWER)
    show_scene(page)
    wait_for_colours(page, SCENE_COLOURS)
    button(page, "Picture's view").click()
    page.wait_for_timeout(3000)  # the holes are counted
    measured = page.evaluate("""async () => {
        const modules = await (await fetch("/extensions")).json();
        const {sharedRenderer} = await import(modules.find(name => name.endsWith("/fly_renderer.js")));
        const renderer = sharedRenderer(), {gl} = renderer, {viewer} = window, result = {};
        const count = {drawArrays: 0, bufferData: 0};
        for (const name of Object.keys(count)) {
            gl[name] = function (...args) { count[name]++; return WebGL2RenderingContext.prototype[name].apply(gl, args); };
        }
        await new Promise(done => setTimeout(done, 2000));
        result.idle = {...count};
        for (let i = 0; i < 10; i++) {
            viewer.walk([0, 0, 0.01]);
            await new Promise(requestAnimationFrame);
            await new Promise(requestAnimationFrame);
        }
        result.moving = {...count};
        const {scene} = viewer.memory;
        for (let i = 0; i < 6; i++) renderer.draw({...scene, name: `cloud ${i}`}, viewer.memory.camera, 64, 48);
        result.kept = [...renderer.clouds.keys()];
        for (const name of Object.keys(count)) delete gl[name];
        result.points = scene.count;
        return result;
    }""")
    assert measured["idle"] == {"drawArrays": 0, "bufferData": 0}
    assert measured["moving"] == {"drawArrays": 10, "bufferData": 0}
    assert measured["kept"] == [f"cloud {i}" for i in range(2, 6)]
    assert 0 < measured["points"] <= VIEWER_POINTS
    assert errors == []
