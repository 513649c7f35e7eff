// Shows only those widgets of WorldStereo Camera Path and Fly Path that the chosen preset and lens use.

import { app } from "../../../scripts/app.js";

const TURNS = /^(orbit|arc|pan|tilt|roll)/; // the rest travels

function show(widget, shown) {
  widget.hidden = !shown; // the classic graph
  widget.options.hidden = !shown; // Nodes 2.0
}

function follow(node) {
  const widgets = Object.fromEntries(node.widgets.map((widget) => [widget.name, widget]));
  const update = () => {
    if (widgets.preset) {
      const turns = TURNS.test(widgets.preset.value);
      show(widgets.degrees, turns);
      show(widgets.distance, !turns);
    }
    show(widgets.lens_value, widgets.lens.value !== "auto");
    node.widgets = [...node.widgets]; // Nodes 2.0 looks at the list
    node.setDirtyCanvas(true, true);
  };
  for (const widget of [widgets.preset, widgets.lens]) {
    if (!widget) continue;
    const { callback } = widget;
    widget.callback = function (...values) {
      const result = callback?.apply(this, values);
      update();
      return result;
    };
  }
  update();
  return update;
}

app.registerExtension({
  name: "WorldStereo.CameraPath",

  nodeCreated(node) {
    if (!["WorldStereoCameraPath", "WorldStereoFlyPath"].includes(node.comfyClass)) return;
    const update = follow(node);
    const { onConfigure } = node;
    node.onConfigure = function (...values) {
      onConfigure?.apply(this, values);
      update(); // a saved workflow's values are in now
    };
  },
});
