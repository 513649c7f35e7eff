// The viewer of WorldStereo Fly Path: flying through the scene, and editing the path.
//
// It works in the axes of the camera the path starts from (OpenCV's: x right, y down, z forward), in units of the
// scene's depth, as the path's text does.

import { add, dot, inverse, multiply, norm, normalise, rotate, scale, subtract, turn } from "./fly_math.js";
import {
  EASINGS, MAX_KEYFRAMES, MAX_POSITION, MAX_VIEWS, MIN_KEYFRAMES, PRESETS, START, formatPath, keyframesOf, parsePath,
} from "./fly_curve.js";
import { restored, sharedRenderer } from "./fly_renderer.js";

const EMPTY_SCENE = { name: "", count: 0, radius: 0.008, width: 832, height: 480, up: [0, -1, 0] };
EMPTY_SCENE.lens = [0.866, 1.5, 0.5, 0.5]; // 60 degrees wide
const NEAR = 0.01;
const CLICK = 4; // pixels that the pointer may move in a click
const TOO_NEAR = 0.08; // a view's frustum would fill the picture
const PICK = 14; // pixels between a click and the view it picks
const HASTE = 4; // Shift's
const WHEEL = 0.002; // of the speed, a pixel scrolled
const WHEEL_UNITS = [1, 30, 100]; // pixels, by deltaMode: a pixel, a line, a page
const MOST_SCROLLED = 120; // pixels that one event counts for: a trackpad's flick has hundreds, many times a second
const STEEPEST = 0.995; // cosine between the line of sight and up: beyond, looking around would turn over
const SETTLE = 250; // ms without a change of the path before its holes are counted
const FRAMES_PER_SECOND = 16;
const SPEEDS = { min: -5, max: 1, default: -2 }; // powers of two, in units of the scene's depth a second
const WAYS = { KeyW: [0, 0, 1], KeyS: [0, 0, -1], KeyA: [-1, 0, 0], KeyD: [1, 0, 0], KeyE: null, KeyQ: null }; // up, down
const TURNS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const TURN_SPEED = 0.8; // radians a second
const TAP = 0.05; // seconds
const HINT = "Drag to look around; W A S D, Q E and the wheel move; Enter adds a view";

const STYLE = `
.ws-fly { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: 0; outline: none;
  font: 12px/1.3 sans-serif; color: var(--input-text, #ddd); box-sizing: border-box; user-select: none; }
.ws-fly .ws-row { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; flex: none; }
.ws-fly button, .ws-fly select, .ws-fly input[type=number], .ws-fly textarea {
  font: inherit; color: inherit; background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e);
  border-radius: 4px; padding: 2px 7px; }
.ws-fly button { cursor: pointer; min-height: 22px; }
.ws-fly button:hover:enabled { border-color: #8cf; }
.ws-fly button:disabled { opacity: 0.4; cursor: default; }
.ws-fly button.ws-main { background: #27639e; color: #fff; border-color: #27639e; }
.ws-fly button.ws-chosen { background: #d8872a; color: #fff; border-color: #d8872a; }
.ws-fly input[type=number] { width: 44px; }
.ws-fly input[type=range] { min-width: 40px; margin: 0; accent-color: #d8872a; }
.ws-fly label { display: inline-flex; gap: 4px; align-items: center; }
.ws-fly .ws-stage { position: relative; flex: 1 1 0; min-height: 120px; background: #1c1c1f; border-radius: 4px;
  overflow: hidden; border: 1px solid transparent; display: flex; align-items: center; justify-content: center; }
.ws-fly:focus-within .ws-stage { border-color: #8cf; }
.ws-fly .ws-stage canvas { display: block; cursor: grab; touch-action: none; }
.ws-fly .ws-note { position: absolute; left: 8px; right: 8px; bottom: 6px; text-align: center; pointer-events: none;
  color: #fff; text-shadow: 0 0 3px #000, 0 0 3px #000; }
.ws-fly .ws-error { color: #ff8f8f; }
.ws-fly .ws-strip { height: 22px; width: 100%; display: block; }
.ws-fly .ws-time { display: grid; grid-template-columns: auto 1fr; column-gap: 6px; align-items: center; flex: none; }
.ws-fly .ws-time input { width: 100%; }
.ws-fly .ws-status { flex: none; min-height: 16px; opacity: 0.85; }
.ws-fly textarea { width: 100%; height: 84px; box-sizing: border-box; resize: none; flex: none; font-family: monospace;
  user-select: text; }
.ws-fly [hidden] { display: none !important; }`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// host: { read() and write(text) the path's text; showScene() runs the node; zoomPage(event) gives a wheel event that is
// not the viewer's to the page }.
export class FlyViewer {
  constructor(host) {
    this.host = host;
    this.path = null; // null where the text is bad
    this.memory = { scene: EMPTY_SCENE, camera: START, chosen: 0, focused: false, speed: SPEEDS.default };
    this.pressed = new Set(); // keys that are down
    this.frame = null; // the keyframe that is shown, null while flying
    this.holes = [];
    this.build();
    this.readPath();
  }

  // What outlives the element: ComfyUI makes all nodes anew at every undo.
  remember(memory) {
    this.memory = memory;
    this.speed.value = memory.speed;
    this.fitStage();
    this.readPath();
    if (memory.focused) this.root.focus({ preventScroll: true });
  }

  build() {
    if (!document.getElementById("ws-fly-style")) {
      document.head.append(element("style", { id: "ws-fly-style", textContent: STYLE }));
    }
    const button = (text, title, onclick) => {
      // The focus stays with the viewer, so that keys go on flying.
      return element("button", { type: "button", textContent: text, title, onmousedown: (e) => e.preventDefault(),
        onclick: () => { this.root.focus({ preventScroll: true }); onclick(); } });
    };
    this.showButton = button("Show scene", "Run what the viewer needs: the picture and its depth, never the model",
      () => this.host.showScene());
    this.showButton.classList.add("ws-main");
    this.homeButton = button("Picture's view", "Back to the camera that took the picture", () => this.choose(0));
    this.addButton = button("Add view", "Let the path pass where you are now (Enter)", () => this.addView());
    this.presets = element("select", { title: "Replace the views by a starting point" },
      ...["preset…", ...Object.keys(PRESETS)].map((name) => element("option", { textContent: name })));
    this.presets.onchange = () => this.usePreset();
    this.textButton = button("Text", "The path as text, to copy or paste", () => {
      this.text.hidden = !this.text.hidden;
    });

    this.canvas = element("canvas");
    this.note = element("div", { className: "ws-note" });
    this.stage = element("div", { className: "ws-stage" }, this.canvas, this.note);

    this.chips = element("span", { className: "ws-row" });
    this.moveButton = button("Move here", "Put the chosen view where you are now", () => this.moveView());
    this.earlierButton = button("◀", "Let the chosen view come one earlier", () => this.reorder(-1));
    this.laterButton = button("▶", "Let the chosen view come one later", () => this.reorder(1));
    this.deleteButton = button("Delete", "Remove the chosen view (Delete)", () => this.deleteView());

    this.playButton = button("Play", "Play the path at 16 keyframes a second", () => this.play());
    this.scrubber = element("input", { type: "range", min: 0, step: 1, value: 0, title: "Look along the path" });
    this.scrubber.oninput = () => this.showKeyframe(Number(this.scrubber.value));
    this.strip = element("canvas", { className: "ws-strip" });
    this.strip.title = "The share of holes at each keyframe; red: more than half";
    const time = element("div", { className: "ws-time" }, this.playButton, this.scrubber, element("span"), this.strip);

    this.keyframes = element("input", { type: "number", min: MIN_KEYFRAMES, max: MAX_KEYFRAMES });
    this.keyframes.title = `Pictures along the path, ${MIN_KEYFRAMES} to ${MAX_KEYFRAMES}; the model was trained with 21`;
    this.keyframes.onchange = () => {
      const wanted = Math.round(Number(this.keyframes.value)) || MAX_KEYFRAMES;
      this.change({ keyframes: Math.min(Math.max(wanted, MIN_KEYFRAMES), MAX_KEYFRAMES) });
    };
    this.easing = element("select", { title: "How the speed changes along the path" },
      ...Object.keys(EASINGS).map((name) => element("option", { textContent: name })));
    this.easing.onchange = () => this.change({ easing: this.easing.value });
    this.speed = element("input", { type: "range", min: SPEEDS.min, max: SPEEDS.max, step: 0.25, value: SPEEDS.default });
    this.speed.oninput = () => { this.memory.speed = Number(this.speed.value); };
    this.speed.title = "How fast you fly; Shift is four times as fast";

    this.status = element("div", { className: "ws-status" });
    this.text = element("textarea", { hidden: true, spellcheck: false });
    this.text.onchange = () => this.write(this.text.value);

    const row = (...children) => element("div", { className: "ws-row" }, ...children);
    this.root = element("div", { className: "ws-fly", tabIndex: 0 },
      row(this.showButton, this.homeButton, this.addButton, this.presets, this.textButton),
      this.text,
      this.stage,
      row(this.chips, this.moveButton, this.earlierButton, this.laterButton, this.deleteButton),
      time,
      row(element("label", {}, "keyframes", this.keyframes), element("label", {}, "easing", this.easing),
        element("label", {}, "speed", this.speed)),
      this.status);
    this.root.dataset.captureWheel = "true"; // Nodes 2.0: the wheel is the viewer's while it has the focus
    this.listen();
    this.resizing = new ResizeObserver(() => this.fitStage());
    this.resizing.observe(this.stage);
    this.onRestored = () => {
      this.draw();
      this.countHoles();
    };
    restored.addEventListener("restored", this.onRestored);
  }

  listen() {
    const { root, canvas } = this;
    root.addEventListener("keydown", (event) => this.onKeyDown(event));
    root.addEventListener("keyup", (event) => this.pressed.delete(event.code));
    root.addEventListener("focusin", () => { this.memory.focused = true; });
    root.addEventListener("focusout", () => {
      this.pressed.clear();
      if (root.isConnected) this.memory.focused = false; // not where the node is only made anew
    });
    for (const type of ["pointerdown", "mousedown", "dblclick"]) {
      root.addEventListener(type, (event) => event.button === 1 || event.stopPropagation()); // nor drags the node
    }
    root.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    // Before the page: in Nodes 2.0 it zooms the graph by a pinch (Ctrl) wherever the pointer is.
    this.onFocusedWheel = (event) => {
      if (root.contains(event.target) && root.contains(document.activeElement)) this.onWheel(event);
    };
    window.addEventListener("wheel", this.onFocusedWheel, { capture: true, passive: false });
    canvas.addEventListener("pointerdown", (event) => this.onPointerDown(event));
    canvas.addEventListener("pointermove", (event) => this.onPointerMove(event));
    canvas.addEventListener("pointerup", (event) => this.onPointerUp(event));
    canvas.addEventListener("pointercancel", () => { this.drag = null; });
  }

  dispose() {
    this.resizing.disconnect();
    restored.removeEventListener("restored", this.onRestored);
    window.removeEventListener("wheel", this.onFocusedWheel, { capture: true });
    this.pressed.clear();
    this.stopPlaying();
    clearTimeout(this.settling);
    this.disposed = true;
  }

  // The scene

  showScene(scene) {
    const first = this.memory.scene === EMPTY_SCENE;
    this.memory.scene = scene;
    this.message = "";
    if (first) this.memory.camera = START;
    this.fitStage();
    this.countHoles();
  }

  say(message) {
    this.message = message;
    this.draw();
  }

  // The path

  readPath() {
    const text = this.host.read();
    this.text.value = text;
    try {
      this.path = parsePath(text);
      this.bad = "";
    } catch (error) {
      this.path = null;
      this.bad = error.message;
    }
    this.memory.chosen = Math.min(this.memory.chosen, this.path?.views.length ?? 0);
    this.cameras = this.path ? keyframesOf(this.path) : [];
    this.curve = this.path ? keyframesOf(this.path, 12 * (this.path.views.length + 1)) : [];
    this.frame = this.frame === null || !this.path ? null : Math.min(this.frame, this.cameras.length - 1);
    this.showControls();
    this.countHoles();
  }

  write(text) {
    this.host.write(text);
    this.readPath();
  }

  change(changes) {
    this.write(formatPath({ ...(this.path ?? { keyframes: MAX_KEYFRAMES, easing: "linear", views: [] }), ...changes }));
    this.root.focus({ preventScroll: true });
  }

  here() {
    const { position, rotation } = this.shownCamera();
    return { position: position.map((v) => Math.min(Math.max(v, -MAX_POSITION), MAX_POSITION)), rotation };
  }

  addView() {
    const views = this.path?.views ?? [];
    if (views.length >= MAX_VIEWS) return;
    // After the chosen view; from the picture's view, at the end, where a path is made.
    const place = this.memory.chosen || views.length;
    this.fly(this.here());
    this.memory.chosen = place + 1;
    this.change({ views: views.toSpliced(place, 0, this.memory.camera) });
  }

  moveView() {
    if (!this.memory.chosen) return;
    this.fly(this.here());
    this.change({ views: this.path.views.with(this.memory.chosen - 1, this.memory.camera) });
  }

  deleteView() {
    const { chosen } = this.memory;
    if (!chosen) return;
    this.memory.chosen = Math.min(chosen, this.path.views.length - 1);
    this.change({ views: this.path.views.toSpliced(chosen - 1, 1) });
  }

  reorder(step) {
    const from = this.memory.chosen - 1, to = from + step;
    if (from < 0 || to < 0 || to >= this.path.views.length) return;
    this.memory.chosen = to + 1;
    const view = this.path.views[from];
    this.change({ views: this.path.views.toSpliced(from, 1).toSpliced(to, 0, view) });
  }

  usePreset() {
    const preset = PRESETS[this.presets.value];
    this.presets.selectedIndex = 0;
    if (!preset) return;
    this.memory.chosen = 0;
    this.change({ views: preset(this.memory.scene.up) });
  }

  // Chooses a view, 0 for the picture's, and goes there.
  choose(number) {
    this.memory.chosen = number;
    this.fly(number ? this.path.views[number - 1] : START);
    this.showControls();
  }

  // Where we are

  fly(camera) {
    this.stopPlaying();
    this.frame = null;
    this.memory.camera = camera;
    this.draw();
  }

  shownCamera() {
    return this.frame === null ? this.memory.camera : this.cameras[this.frame];
  }

  showKeyframe(frame) {
    if (!this.cameras.length) return;
    this.frame = frame;
    this.scrubber.value = frame;
    this.draw();
  }

  play() {
    if (this.playing || !this.cameras.length) {
      this.stopPlaying();
      return;
    }
    this.playButton.textContent = "Stop";
    let frame = 0;
    this.showKeyframe(frame);
    this.playing = setInterval(() => {
      if (++frame >= this.cameras.length) this.stopPlaying();
      else this.showKeyframe(frame);
    }, 1000 / FRAMES_PER_SECOND);
  }

  stopPlaying() {
    clearInterval(this.playing);
    this.playing = null;
    this.playButton.textContent = "Play";
  }

  look(yaw, pitch) {
    const { position, rotation } = this.shownCamera();
    const { up } = this.memory.scene;
    let turned = normalise(multiply(turn(up, -yaw), rotation));
    const pitched = normalise(multiply(turned, turn([1, 0, 0], -pitch)));
    if (Math.abs(dot(rotate(pitched, [0, 0, 1]), up)) < STEEPEST) turned = pitched;
    this.fly({ position, rotation: turned });
  }

  // Moves along the camera's axes and, with `lift`, upwards.
  walk(way, lift = 0) {
    const { position, rotation } = this.shownCamera();
    const moved = add(add(position, rotate(rotation, way)), scale(this.memory.scene.up, lift));
    this.fly({ position: moved, rotation });
  }

  unitsPerSecond() {
    return 2 ** this.memory.speed;
  }

  // Input

  onKeyDown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return; // ComfyUI's: undo, run, save
    event.stopPropagation();
    if (/^(TEXTAREA|SELECT)$/.test(event.target.tagName) || event.target.type === "number") return;
    const { code } = event;
    if (code in WAYS || (code in TURNS && event.target.type !== "range")) {
      this.pressed.add(code);
      this.haste = event.shiftKey;
      this.startMoving();
    } else if (code === "Enter" && event.target === this.root) this.addView();
    else if (code === "Delete" || code === "Backspace") this.deleteView();
    else if (code === "Escape") document.activeElement.blur();
    else return;
    event.preventDefault();
  }

  // Moves as long as a key is down, and a little for the shortest press.
  startMoving() {
    if (this.moving) return;
    this.moving = true;
    let before = performance.now();
    const step = (now) => {
      if (!this.pressed.size || this.disposed) {
        this.moving = false;
        return;
      }
      this.moveFor(Math.min(Math.max(now - before, 0) / 1000, 0.1));
      before = now;
      requestAnimationFrame(step);
    };
    this.moveFor(TAP);
    requestAnimationFrame(step);
  }

  moveFor(seconds) {
    const far = seconds * this.unitsPerSecond() * (this.haste ? HASTE : 1);
    let way = [0, 0, 0], lift = 0, yaw = 0, pitch = 0;
    for (const code of this.pressed) {
      if (code in TURNS) [yaw, pitch] = [yaw + TURNS[code][0], pitch + TURNS[code][1]];
      else if (code === "KeyE") lift += 1;
      else if (code === "KeyQ") lift -= 1;
      else way = add(way, WAYS[code]);
    }
    if (yaw || pitch) this.look(yaw * seconds * TURN_SPEED, pitch * seconds * TURN_SPEED);
    this.walk(scale(way, far), lift * far);
  }

  onWheel(event) {
    if (!this.root.contains(document.activeElement)) {
      this.host.zoomPage(event);
      return;
    }
    event.stopPropagation();
    if (event.target === this.text) return;
    event.preventDefault();
    const unit = WHEEL_UNITS[event.deltaMode] * (event.ctrlKey ? 10 : 1); // Ctrl: a pinch, in small steps
    const far = WHEEL * this.unitsPerSecond() * (event.shiftKey ? HASTE : 1);
    const scrolled = (delta) => far * Math.min(Math.max(unit * delta, -MOST_SCROLLED), MOST_SCROLLED);
    this.walk([scrolled(event.deltaX), 0, -scrolled(event.deltaY)]);
  }

  onPointerDown(event) {
    if (event.button !== 0) return;
    this.root.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.drag = { x: event.clientX, y: event.clientY, moved: 0 };
    event.preventDefault();
  }

  onPointerMove(event) {
    if (!this.drag) return;
    const dx = event.clientX - this.drag.x, dy = event.clientY - this.drag.y;
    if (!dx && !dy) return;
    Object.assign(this.drag, { x: event.clientX, y: event.clientY });
    this.drag.moved += Math.abs(dx) + Math.abs(dy);
    if (this.drag.moved < CLICK) return;
    // The scene follows the pointer: one depth unit ahead, a pixel is 1 / (width · lens).
    const shown = this.canvas.getBoundingClientRect();
    const { lens } = this.memory.scene;
    const x = dx / (shown.width * lens[0]), y = dy / (shown.height * lens[1]);
    if (event.shiftKey) this.walk([-x, -y, 0]);
    else this.look(-x, -y);
  }

  onPointerUp(event) {
    if (this.drag && this.drag.moved < CLICK) this.pick(event);
    this.drag = null;
  }

  // Chooses the view that is drawn where a click fell.
  pick(event) {
    if (!this.path || this.frame !== null) return;
    const shown = this.canvas.getBoundingClientRect();
    let nearest = PICK, chosen = null;
    [START, ...this.path.views].forEach((view, number) => {
      const at = this.project(view.position);
      if (!at) return;
      const distance = Math.hypot(
        at[0] * shown.width - (event.clientX - shown.left), at[1] * shown.height - (event.clientY - shown.top));
      if (distance < nearest) [nearest, chosen] = [distance, number];
    });
    if (chosen !== null) this.choose(chosen);
  }

  // Drawing

  showControls() {
    const { chosen } = this.memory;
    const count = this.path?.views.length ?? 0;
    this.chips.replaceChildren(...Array.from({ length: count + 1 }, (_, number) => {
      const chip = element("button", { type: "button", textContent: number || "P" });
      chip.title = number ? `Go to view ${number}` : "The picture's own view, where the path starts";
      chip.classList.toggle("ws-chosen", number === chosen);
      chip.onclick = () => {
        this.choose(number);
        this.root.focus({ preventScroll: true });
      };
      return chip;
    }));
    this.addButton.disabled = count >= MAX_VIEWS;
    for (const control of [this.moveButton, this.deleteButton]) control.disabled = !chosen;
    this.earlierButton.disabled = chosen < 2;
    this.laterButton.disabled = !chosen || chosen === count;
    for (const control of [this.playButton, this.scrubber, this.keyframes, this.easing]) control.disabled = !this.path;
    if (this.path) {
      this.scrubber.max = this.path.keyframes - 1;
      this.keyframes.value = this.path.keyframes;
      this.easing.value = this.path.easing;
    }
    this.draw();
  }

  // The stage's canvas in the render's shape, as large as fits.
  fitStage() {
    const { width, height } = this.memory.scene;
    const room = [this.stage.clientWidth, this.stage.clientHeight];
    const fit = Math.min(room[0] / width, room[1] / height);
    if (!(fit > 0)) return;
    const shown = [Math.round(width * fit), Math.round(height * fit)];
    Object.assign(this.canvas.style, { width: `${shown[0]}px`, height: `${shown[1]}px` });
    const sharp = Math.min(1, fit * window.devicePixelRatio); // never more pixels than the render has
    Object.assign(this.canvas, { width: Math.round(width * sharp), height: Math.round(height * sharp) });
    this.draw();
  }

  draw() {
    if (this.drawing || this.disposed) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      if (!this.disposed) this.drawNow();
    });
  }

  drawNow() {
    const { canvas } = this, { scene } = this.memory;
    const context = canvas.getContext("2d");
    context.fillStyle = "rgb(128, 128, 128)"; // the render's holes
    context.fillRect(0, 0, canvas.width, canvas.height);
    try {
      if (scene.count) {
        const renderer = sharedRenderer();
        renderer.draw(scene, this.shownCamera(), canvas.width, canvas.height);
        context.drawImage(renderer.canvas, 0, 0);
      }
    } catch (error) {
      this.message = error.message;
    }
    if (this.frame === null) this.drawPath(context);
    this.drawStrip();
    this.showStatus();
  }

  // Where a point is in the shown picture, 0..1 on both axes, or null behind the camera.
  project(point) {
    const { position, rotation } = this.shownCamera();
    const [x, y, z] = rotate(inverse(rotation), subtract(point, position));
    const { lens } = this.memory.scene;
    return z > NEAR ? [(lens[0] * x) / z + lens[2], (lens[1] * y) / z + lens[3]] : null;
  }

  drawPath(context) {
    if (!this.path) return;
    const { width, height } = this.canvas;
    const unit = width / Math.max(this.canvas.clientWidth, 1);
    const stroke = (points, color) => {
      context.strokeStyle = color;
      context.lineWidth = 2 * unit;
      context.beginPath();
      let drawing = false;
      for (const point of points) {
        const at = this.project(point);
        if (at) context[drawing ? "lineTo" : "moveTo"](at[0] * width, at[1] * height);
        drawing = at !== null;
      }
      context.stroke();
    };
    stroke(this.curve.map((camera) => camera.position), "rgba(90, 200, 255, 0.9)");
    const { lens } = this.memory.scene;
    [START, ...this.path.views].forEach((view, number) => {
      if (norm(subtract(view.position, this.memory.camera.position)) < TOO_NEAR) return;
      const color = number === this.memory.chosen ? "#ffa63d" : "#ffffff";
      const corners = [[0, 0], [1, 0], [1, 1], [0, 1]].map(([u, v]) =>
        add(view.position, rotate(view.rotation, scale([(u - lens[2]) / lens[0], (v - lens[3]) / lens[1], 1], 0.06))));
      const [a, b, c, d] = corners, o = view.position;
      stroke([o, a, b, o, c, d, o, a, d, c, b], color);
      const at = this.project(o);
      if (!at) return;
      context.font = `bold ${13 * unit}px sans-serif`;
      context.lineWidth = 3 * unit;
      context.strokeStyle = "#000";
      const place = [String(number || "P"), at[0] * width + 5 * unit, at[1] * height - 5 * unit];
      context.strokeText(...place);
      context.fillStyle = color;
      context.fillText(...place);
    });
  }

  drawStrip() {
    const { strip } = this;
    const width = strip.clientWidth, height = strip.clientHeight;
    if (!width) return;
    if (strip.width !== width || strip.height !== height) Object.assign(strip, { width, height });
    const context = strip.getContext("2d");
    context.clearRect(0, 0, width, height);
    const count = this.cameras.length;
    const thumb = 16; // the scrubber's thumb does not leave its track: the bars stand under its middle
    this.cameras.forEach((_, k) => {
      const x = thumb / 2 + ((width - thumb) * k) / (count - 1);
      const bar = Math.max(3, (width - thumb) / count - 2);
      context.fillStyle = k === this.frame ? "#555" : "#333";
      context.fillRect(x - bar / 2, 0, bar, height);
      const share = this.holes[k];
      if (share === undefined) return;
      context.fillStyle = share > 0.5 ? "#e5484d" : "#5aa9e6";
      context.fillRect(x - bar / 2, height * (1 - share), bar, height * share);
    });
  }

  showStatus() {
    const { scene } = this.memory;
    const percent = (share) => `${Math.round(100 * share)} % holes`;
    let status = "";
    if (this.frame !== null) {
      status = `keyframe ${this.frame + 1} of ${this.cameras.length}`;
      if (this.holes[this.frame] !== undefined) status += `, ${percent(this.holes[this.frame])}`;
    } else if (this.holes.length) {
      const most = Math.max(...this.holes);
      status = `most at keyframe ${this.holes.indexOf(most) + 1}: ${percent(most)}`;
      const empty = this.holes.filter((share) => share > 0.5).length;
      if (empty) status += `; more than half in ${empty} of ${this.cameras.length}`;
    }
    if (scene.assumed) status += `${status && "; "}${scene.assumed}`;
    this.status.textContent = this.bad || status;
    this.status.classList.toggle("ws-error", Boolean(this.bad));
    let hint = "";
    if (scene === EMPTY_SCENE) hint = "Press Show scene: it runs the picture and its depth, not the model";
    else if (!scene.count) hint = "No points: connect scene";
    else if (this.frame === null && this.memory.camera === START) hint = HINT;
    this.note.textContent = this.message || hint;
  }

  // Counts the holes of the keyframes, one at a time, when the path has not changed for a moment.
  countHoles() {
    clearTimeout(this.settling);
    this.holes = [];
    const { scene } = this.memory;
    if (!scene.count || !this.cameras.length) return;
    const cameras = this.cameras;
    const next = () => {
      if (this.disposed || cameras !== this.cameras || scene !== this.memory.scene) return;
      const k = this.holes.length;
      if (k === cameras.length) return;
      this.holes.push(k ? sharedRenderer().holes(scene, cameras[k], scene.width / 2, scene.height / 2) : 0);
      this.drawStrip();
      this.showStatus();
      this.settling = setTimeout(next);
    };
    this.settling = setTimeout(next, SETTLE);
  }
}
