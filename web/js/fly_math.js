// Vectors [x, y, z] and unit quaternions [w, x, y, z], plain arrays.

export const add = (a, b) => a.map((v, i) => v + b[i]);
export const subtract = (a, b) => a.map((v, i) => v - b[i]);
export const scale = (a, s) => a.map((v) => v * s);
export const dot = (a, b) => a.reduce((sum, v, i) => sum + v * b[i], 0);
export const norm = (a) => Math.hypot(...a);
export const normalise = (a) => scale(a, 1 / norm(a));
export const cross = ([a, b, c], [x, y, z]) => [b * z - c * y, c * x - a * z, a * y - b * x];

export function multiply([a, b, c, d], [w, x, y, z]) {
  return [
    a * w - b * x - c * y - d * z,
    a * x + b * w + c * z - d * y,
    a * y - b * z + c * w + d * x,
    a * z + b * y - c * x + d * w,
  ];
}

export const inverse = ([w, x, y, z]) => [w, -x, -y, -z];

export function turn(axis, angle) {
  return [Math.cos(angle / 2), ...scale(axis, Math.sin(angle / 2))];
}

export function rotate([w, ...u], v) {
  const t = scale(cross(u, v), 2);
  return add(add(v, scale(t, w)), cross(u, t));
}

// The shortest turn that takes the z axis to a direction that is not its opposite.
export function facing(direction) {
  const [x, y, z] = normalise(direction);
  return normalise([1 + z, -y, x, 0]);
}
