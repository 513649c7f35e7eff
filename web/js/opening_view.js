// Where an example workflow opens: the page shows a template as a whole, too small to be read. `extra` says what to show
// instead, [x, y, width, height]; a saved copy has the view it was saved with.

import { app } from "../../../scripts/app.js";

const KEY = "worldstereo_opening_view";
const COVERED = { left: 70, top: 100, right: 20, bottom: 20 }; // by the page's bars, in pixels

app.registerExtension({
  name: "WorldStereo.OpeningView",

  afterConfigureGraph() {
    const view = app.graph.extra?.[KEY];
    if (!view) return;
    delete app.graph.extra[KEY];
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
