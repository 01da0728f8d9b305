// Painting a mask over an image, with a pointer or the keyboard.
//
// A stroke is {radius, points: [[x, y], ...]} in pixels of the image. Strokes are never changed once they are done.

import { ServerError } from "./api.js";

const SHOWN = 1024; // pixels of a canvas along its longer side
const COLOUR = "#ff3d7f";
const OPACITY = 0.55;

/** A mask as OpenAI's API has it: a PNG of the image's size, transparent where strokes are. ServerError if that fails. */
export function maskOf(strokes, width, height) {
  const { canvas, context } = canvasOf(width, height);
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "destination-out";
  strokes.forEach((stroke) => paint(context, stroke));
  return new Promise((resolve, reject) => {
    const size = `${width} × ${height} pixels`; // too many for a canvas of some browsers
    const refuse = () => reject(new ServerError(`The mask of ${size} is too large for this browser; use a smaller image.`, "mask"));
    canvas.toBlob((mask) => (mask ? resolve(mask) : refuse()), "image/png");
  });
}

/** Show an image on a canvas, which takes its proportions; CSS makes it smaller. */
export function showOn(canvas, bitmap) {
  const scale = SHOWN / Math.max(bitmap.width, bitmap.height);
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}

/** Shows an image on a canvas, and the strokes that are painted on it while `active`. Sends "change" events. */
export class Painter extends EventTarget {
  active = false;
  brush = 0.1; // the brush's diameter, as a fraction of the image's shorter side
  strokes = [];
  #bitmap = null;
  #stroke = null; // the one that is being painted
  #cursor = null; // of the keyboard

  constructor(canvas) {
    super();
    this.canvas = canvas;
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, () => this.#end());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#draw());
  }

  /** Show an image, an ImageBitmap, with strokes on it. */
  show(bitmap, strokes = []) {
    this.#bitmap = bitmap;
    this.#cursor = [bitmap.width / 2, bitmap.height / 2];
    showOn(this.canvas, bitmap);
    this.#change(strokes);
  }

  setActive(active) {
    this.active = active;
    this.canvas.classList.toggle("paintable", active);
    this.canvas.tabIndex = active ? 0 : -1;
    if (active) this.canvas.setAttribute("role", "application");
    else this.canvas.setAttribute("role", "img");
    this.#draw();
  }

  undo() {
    this.#change(this.strokes.slice(0, -1));
  }

  clear() {
    this.#change([]);
  }

  get #radius() {
    return (this.brush * Math.min(this.#bitmap.width, this.#bitmap.height)) / 2;
  }

  #change(strokes) {
    this.strokes = strokes;
    this.#draw();
    this.dispatchEvent(new Event("change"));
  }

  // ---- pointer

  #begin(event) {
    if (!this.active || event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#stroke = { radius: this.#radius, points: [this.#point(event)] };
    this.#draw();
  }

  #move(event) {
    if (!this.#stroke) return;
    this.#stroke.points.push(this.#point(event));
    this.#draw();
  }

  #end() {
    if (!this.#stroke) return;
    const done = this.#stroke;
    this.#stroke = null;
    this.#change([...this.strokes, done]);
  }

  /** Where an event is, in pixels of the image. */
  #point(event) {
    const shown = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - shown.left) / shown.width) * this.#bitmap.width,
      ((event.clientY - shown.top) / shown.height) * this.#bitmap.height,
    ];
  }

  // ---- keyboard

  #key(event) {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!this.active || !(direction || event.key === " ")) return;
    event.preventDefault();
    const before = this.#cursor;
    if (direction) {
      const { width, height } = this.#bitmap;
      const moved = before.map((value, axis) => value + direction[axis] * this.#radius);
      this.#cursor = [Math.min(Math.max(moved[0], 0), width), Math.min(Math.max(moved[1], 0), height)];
    }
    if (event.shiftKey || event.key === " ") {
      this.#change([...this.strokes, { radius: this.#radius, points: [before, this.#cursor] }]);
    } else {
      this.#draw();
    }
    this.dispatchEvent(new Event("move"));
  }

  /** Where the keyboard's brush is, in percent of the width and height. */
  get position() {
    return [(100 * this.#cursor[0]) / this.#bitmap.width, (100 * this.#cursor[1]) / this.#bitmap.height].map(Math.round);
  }

  // ---- drawing

  #draw() {
    if (!this.#bitmap) return;
    const { width, height } = this.canvas;
    const context = this.canvas.getContext("2d");
    const scale = width / this.#bitmap.width;
    context.drawImage(this.#bitmap, 0, 0, width, height);
    const marks = canvasOf(width, height);
    marks.context.scale(scale, scale);
    for (const stroke of [...this.strokes, ...(this.#stroke ? [this.#stroke] : [])]) paint(marks.context, stroke);
    context.globalAlpha = OPACITY;
    context.drawImage(marks.canvas, 0, 0);
    context.globalAlpha = 1;
    if (this.active && this.canvas.matches(":focus-visible")) this.#drawCursor(context, scale);
  }

  #drawCursor(context, scale) {
    context.beginPath();
    context.arc(this.#cursor[0] * scale, this.#cursor[1] * scale, this.#radius * scale, 0, 2 * Math.PI);
    const pixel = this.canvas.width / this.canvas.getBoundingClientRect().width; // of the screen
    for (const [colour, width] of [["#000", 4], ["#fff", 2]]) {
      Object.assign(context, { strokeStyle: colour, lineWidth: width * pixel });
      context.stroke();
    }
  }
}

function paint(context, { radius, points }) {
  Object.assign(context, { lineWidth: 2 * radius, lineCap: "round", lineJoin: "round" });
  Object.assign(context, { strokeStyle: COLOUR, fillStyle: COLOUR });
  context.beginPath();
  context.arc(...points[0], radius, 0, 2 * Math.PI); // a line without length is not drawn
  context.fill();
  context.beginPath();
  for (const point of points) context.lineTo(...point);
  context.stroke();
}

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  return { canvas, context: canvas.getContext("2d") };
}
