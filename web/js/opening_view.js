// Where an example workflow opens. The page shows a template as a whole, too small to be read; `extra` of the workflow
// says which part to show instead, [x, y, width, height] in the graph's units. A saved copy opens as it was saved.

import { app } from "../../../scripts/app.js";

const KEY = "worldstereo_opening_view";
const FARTHEST = 100_000, SMALLEST = 100; // coordinates and sides that a workflow may ask for, in the graph's units
const COVERED = { left: 70, top: 100, right: 20, bottom: 20 }; // by the page's bars, in pixels

function isView(view) {
  const near = (value) => Number.isFinite(value) && Math.abs(value) <= FARTHEST;
  return Array.isArray(view) && view.length === 4 && view.every(near) && view[2] >= SMALLEST && view[3] >= SMALLEST;
}

app.registerExtension({
  name: "WorldStereo.OpeningView",

  afterConfigureGraph() {
    const view = app.graph.extra?.[KEY];
    if (view === undefined) return;
    delete app.graph.extra[KEY];
    if (!isView(view)) return;
    const [x, y, width, height] = view;
    const { ds, canvas } = app.canvas;
    const { clientWidth, clientHeight } = canvas;
    const across = (clientWidth - COVERED.left - COVERED.right) / width;
    const down = (clientHeight - COVERED.top - COVERED.bottom) / height;
    ds.scale = Math.min(across, down, 1);
    ds.offset = [COVERED.left / ds.scale - x, COVERED.top / ds.scale - y];
    app.canvas.setDirty(true, true);
  },
});
