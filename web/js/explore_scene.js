// The live preview of WorldStereo Explore Scene. Its samplers run inside it and their previews appear on the node itself,
// beside the clips of finished paths. While a node has both, the page tries to play the preview as a video, and it keeps
// a preview until the node starts anew. So the clip makes room for the next preview, and the preview for the clip.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const PATIENCE = 20; // tenths of a second in which the page drops a preview

let progress = null; // the run's state

const isExplorer = (id) => app.graph.getNodeById(id)?.comfyClass === "WorldStereoExploreScene";

function show(detail, images) {
  api.dispatchCustomEvent("executed", { ...detail, output: { ...detail.output, images } });
}

// Announces the node as started, whereupon the page drops its preview.
function dropPreview(id) {
  const { prompt_id, nodes } = progress;
  const { [id]: state, ...others } = nodes;
  api.dispatchCustomEvent("progress_state", { prompt_id, nodes: others });
  api.dispatchCustomEvent("progress_state", { prompt_id, nodes: { ...others, [id]: { ...state, state: "running" } } });
}

function afterPreview(id, act, patience = PATIENCE) {
  if (!app.nodePreviewImages[id]) act();
  else if (patience) setTimeout(() => afterPreview(id, act, patience - 1), 100); // else the next path has begun
}

app.registerExtension({
  name: "WorldStereo.ExploreScene",

  setup() {
    api.addEventListener("progress_state", ({ detail }) => {
      progress = detail;
    });
    api.addEventListener("b_preview_with_metadata", ({ detail: { displayNodeId: id } }) => {
      const output = app.nodeOutputs[id];
      if (output?.images?.length && isExplorer(id)) show({ node: id, display_node: id, output }, []);
    });
    api.addEventListener("executed", ({ detail }) => {
      const { display_node: id, output } = detail;
      if (!output?.images?.length || !isExplorer(id) || !app.nodePreviewImages[id] || !progress?.nodes[id]) return;
      show(detail, []);
      dropPreview(id);
      afterPreview(id, () => show(detail, output.images));
    });
  },
});
