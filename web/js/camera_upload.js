// An upload button for the camera file of WorldStereo Load Camera: ComfyUI has upload widgets for media only.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

async function upload(file, name) {
  const body = new FormData();
  body.append("image", file, name); // the route's name for any file; it answers with the name it saved
  const response = await api.fetchApi("/upload/image", { method: "POST", body });
  if (response.status !== 200) {
    throw new Error(`Uploading ${file.name} failed: ${response.status} ${response.statusText}`);
  }
  return (await response.json()).name;
}

app.registerExtension({
  name: "WorldStereo.CameraUpload",

  nodeCreated(node) {
    if (node.comfyClass !== "WorldStereoLoadCamera") return;
    const camera = node.widgets.find((widget) => widget.name === "camera");

    const chooser = document.createElement("input");
    chooser.type = "file";
    chooser.accept = ".json,.txt";
    chooser.multiple = true; // COLMAP's images.txt needs its cameras.txt
    chooser.onchange = async () => {
      const files = [...chooser.files];
      chooser.value = ""; // so that choosing the same file again is a change
      // The route renames a file where another of its name is there: images.txt and its cameras.txt stay a pair by a
      // prefix of their own.
      const prefix = new Date().toISOString().replace(/\D/g, ""); // to the millisecond
      try {
        const chosen = [];
        for (const file of files) {
          const name = await upload(file, /\.txt$/i.test(file.name) ? `${prefix}_${file.name}` : file.name);
          if (!/cameras[^/]*\.txt$/i.test(file.name)) chosen.push(name); // cameras.txt is found by the images' name
        }
        for (const name of chosen) { // once all are there
          if (!camera.options.values.includes(name)) camera.options.values.push(name);
          camera.value = name;
          camera.callback?.(name);
          node.setDirtyCanvas(true, true); // the chosen name is drawn anew
        }
      } catch (error) {
        app.extensionManager.toast.add({ severity: "error", summary: "Upload failed", detail: error.message });
      }
    };

    const button = node.addWidget("button", "upload camera file", "upload", () => chooser.click(), { serialize: false });
    button.serialize = false;
  },
});
