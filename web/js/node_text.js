// The texts that the pack's nodes show on themselves. ComfyUI sends them while a node runs; of a node that need not run
// again it sends what its cache has, the text among it, and the page keeps that where it makes the nodes anew (undo).

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

function show(nodeId, output, prompt_id) {
  const text = output?.worldstereo_text?.[0];
  if (text) api.dispatchCustomEvent("progress_text", { nodeId: String(nodeId), text, prompt_id });
}

app.registerExtension({
  name: "WorldStereo.NodeText",

  setup() {
    api.addEventListener("executed", ({ detail }) => show(detail.display_node ?? detail.node, detail.output, detail.prompt_id));
  },

  afterConfigureGraph() {
    for (const node of app.graph.nodes) show(node.id, app.nodeOutputs?.[node.id]);
  },
});
