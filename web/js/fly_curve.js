// The path of WorldStereo Fly Path: its text, and the curve through its views. The formulas are those of
// scene/fly_path.py, which explains them; the server computes the cameras, this draws the same ones.

import { add, dot, facing, norm, normalise, rotate, scale, subtract, turn } from "./fly_math.js";

export const MIN_KEYFRAMES = 6;
export const MAX_KEYFRAMES = 21;
export const MAX_VIEWS = 64;
export const MAX_POSITION = 1000; // in units of the scene's depth
const SHORTEST_STEP = 1e-3;

export const EASINGS = {
  linear: (t) => t,
  "ease in": (t) => t * t,
  "ease out": (t) => t * (2 - t),
  "ease in and out": (t) => t * t * (3 - 2 * t),
};

export const START = { position: [0, 0, 0], rotation: [1, 0, 0, 0] };

// The path that a text describes: {keyframes, easing, views}. Throws an Error that says what is wrong.
export function parsePath(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch (error) {
    throw new Error(`The path is not JSON: ${error.message}`);
  }
  const { keyframes = MAX_KEYFRAMES, easing = "linear", views = [] } = content ?? {};
  if (!Number.isInteger(keyframes) || keyframes < MIN_KEYFRAMES || keyframes > MAX_KEYFRAMES) {
    throw new Error(`keyframes must be a whole number from ${MIN_KEYFRAMES} to ${MAX_KEYFRAMES}.`);
  }
  if (!Object.hasOwn(EASINGS, easing)) throw new Error(`easing must be one of ${Object.keys(EASINGS).join(", ")}.`);
  if (!Array.isArray(views) || views.length > MAX_VIEWS) throw new Error(`views must be a list of at most ${MAX_VIEWS}.`);
  const numbers = (list, count) => Array.isArray(list) && list.length === count && list.every(Number.isFinite);
  views.forEach((view, i) => {
    if (!numbers(view?.position, 3) || view.position.some((v) => Math.abs(v) > MAX_POSITION)) {
      throw new Error(`View ${i + 1}: position must be three numbers within ±${MAX_POSITION}.`);
    }
    if (!numbers(view.rotation, 4) || norm(view.rotation) < 1e-3) {
      throw new Error(`View ${i + 1}: rotation must be a quaternion [w, x, y, z].`);
    }
  });
  return {
    keyframes,
    easing,
    views: views.map(({ position, rotation }) => ({ position, rotation: normalise(rotation) })),
  };
}

export function formatPath({ keyframes, easing, views }) {
  const rounded = (list) => list.map((v) => Number(v.toFixed(5)) + 0); // + 0: never -0
  return JSON.stringify({
    keyframes,
    easing,
    views: views.map(({ position, rotation }) => ({ position: rounded(position), rotation: rounded(rotation) })),
  });
}

// The keyframes [{position, rotation}] of a path; `count` of them instead of the path's own, for drawing.
export function keyframesOf(path, count = path.keyframes) {
  const views = [START, ...path.views];
  if (views.length === 1) return Array(count).fill(START);
  const p = views.map((view) => view.position);
  const q = [];
  for (const { rotation } of views) {
    q.push(q.length && dot(q.at(-1), rotation) < 0 ? scale(rotation, -1) : rotation);
  }
  const last = views.length - 1;
  const angle = [], h = [], slope = [], at = [0];
  for (let i = 0; i < last; i++) {
    angle.push(2 * Math.acos(Math.min(1, dot(q[i], q[i + 1]))));
    h.push(Math.max(SHORTEST_STEP, Math.sqrt(Math.hypot(norm(subtract(p[i + 1], p[i])), angle[i]))));
    slope.push(scale(subtract(p[i + 1], p[i]), 1 / h[i]));
    at.push(at[i] + h[i]);
  }
  const tangent = p.map((_, i) => {
    if (last === 1) return slope[0];
    if (i === 0 || i === last) return null;
    return scale(add(scale(slope[i - 1], h[i]), scale(slope[i], h[i - 1])), 1 / (h[i - 1] + h[i]));
  });
  tangent[0] ??= scale(subtract(scale(slope[0], 3), tangent[1]), 0.5);
  tangent[last] ??= scale(subtract(scale(slope[last - 1], 3), tangent[last - 1]), 0.5);

  return Array.from({ length: count }, (_, k) => {
    const time = EASINGS[path.easing](k / (count - 1)) * at[last];
    let i = last - 1;
    while (i > 0 && at[i] > time) i--;
    const s = (time - at[i]) / h[i];
    const terms = [
      scale(p[i], (1 + 2 * s) * (1 - s) ** 2),
      scale(tangent[i], s * (1 - s) ** 2 * h[i]),
      scale(p[i + 1], s * s * (3 - 2 * s)),
      scale(tangent[i + 1], s * s * (s - 1) * h[i]),
    ];
    const half = angle[i] / 2;
    const near = half < 1e-6;
    const a = near ? 1 - s : Math.sin((1 - s) * half) / Math.sin(half);
    const b = near ? s : Math.sin(s * half) / Math.sin(half);
    return {
      position: terms.reduce(add),
      rotation: normalise(add(scale(q[i], a), scale(q[i + 1], b))),
    };
  });
}

const CENTRE = [0, 0, 1]; // of the scene, one unit ahead of the start
const TURN = Math.PI / 6;
const WAY = 0.3;
const LOOP = 0.08;

// Views to start from, of the camera moves that Camera Path has under the same names. up: the world's.
export const PRESETS = {
  "orbit left": (up) => around(up, -TURN),
  "orbit right": (up) => around(up, TURN),
  "arc up": () => around([1, 0, 0], -TURN),
  "arc down": () => around([1, 0, 0], TURN),
  "dolly in": () => travel([0, 0, WAY]),
  "dolly out": () => travel([0, 0, -WAY]),
  "truck left": () => travel([-WAY, 0, 0]),
  "truck right": () => travel([WAY, 0, 0]),
  "pedestal up": (up) => travel(scale(up, WAY)),
  "pan left": (up) => onTheSpot(up, TURN),
  "pan right": (up) => onTheSpot(up, -TURN),
  "ellipse loop": () =>
    [1, 2, 3, 4, 5, 6, 7, 8].map((eighth) => {
      const phase = (eighth / 8) * 2 * Math.PI;
      const position = [LOOP * Math.sin(phase), (-4 / 3) * LOOP * (1 - Math.cos(phase)), 0];
      return { position, rotation: facing(subtract(CENTRE, position)) };
    }),
};

function around(axis, angle) {
  return [1 / 3, 2 / 3, 1].map((share) => {
    const rotation = turn(axis, share * angle);
    return { position: subtract(CENTRE, rotate(rotation, CENTRE)), rotation };
  });
}

function onTheSpot(axis, angle) {
  return [0.5, 1].map((share) => ({ position: [0, 0, 0], rotation: turn(axis, share * angle) }));
}

function travel(position) {
  return [{ position, rotation: [1, 0, 0, 0] }];
}
