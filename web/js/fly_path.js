// Puts the viewer into WorldStereo Fly Path.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { FlyViewer } from "./fly_viewer.js";

const RECORD = 16; // bytes a point
const HEIGHT = 440; // of the viewer at least, in pixels of the graph

// What viewers remember, by graph and node: the scene and where they look. ComfyUI makes all nodes anew at every undo.
const memories = new Map();
const REMEMBERED = 8;
const viewers = new Set();

function memoryOf(node, viewer) {
  const key = `${(app.rootGraph ?? app.graph).id}/${node.graph?.id}/${node.id}`;
  const memory = memories.get(key) ?? viewer.memory;
  memories.delete(key); // the last used last
  memories.set(key, memory);
  if (memories.size > REMEMBERED) memories.delete(memories.keys().next().value);
  return memory;
}

// The id by which a run names a node: those of the subgraph nodes it is in, and its own.
function executionId(node, graph = app.rootGraph ?? app.graph) {
  if (graph === node.graph) return String(node.id);
  for (const outer of graph.nodes) {
    const inner = outer.subgraph && executionId(node, outer.subgraph);
    if (inner) return `${outer.id}:${inner}`;
  }
  return null;
}

async function fetchScene({ cloud, ...info }) {
  const response = await api.fetchApi(`/view?${new URLSearchParams(cloud)}`);
  if (response.status !== 200) {
    throw new Error("The scene's points are no longer in ComfyUI's temp folder: change an input, or start it again.");
  }
  const points = await response.arrayBuffer();
  if (points.byteLength !== info.count * RECORD) throw new Error("The scene's points came incomplete: run again.");
  return { ...info, name: cloud.filename, points };
}

// One step of the graph's undo.
function asOneChange(act) {
  app.canvas.emitBeforeChange();
  try {
    act();
  } finally {
    app.canvas.emitAfterChange();
  }
}

app.registerExtension({
  name: "WorldStereo.FlyPath",

  nodeCreated(node) {
    if (node.comfyClass !== "WorldStereoFlyPath") return;
    const text = node.widgets.find((widget) => widget.name === "path");
    text.hidden = true; // the viewer shows it: classic
    text.options.hidden = true; // Nodes 2.0
    text.computeLayoutSize = () => ({ minHeight: 0, maxHeight: 0, minWidth: 0 });

    const viewer = new FlyViewer({
      read: () => text.value,
      write(value) {
        if (value === text.value) return;
        asOneChange(() => {
          text.value = value;
          text.callback?.(value);
        });
        node.graph?.setDirtyCanvas(true, true);
      },
      showScene() {
        viewer.say("Running…");
        app.queuePrompt(0, 1, [executionId(node)]).then(
          () => Object.keys(app.lastNodeErrors ?? {}).length && viewer.say(""), // refused: the page says why
          (error) => viewer.say(error.message),
        );
      },
      zoomPage(event) {
        if (window.LiteGraph.vueNodesMode) return; // there the page hears it too
        event.preventDefault();
        app.canvas.processMouseWheel(event);
      },
    });
    viewers.add(viewer);
    node.addDOMWidget("viewer", "worldstereo_fly_path", viewer.root, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
    }).serialize = false;
    node.setSize([Math.max(node.size[0], 560), Math.max(node.size[1], 680)]);

    const { onAdded, onConfigure, onExecuted, onRemoved } = node;
    node.onAdded = function (...args) {
      onAdded?.apply(this, args);
      viewer.remember(memoryOf(node, viewer));
    };
    node.onConfigure = function (...args) {
      onConfigure?.apply(this, args);
      viewer.remember(memoryOf(node, viewer));
    };
    node.onExecuted = async function (output, ...args) {
      onExecuted?.call(this, output, ...args);
      const info = output?.worldstereo_scene?.[0];
      if (!info) return;
      try {
        const known = viewer.memory.scene.name === info.cloud.filename && viewer.memory.scene.points;
        viewer.showScene(known ? { ...info, name: info.cloud.filename, points: known } : await fetchScene(info));
      } catch (error) {
        viewer.say(error.message);
      }
    };
    node.onRemoved = function (...args) {
      onRemoved?.apply(this, args);
      viewers.delete(viewer);
      viewer.dispose();
    };
  },

  setup() {
    // However a run ends, viewers stop saying that it runs; where it fails, the page says why.
    for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(event, () => {
        for (const viewer of viewers) viewer.say("");
      });
    }
  },
});
