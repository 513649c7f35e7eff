// Draws point clouds as the render does, one WebGL 2 context for all viewers: a page may have only a few.

import { rotate } from "./fly_math.js";

const NEAR = 0.005, FAR = 2000; // in units of the scene's depth
const RECORD = 16; // bytes a point: x, y, z as float32, then red, green, blue, 255
const KEPT = 4; // clouds on the GPU

const VERTEX = `#version 300 es
  in vec3 position;
  in vec4 color;
  uniform mat3 rotation;
  uniform vec3 eye;
  uniform vec4 lens;
  uniform float diameter;
  out vec4 shade;
  void main() {
    vec3 p = rotation * (position - eye);
    vec2 at = lens.xy * p.xy + lens.zw * p.z;
    gl_Position = vec4(2.0 * at.x - p.z, p.z - 2.0 * at.y,
      (p.z * float(${FAR + NEAR}) - float(${2 * FAR * NEAR})) / float(${FAR - NEAR}), p.z);
    gl_PointSize = diameter;
    shade = color;
  }`;
const FRAGMENT = `#version 300 es
  precision mediump float;
  in vec4 shade;
  out vec4 result;
  void main() {
    vec2 d = 2.0 * gl_PointCoord - 1.0;
    if (dot(d, d) > 1.0) discard;
    result = shade;
  }`;

export const restored = new EventTarget(); // signals that a lost context is back

export class Renderer {
  constructor() {
    this.canvas = document.createElement("canvas");
    this.clouds = new Map(); // by name, the last used last
    this.gl = this.canvas.getContext("webgl2", { antialias: false, alpha: true, premultipliedAlpha: false });
    if (!this.gl) throw new Error("This browser has no WebGL 2, so the scene cannot be shown.");
    // After the loss of the context (the driver's reset, a laptop's sleep) everything is made and sent again.
    this.canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    this.canvas.addEventListener("webglcontextrestored", () => {
      this.clouds.clear();
      this.prepare();
      restored.dispatchEvent(new Event("restored"));
    });
    this.prepare();
  }

  prepare() {
    const { gl } = this;
    this.program = gl.createProgram();
    for (const [type, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(this.program, shader);
    }
    gl.bindAttribLocation(this.program, 0, "position");
    gl.bindAttribLocation(this.program, 1, "color");
    gl.linkProgram(this.program);
    if (!gl.getProgramParameter(this.program, gl.LINK_STATUS) && !gl.isContextLost()) {
      throw new Error(`The scene cannot be drawn: ${gl.getProgramInfoLog(this.program)}`);
    }
    this.at = Object.fromEntries(
      ["rotation", "eye", "lens", "diameter"].map((name) => [name, gl.getUniformLocation(this.program, name)]),
    );
  }

  cloud(scene) {
    const { gl } = this;
    let vertices = this.clouds.get(scene.name);
    this.clouds.delete(scene.name);
    if (!vertices) {
      vertices = gl.createVertexArray();
      vertices.buffer = gl.createBuffer();
      gl.bindVertexArray(vertices);
      gl.bindBuffer(gl.ARRAY_BUFFER, vertices.buffer);
      gl.bufferData(gl.ARRAY_BUFFER, scene.points, gl.STATIC_DRAW);
      gl.enableVertexAttribArray(0);
      gl.vertexAttribPointer(0, 3, gl.FLOAT, false, RECORD, 0);
      gl.enableVertexAttribArray(1);
      gl.vertexAttribPointer(1, 4, gl.UNSIGNED_BYTE, true, RECORD, 12);
    }
    this.clouds.set(scene.name, vertices);
    for (const [name, old] of this.clouds) {
      if (this.clouds.size <= KEPT) break;
      gl.deleteBuffer(old.buffer);
      gl.deleteVertexArray(old);
      this.clouds.delete(name);
    }
    return vertices;
  }

  // Draws what a camera {position, rotation} sees of a scene {name, points, count, radius, lens}. What shows no point
  // is mid-grey and transparent.
  draw(scene, { position, rotation }, width, height) {
    const { gl, canvas } = this;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    gl.viewport(0, 0, width, height);
    gl.clearColor(0.5, 0.5, 0.5, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    if (!scene.count) return;
    gl.enable(gl.DEPTH_TEST);
    gl.useProgram(this.program);
    gl.bindVertexArray(this.cloud(scene));
    // The rows of the world-to-camera rotation are the camera's axes; true: given row by row.
    const axes = [[1, 0, 0], [0, 1, 0], [0, 0, 1]].map((axis) => rotate(rotation, axis));
    gl.uniformMatrix3fv(this.at.rotation, true, axes.flat());
    gl.uniform3fv(this.at.eye, position);
    gl.uniform4fv(this.at.lens, scene.lens);
    gl.uniform1f(this.at.diameter, scene.radius * Math.min(width, height));
    gl.drawArrays(gl.POINTS, 0, scene.count);
    gl.bindVertexArray(null);
  }

  // The share of the picture that shows no point.
  holes(scene, camera, width, height) {
    this.draw(scene, camera, width, height);
    const pixels = new Uint8Array(width * height * 4);
    this.gl.readPixels(0, 0, width, height, this.gl.RGBA, this.gl.UNSIGNED_BYTE, pixels);
    let empty = 0;
    for (let i = 3; i < pixels.length; i += 4) empty += pixels[i] === 0;
    return empty / (width * height);
  }
}

let renderer;

// The page's renderer. Throws an Error where there is no WebGL 2.
export function sharedRenderer() {
  renderer ??= new Renderer();
  return renderer;
}
