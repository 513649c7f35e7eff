"""Every example workflow in ComfyUI's real page, opened and run with toy models: half of them in the classic graph, half in
Nodes 2.0."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import av
import comfy.cli_args
import numpy as np
import pytest
import requests
import torch
from comfy_extras.frame_interpolation_models.ifnet import IFNet
from PIL import Image
from safetensors.torch import save_file
from test_geometry_nodes import at_toy_size
from test_workflow import PLACEHOLDERS
from web_page import open_workflow, page_of
from worldstereo_fp8.demo import job, scene, server, toy
from worldstereo_fp8.scene.folder import read_scene

pytestmark = pytest.mark.page
COMFYUI = Path(comfy.cli_args.__file__).parents[1]
EXAMPLES = Path(__file__).parents[1] / "example_workflows"
BLUEPRINT = Path(__file__).parents[1] / "subgraphs" / "Picture to camera move.json"
MODES = {"classic": False, "Nodes 2.0": True}
CAMERA_MODEL = "worldstereo_camera_toy.safetensors"
STAND_INS = job.STAND_INS | {"LoadMoGeModel": "WorldStereoDemoMoGeModel"}
WORKFLOWS = (  # in this order: the third continues what the second saved
    "picture_to_camera_move",
    "explore_picture",
    "continue_scene",
    "fly_a_path",
    "picture_to_camera_move_camera_variant",
    "panorama_to_camera_move",
    "explore_panorama",
    "your_own_render_and_mask",
    "cook_fp8",
)
INTERPOLATED = "picture_to_camera_move_camera_variant"  # is run with frame interpolation x4 switched on
KEYFRAMES = 5
VIEWERS = {"PreviewPointCloud", "PreviewGaussianSplat"}
SMALL = {"width": 256, "height": 160}
FLIGHT = {"keyframes": 6, "views": [{"position": [0.1, 0, 0], "rotation": [1, 0, 0, 0]}]}
WIDGETS = {  # what makes a run short, by node and widget
    "LoadWorldStereoFP8": {"model_name": job.MODEL},
    "VAELoader": {"vae_name": job.VAE},
    "BasicScheduler": {"steps": 2},
    "WorldStereoCameraPath": {"keyframes": KEYFRAMES},
    "WorldStereoFlyPath": {"path": json.dumps(FLIGHT)},
    "WorldStereoPanorama": SMALL,
    "WorldStereoRender": SMALL,
    "WorldStereoStartScene": SMALL,
    "WorldStereoExploreScene": {"keyframes": 5, "stop_after": 2},
    "CookFP8": {"result": "cooked", "overwrite": True},
}
CLIP_LENGTHS = {"fly_a_path": FLIGHT["keyframes"], "your_own_render_and_mask": 21}  # others': KEYFRAMES
CLIP = {"WorldStereoPreviewClip", "PreviewImage", "SaveVideo", "WorldStereoPicture", "WorldStereoCameraPath"}
RESULTS = dict.fromkeys(WORKFLOWS, CLIP) | {
    "fly_a_path": CLIP - {"WorldStereoCameraPath"},
    "panorama_to_camera_move": CLIP - {"WorldStereoPicture"} | {"WorldStereoPictureOrSample"},
    "your_own_render_and_mask": CLIP - {"WorldStereoCameraPath"} | {"WorldStereoLoadCamera"},
    "explore_picture": {"WorldStereoExploreScene", "WorldStereoStartScene"},
    "explore_panorama": {"WorldStereoExploreScene", "WorldStereoStartScene"},
    "continue_scene": {"WorldStereoPreviewClip", "WorldStereoCameraPath", "PreviewImage"},
    "cook_fp8": {"PreviewImage"},
}
EXPLORED = {"explore_picture": ["left", "right"], "explore_panorama": ["rise_0", "right_0"]}  # the paths that are run


def prepare(base):
    job.prepare(base)
    models = base / "models" / "diffusion_models"
    toy.save_model(models / CAMERA_MODEL, toy.CAMERA_CONFIG)
    source = models / "worldstereo-memory-dmd"
    source.mkdir(exist_ok=True)
    save_file(toy.weights(), source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": toy.CONFIG.model_type} | toy.CONFIG_JSON))
    camera = "diffusion_models/WorldStereo-camera-fp8_e4m3fn_scaled.safetensors"
    interpolation = "frame_interpolation/film_net_fp16.safetensors"
    geometry = "geometry_estimation/moge_2_vitl_normal_fp16.safetensors"
    for name in (*PLACEHOLDERS, camera, interpolation, geometry):
        (base / "models" / name).parent.mkdir(exist_ok=True)
        (base / "models" / name).touch()
    save_interpolation(base / "models" / interpolation)
    scene.draw(base / "input", CLIP_LENGTHS["your_own_render_and_mask"])
    shutil.copyfile(COMFYUI / "input" / "example.png", base / "input" / "example.png")


def save_interpolation(path):
    """A frame interpolation model of the smallest kind that core loads: all zero, it blends a frame with the next."""
    network = IFNet(head_ch=1, channels=(2, 2, 2, 2, 2))
    save_file({name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}, path)


@pytest.fixture(scope="module")
def page(comfyui):
    """One page for all tests of this file, with its console errors in `page.errors`."""
    errors = []
    with page_of(comfyui, errors) as opened:
        opened.errors = errors
        opened.evaluate("""() => {
            window.ended = [];
            for (const type of ["execution_success", "execution_error", "execution_interrupted"]) {
                app.api.addEventListener(type, event => window.ended.push([type, event.detail]));
            }
        }""")
        yield opened


def load(name):
    """An example workflow with stand-ins for what cannot be a toy."""
    workflow = json.loads((EXAMPLES / f"{name}.json").read_text("utf-8"))
    for node in workflow["nodes"]:
        if node["type"] in STAND_INS:
            node |= {"type": STAND_INS[node["type"]], "inputs": [], "widgets_values": [], "properties": {}}
        elif name == "explore_panorama" and node["type"] in VIEWERS:
            node["mode"] = 4  # bypassed: without a GPU the browser draws 27 views' points for a minute
    return workflow


def show(page, workflow, mode, values=WIDGETS):
    page.evaluate("on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", MODES[mode])
    page.evaluate(
        """async ([workflow, values]) => {
            await app.extensionManager.command.execute("Comfy.RefreshNodeDefinitions"); // the key R: lists new scenes
            await app.loadGraphData(workflow);
            for (const node of app.graph.nodes) {
                for (const widget of node.widgets ?? []) {
                    const value = values[node.type]?.[widget.name];
                    if (value === undefined) continue;
                    widget.value = value;
                    widget.callback?.(value);
                }
            }
        }""",
        [workflow, values],
    )


def run(page):
    """Presses Run and waits for the end."""
    page.evaluate("window.ended.length = 0")
    page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")
    ended = "window.ended.length || Object.keys(app.lastNodeErrors ?? {}).length"
    page.wait_for_function(ended, timeout=300_000, polling=200)  # asked at every frame, the page would draw each
    refused = page.evaluate("app.lastNodeErrors")
    assert not refused, refused
    ((kind, detail),) = page.evaluate("window.ended")
    assert kind == "execution_success", detail


def crowded(page):
    """The pairs of nodes of the classic graph that overlap or touch once they show what they made: texts make a node
    higher."""
    return page.evaluate("""() => {
        const title = LiteGraph.NODE_TITLE_HEIGHT, gap = 10;
        const boxes = app.graph.nodes.map(({id, type, pos: [x, y], size: [width, height]}) =>
            ({name: `${id} ${type}`, x, top: y - title, right: x + width, bottom: y + height + gap}));
        const meet = (a, b) => a.x < b.right && b.x < a.right && a.top < b.bottom && b.top < a.bottom;
        return boxes.flatMap((a, i) => boxes.slice(0, i).filter(b => meet(a, b)).map(b => `${a.name}, ${b.name}`));
    }""")


def switch(page, kinds):
    """Presses Ctrl-B on the nodes of these types, which bypasses them or switches them on."""
    page.evaluate(
        """kinds => {
            app.canvas.selectItems(app.graph.nodes.filter(node => kinds.includes(node.type)));
            app.extensionManager.command.execute("Comfy.Canvas.ToggleSelectedNodes.Bypass");
            app.canvas.deselectAll();
        }""",
        kinds,
    )


def shown_file(comfyui, page, kind):
    """The file of which the server told the only node of this type."""
    (file,) = page.evaluate("kind => app.nodeOutputs[app.graph.nodes.find(node => node.type === kind).id].images", kind)
    return comfyui.base / file["type"] / file["subfolder"] / file["filename"]


def check_clip(comfyui, page, name):
    """The saved video and the clip that is shown have the path's keyframes, and the interpolated ones between them."""
    path, played = (shown_file(comfyui, page, kind) for kind in ("SaveVideo", "WorldStereoPreviewClip"))
    with av.open(path) as file:
        assert file.streams.video[0].average_rate == 16
    frames = np.stack(scene.read_video(path)).astype(float)
    assert frames[-1].std() > 5  # it shows something
    length = CLIP_LENGTHS.get(name, KEYFRAMES)
    assert played.is_relative_to(comfyui.base / "temp") and len(scene.read_video(played)) == length
    if name != INTERPOLATED:
        assert len(frames) == length
        return
    assert len(frames) == 4 * (length - 1) + 1
    before, between, after = frames[:-4:4], frames[2::4], frames[4::4]
    assert abs(between - (before + after) / 2).mean() < 0.2 * abs(between - before).mean()


def check_scene(comfyui, page, name):
    """The scene that was saved, the paths in it, and the video of each that was explored."""
    folders = sorted((comfyui.base / "output" / "worldstereo").glob("scene_*"))
    found, _ = read_scene(folders[-1])
    if name == "continue_scene":
        before, _ = read_scene(folders[-2])
        assert [path.name for path in found.paths] == [*(path.name for path in before.paths), "path_1"]
        assert found.names[: len(before)] == before.names
        last = before.cameras.w2c[before.paths[-1].views[-1]]
        assert abs(found.paths[-1].cameras.w2c[0] - last).max() < 1e-6  # it starts where the last path ended
        return
    assert [path.name for path in found.paths] == EXPLORED[name]
    start = ("start",) if name == "explore_picture" else tuple(view for view in found.names if "panorama" in view)
    assert len(start) == {"explore_picture": 1, "explore_panorama": 27}[name]
    made = (f"{path}/{frame:04}" for path in EXPLORED[name] for frame in range(1, KEYFRAMES))
    assert found.names == (*start, *made)
    videos = [sorted((comfyui.base / "output" / "video").glob(f"scene_{path}_*")) for path in EXPLORED[name]]
    assert all(len(scene.read_video(video)) == KEYFRAMES for (video,) in videos)
    told = page.evaluate("app.graph.nodes.filter(node => app.nodeOutputs[node.id]).map(node => node.type)")
    assert {"WorldStereoExploreScene"} | (VIEWERS if name == "explore_picture" else set()) <= set(told)


def screenshot(page, name):
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(folder) / f"{name.replace(' ', '_')}.png")


def red(page):
    """The nodes that the page marks: unknown types, missing files and models, and inputs that the server refused."""
    return page.evaluate("""app.graph.nodes
        .filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types))
        .map(node => `${node.id} ${node.type}`)""")


def not_shown(page, mode):
    """The nodes that were sent pictures or a video and do not show them."""
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    look = """nodes2 => app.graph.nodes.filter(node => app.nodeOutputs[node.id]?.images?.length).filter(node => {
        const media = nodes2 ? document.querySelector(`[data-node-id="${node.id}"]`)?.querySelectorAll("img, video")
            : [...(node.imgs ?? []), ...(node.videoContainer?.children ?? [])];
        const pictures = !app.nodeOutputs[node.id].animated?.[0]; // Load Video's video is not said to be animated
        return ![...media ?? []].some(shown => shown.readyState >= 2 || (pictures && shown.naturalWidth > 0));
    }).map(node => `${node.id} ${node.type}`)"""
    for _ in range(120):
        if not (missing := page.evaluate(look, MODES[mode])):
            break
        page.wait_for_timeout(500)
    return missing


def empty_shares(page):
    """What each player of a WorldStereo Preview Clip leaves empty of its box: a wide clip in a high one looked like two
    players, the lower one without a picture."""
    return page.evaluate("""app.graph.nodes.filter(node => node.type === "WorldStereoPreviewClip").map(node => {
        const [player, ...others] = node.videoContainer.children, box = player.getBoundingClientRect();
        return others.length ? 1 : 1 - box.width * player.videoHeight / player.videoWidth / box.height;
    })""")


@pytest.mark.parametrize("name, mode", [*zip(WORKFLOWS, itertools.cycle(MODES))])
def test_a_workflow_opens_runs_and_shows_what_it_made(comfyui, page, name, mode):
    workflow = load(name)
    values = WIDGETS | ({"LoadWorldStereoFP8": {"model_name": CAMERA_MODEL}} if "camera_variant" in name else {})
    page.errors.clear()
    show(page, workflow, mode, values)
    if name == INTERPOLATED:
        switch(page, ["FrameInterpolationModelLoader", "FrameInterpolate"])
    run(page)
    if "SaveVideo" in RESULTS[name]:
        check_clip(comfyui, page, name)
    if "scene" in name or name in EXPLORED:
        check_scene(comfyui, page, name)
    sent = page.evaluate(
        "app.graph.nodes.filter(node => app.nodeOutputs[node.id]?.images?.length).map(node => node.type)"
    )
    assert RESULTS[name] <= set(sent)
    assert not_shown(page, mode) == []
    if mode == "classic":
        assert crowded(page) == []
        assert all(share < 0.4 for share in empty_shares(page))
    assert page.get_by_test_id("error-loading-video").count() == 0
    assert red(page) == []
    screenshot(page, f"{name}_{mode}")
    assert page.errors == []


@pytest.mark.parametrize("mode", MODES)
def test_explore_scene_in_a_subgraph_shows_drawing_preview_and_clip_in_turn(comfyui, page, mode):
    """Told the messages of two paths, without a run."""
    page.errors.clear()
    for name in ("image.png", "render.mp4"):
        shutil.copyfile(comfyui.base / "input" / name, comfyui.base / "temp" / name)
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", MODES[mode])
    page.evaluate("""async () => {
        app.graph.clear();
        const explorer = LiteGraph.createNode("WorldStereoExploreScene");
        app.graph.add(explorer);
        await app.loadGraphData({...app.graph.serialize(), id: crypto.randomUUID()});
        const outer = app.graph.convertToSubgraph(new Set(app.graph.nodes)).node;
        app.canvas.openSubgraph(outer.subgraph, outer);
        app.canvas.deselectAll();
        [window.inner] = outer.subgraph.nodes;
        Object.assign(app.canvas.ds, {scale: 0.6, offset: [150 - inner.pos[0], 150 - inner.pos[1]]});
        const id = `${outer.id}:${inner.id}`, prompt_id = crypto.randomUUID();
        const state = {value: 0, max: 1, state: "running", node_id: id, prompt_id, display_node_id: id};
        const said = (type, detail) => app.api.dispatchCustomEvent(type, detail);
        said("execution_start", {prompt_id, timestamp: Date.now()});
        said("progress_state", {prompt_id, nodes: {[id]: state}});
        window.shows = (filename, animated) => {
            const output = {images: [{filename, subfolder: "", type: "temp"}], ...(animated && {animated: [true]})};
            said("executed", {prompt_id, node: `${id}.0.save`, display_node: id, output});
        };
        window.previews = async () => {
            const blob = await (await app.api.fetchApi("/view?type=input&filename=image.png")).blob();
            said("b_preview_with_metadata",
                {blob, nodeId: `${id}.0.sample`, displayNodeId: id, parentNodeId: id, realNodeId: id, jobId: prompt_id});
        };
        window.shown = () => {
            app.canvas.setDirty(true, true); // the classic graph asks for pictures while it is drawn
            const media = LiteGraph.vueNodesMode
                ? [...document.querySelectorAll(`[data-node-id="${inner.id}"] :is(img, video)`)]
                : [...inner.imgs ?? [], ...inner.videoContainer?.children ?? []];
            return [...new Set(media.map(({tagName, src}) => `${tagName} ${src.split(":")[0]}`))].join();
        };
    }""")
    for _ in range(2):
        for act, wanted in (
            ("shows('image.png', false)", "IMG http"),
            ("previews()", "IMG blob"),
            ("shows('render.mp4', true)", "VIDEO http"),
        ):
            page.evaluate(act)
            page.wait_for_function("wanted => window.shown() === wanted", arg=wanted)
    page.evaluate("app.canvas.setGraph(app.rootGraph)")
    assert page.errors == []


def modes_of(page):
    """The bypassed nodes."""
    return set(page.evaluate("app.graph.nodes.filter(node => node.mode === 4).map(node => Number(node.id))"))


def click_group(page, title):
    """Clicks the title bar of the group whose title begins so."""
    place = page.evaluate(
        """title => {
            const group = app.graph.groups.find(group => group.title.startsWith(title));
            Object.assign(app.canvas.ds, {scale: 0.5, offset: [400 - group.pos[0], 400 - group.pos[1]]});
            app.canvas.setDirty(true, true);
            const {x, y} = app.canvas.canvas.getBoundingClientRect();
            return [x + 0.5 * (400 + 30), y + 0.5 * (400 + 15)];
        }""",
        title,
    )
    page.wait_for_timeout(300)
    page.mouse.click(*place)
    page.wait_for_timeout(200)


@pytest.mark.parametrize("mode", MODES)
def test_groups_are_switched_with_ctrl_b(page, mode):
    """Reconstruction is off until it is wanted; the picture's group goes off for the sample scene, and on again."""
    page.errors.clear()
    workflow = load("picture_to_camera_move")
    kinds = {node["id"]: node["type"] for node in workflow["nodes"]}
    show(page, workflow, mode)
    before = modes_of(page)
    for title, switched in (
        ("8", {"WorldStereoSaveFrames", "WorldStereoSavePointCloud", "WorldStereoSaveCamera"}),
        ("2", {"LoadImage", "WorldStereoDemoMoGeModel", "MoGeInference", "WorldStereoPicture"}),
    ):
        click_group(page, title)
        page.keyboard.press("Control+b")
        assert {kinds[node] for node in before ^ modes_of(page)} == switched
        page.keyboard.press("Control+b")
        assert modes_of(page) == before
    assert page.errors == []


def test_the_page_offers_the_models_that_are_missing(comfyui, page):
    """With the folder where the file belongs and its link, from the loader's `properties.models`."""
    page.errors.clear()
    workflow = load("picture_to_camera_move")
    (model,) = next(n["properties"]["models"] for n in workflow["nodes"] if n["type"] == "LoadWorldStereoFP8")
    placeholder = comfyui.base / "models" / model["directory"] / model["name"]
    placeholder.unlink()
    try:
        show(page, workflow, "classic", {})
    finally:
        placeholder.touch()
    page.get_by_role("button", name="View details").click()
    row = page.get_by_test_id("missing-model-importable-rows")
    assert row.inner_text().split("\n")[:2] == [model["name"], model["directory"]]
    page.evaluate("() => { HTMLAnchorElement.prototype.click = function () { window.followed = this.href; }; }")
    row.get_by_role("button", name="Download").click()
    page.wait_for_function("window.followed")
    page.evaluate("delete HTMLAnchorElement.prototype.click")
    assert page.evaluate("window.followed") == model["url"]
    screenshot(page, "missing_models")
    page.get_by_role("button", name="Toggle properties panel").click()
    assert page.errors == []


def test_the_template_browser_lists_the_workflows_with_pictures(page):
    page.errors.clear()
    size = page.viewport_size
    page.set_viewport_size({"width": 2160, "height": 1500})
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("worldstereo-fp8").first.click()
    for name in WORKFLOWS:  # only those in view have their picture
        dialog.get_by_text(name, exact=True).first.scroll_into_view_if_needed()
        page.wait_for_function(
            """name => [...document.querySelectorAll("[role=dialog] img")]
                .some(image => image.alt === name && image.naturalWidth > 400)""",
            arg=name,
            timeout=60_000,
        )
    screenshot(page, "templates")
    page.set_viewport_size(size)

    # The first of them opens where one begins, large enough to be read.
    dialog.get_by_text(WORKFLOWS[0], exact=True).first.click()
    dialog.wait_for(state="hidden")
    page.wait_for_function("app.graph.nodes.some(node => node.type === 'WorldStereoPictureOrSample')")
    page.wait_for_timeout(500)
    assert page.evaluate("app.canvas.ds.scale") > 0.65  # below 0.57 the classic graph draws no texts
    seen = page.evaluate("""app.graph.nodes.filter(({pos, size}) => {
        const [x, y] = app.canvas.ds.convertOffsetToCanvas(pos), {scale} = app.canvas.ds;
        return x > 0 && y > 0 && x + size[0] * scale < innerWidth && y + size[1] * scale < innerHeight;
    }).map(node => node.title)""")
    assert {"Try it first", "Model files", "Load WorldStereo FP8", "Picture", "WorldStereo Picture"} <= set(seen)
    screenshot(page, "opened")
    assert page.errors == []


@pytest.mark.parametrize("view", ["x", [0, 0, 0, 100], [0, 0, 1e300, 500], [None, 0, 500, 500], [-200, 0, 500, 400]])
def test_a_strangers_opening_view(page, view):
    """Only four numbers of sensible size decide what is seen; either way they are not kept."""
    page.errors.clear()
    left, scale, kept = page.evaluate(
        """async view => {
            app.graph.clear();
            app.graph.add(LiteGraph.createNode("WorldStereoSampleScene"));
            const graph = app.graph.serialize(), {scale, offset} = app.canvas.ds;
            const extra = {...graph.extra, ds: {scale, offset: [1, 2]}, worldstereo_opening_view: view};
            await app.loadGraphData({...graph, id: crypto.randomUUID(), extra});
            const {ds} = app.canvas;
            return [-ds.offset[0] * ds.scale, ds.scale, "worldstereo_opening_view" in app.graph.extra];
        }""",
        view,
    )
    assert 0 < scale <= 1 and math.isfinite(left) and not kept
    assert (view == [-200, 0, 500, 400]) == (left + 70 == pytest.approx(-200 * scale))
    assert page.errors == []


def texts(page):
    """What the nodes say on themselves, by type."""
    return page.evaluate("""Object.fromEntries(app.graph.nodes.map(node => [
        node.type, node.widgets?.find(widget => widget.name === "$$node-text-preview")?.value
    ]).filter(([, text]) => text))""")


@pytest.mark.parametrize("mode", MODES)
def test_what_a_node_says_and_shows_is_there_again_from_the_cache(page, mode):
    """Picture's crop, and Camera Path's warning without a scene: after a run, in nodes made anew, after a second run."""
    page.errors.clear()
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", MODES[mode])
    page.evaluate("""() => {
        app.graph.clear();
        const [load, picture, path] = ["LoadImage", "WorldStereoPicture", "WorldStereoCameraPath"].map((type, i) => {
            const node = LiteGraph.createNode(type);
            app.graph.add(node);
            node.pos = [60 + i * 420, 100];
            node.setSize([380, i ? 700 : 400]);
            return node;
        });
        load.widgets[0].value = "image.png";
        load.connect(0, picture, picture.inputs.findIndex(input => input.name === "image"));
        picture.connect(0, path, path.inputs.findIndex(input => input.name === "image"));
        path.widgets.find(widget => widget.name === "preset").value = "dolly in";
        Object.assign(app.canvas.ds, {scale: 1, offset: [60, 60]});
        return app.loadGraphData({...app.graph.serialize(), id: crypto.randomUUID()});
    }""")
    run(page)
    said = texts(page)
    assert "384×256 to 784×512" in said["WorldStereoPicture"] and "cropped" in said["WorldStereoPicture"]
    assert "no scene is connected" in said["WorldStereoCameraPath"]
    assert not_shown(page, mode) == []
    page.evaluate("() => Object.assign(app.canvas.ds, {scale: 1, offset: [60, 60]})")
    screenshot(page, f"crop_and_warning_{mode}")
    page.evaluate("app.loadGraphData({...app.graph.serialize(), id: crypto.randomUUID()})")
    assert texts(page) == {}
    run(page)
    assert texts(page) == said and not_shown(page, mode) == []
    assert page.errors == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_opens_as_its_file_has_it(comfyui, page, name):
    """Without an error, with every node and file known, and with the API form that `to_api` makes of the file.

    After the runs: the scene that is continued is there.
    """
    page.errors.clear()
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
    page.evaluate("app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")  # there may be new files
    workflow = json.loads((EXAMPLES / f"{name}.json").read_text("utf-8"))
    faulty, prompt = open_workflow(page, workflow)
    if (folder := os.environ.get("SCREENSHOTS")) and EXAMPLES / f"{name}.json" == job.WORKFLOW:
        take_screenshot(page, Path(folder) / f"{name}.png")
    assert page.errors == []
    assert faulty == []
    if not VIEWERS & {node["type"] for node in workflow["nodes"]}:  # the page alone knows a 3-D viewer's camera
        assert prompt == server.to_api(workflow, comfyui.object_info())


def take_screenshot(page, path):
    """The drawn workflow alone."""
    page.set_viewport_size({"width": 2160, "height": 1500})
    page.evaluate("""async () => {
        await window.app.extensionManager.command.execute("Workspace.ToggleFocusMode");
        window.app.canvas.ds.scale = 0.9;
        window.app.canvas.ds.offset = [40, 105]; // the groups begin at (-20, -80)
        window.app.canvas.show_info = false;
        window.app.canvas.setDirty(true, true);
    }""")
    page.wait_for_timeout(3000)
    page.screenshot(path=path, clip={"x": 0, "y": 0, "width": 1926, "height": 1454})


def test_the_blueprint_is_offered_opens_and_runs(comfyui, page):
    """ComfyUI offers it, the page opens it as one node, and it runs."""
    page.errors.clear()
    offered = requests.get(f"http://{comfyui.address}/global_subgraphs", timeout=60).json()
    ours = [entry for entry in offered.values() if entry["name"] == BLUEPRINT.stem]
    assert len(ours) == 1 and "worldstereo" in ours[0]["info"]["node_pack"]

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
            picture.widgets[0].value = "image.png";
            picture.connect(0, subgraph, "image");
            subgraph.connect(3, save, "images");
            window.app.canvas.ds.scale = 1;
            window.app.canvas.ds.offset = [400, 100];
        }"""
    )
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    screenshot(page, "blueprint")
    assert page.errors == [] and faulty == []
    assert widgets[:4] == ["text", "preset", "degrees", "distance"]
    outputs = comfyui.run(at_toy_size(prompt))
    saved = next(output["images"] for number, output in outputs.items() if prompt[number]["class_type"] == "SaveImage")
    assert len(saved) == 21
    last = Image.open(comfyui.base / "output" / saved[-1]["subfolder"] / saved[-1]["filename"])
    assert np.std(np.asarray(last)) > 5
