// The live preview of WorldStereo Explore Scene. Its samplers run inside it and their previews appear on the node itself,
// beside the drawings and clips of its paths. While a node has both, the page tries to play the preview as a video, and it
// keeps a preview until the node starts anew. So the clip makes room for the next preview, and the preview for the clip.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const PATIENCE = 20; // tenths of a second in which the page drops a preview
// The classic graph's widgets for a node's pictures and video. It never takes one away for the other by itself.
const PICTURE = "$$canvas-image-preview";
const VIDEO = "video-preview";

let progress = null; // the run's state

// The Explore Scene node with this execution id (`5`, or `2:5` for node 5 in the subgraph of node 2), and the key under
// which the page keeps what the node shows; null for any other node.
function explorer(executionId) {
  const path = String(executionId).split(":");
  const id = path.pop();
  let graph = app.rootGraph ?? app.graph;
  for (const outer of path) graph = graph?.getNodeById(outer)?.subgraph;
  const node = graph?.getNodeById(id);
  if (node?.comfyClass !== "WorldStereoExploreScene") return null;
  return { node, key: path.length ? `${graph.id}:${id}` : id };
}

function dropWidget(node, name) {
  const place = node.widgets.findIndex((widget) => widget.name === name);
  if (place >= 0) node.widgets.splice(place, 1)[0].onRemove?.();
}

function makeRoomFor(node, video) {
  if (video) {
    node.imgs = undefined;
    dropWidget(node, PICTURE);
  } else {
    node.previewMediaType = "image";
    node.videoContainer = undefined;
    dropWidget(node, VIDEO);
  }
}

function show(detail, output) {
  api.dispatchCustomEvent("executed", { ...detail, output: { ...detail.output, ...output } });
}

function showNothing(detail) {
  show(detail, { images: [], animated: [] });
}

// Announces the node as started, whereupon the page drops its preview.
function dropPreview(id) {
  const { prompt_id, nodes } = progress;
  const { [id]: state, ...others } = nodes;
  api.dispatchCustomEvent("progress_state", { prompt_id, nodes: others });
  api.dispatchCustomEvent("progress_state", { prompt_id, nodes: { ...others, [id]: { ...state, state: "running" } } });
}

function afterPreview(key, act, patience = PATIENCE) {
  if (!app.nodePreviewImages[key]) act();
  else if (patience) setTimeout(() => afterPreview(key, act, patience - 1), 100); // else the next path has begun
}

app.registerExtension({
  name: "WorldStereo.ExploreScene",

  setup() {
    api.addEventListener("progress_state", ({ detail }) => {
      progress = detail;
    });
    api.addEventListener("b_preview_with_metadata", ({ detail: { displayNodeId: id } }) => {
      const shown = explorer(id), output = shown && app.nodeOutputs[shown.key];
      if (!output?.images?.length) return;
      makeRoomFor(shown.node, false);
      showNothing({ node: id, display_node: id, output });
    });
    api.addEventListener("executed", ({ detail }) => {
      const { display_node: id, output } = detail;
      const shown = output?.images?.length && explorer(id);
      if (!shown) return;
      const { node, key } = shown, video = Boolean(output.animated?.[0]);
      if (!app.nodePreviewImages[key] || !progress?.nodes[id]) {
        makeRoomFor(node, video);
        return;
      }
      showNothing(detail);
      dropPreview(id);
      afterPreview(key, () => show(detail, output));
    });
  },
});
