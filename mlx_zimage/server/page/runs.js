// What was generated since the page was opened. A run is one request: its progress, its images, and its settings.

import { ServerError } from "./api.js";
import { button, element } from "./elements.js";
import { fileName, pixels, requestOf } from "./settings.js";

/** A card with a request's progress while it waits and runs, and then with its images. */
export class Run {
  #stop = new AbortController();
  #accepted = false; // by the server
  #seeds = []; // of the images that are finished
  #started = performance.now();

  /** page has use(settings), startFrom(file) and announce(sentence). */
  constructor(settings, page) {
    this.settings = settings;
    this.page = page;
    this.status = element("p", { className: "status" }, "Waiting");
    this.progress = element("progress", { max: 1, ariaLabel: "Progress" });
    this.cancel = button("Cancel", () => this.#stop.abort());
    this.reuse = button("Use these settings", () => page.use({ ...settings, seed: this.#seeds[0] ?? settings.seed }));
    this.remove = button("Remove", () => this.#remove());
    this.remove.hidden = true;
    this.slots = []; // until it runs
    this.images = element("div", { className: "images" });
    const [width, height] = settings.size.split("x");
    this.images.style.setProperty("--ratio", width / height);
    this.card = element(
      "article",
      { className: "run" },
      element("h3", { title: settings.prompt }, settings.prompt),
      element("p", { className: "hint" }, summary(settings)),
      this.progress,
      element("div", { className: "row" }, this.status, this.cancel, this.reuse, this.remove),
      this.images,
    );
  }

  /** Generate. Returns the server's refusal, if it did not accept the request, instead of showing it. */
  async start(server) {
    try {
      const { values, files } = await requestOf(this.settings);
      for await (const event of server.generate(values, files, this.#stop.signal)) this.#receive(event);
      const seconds = (performance.now() - this.#started) / 1000;
      this.#end(`Done in ${duration(seconds)}`);
    } catch (error) {
      if (error instanceof ServerError && !this.#accepted) {
        this.card.remove();
        return error;
      }
      this.#fail(error);
    }
    return null;
  }

  #receive(event) {
    const kind = event.type.split(".").at(-1);
    const slot = this.slots[this.#seeds.length];
    if (kind === "progress") this.#showProgress(event);
    else if (kind === "partial_image") slot.preview(event);
    else if (kind === "adjusted") this.images.before(element("p", { className: "note" }, `Adjusted: ${event.changes}.`));
    else if (kind === "completed") {
      const seed = String(event.seed);
      this.#seeds.push(seed);
      slot.finish(event, seed, this.#actions(seed));
      this.page.announce(`Image ${this.#seeds.length} of ${this.slots.length} is finished`);
    }
  }

  #showProgress({ position, step, steps, estimated_seconds: seconds }) {
    this.#accepted = true;
    if (position === 0 && this.slots.length === 0) this.#addSlots();
    const left = seconds === null ? "" : `, about ${duration(seconds)} left`;
    const others = position === 1 ? "one other request" : `${position} other requests`;
    if (position > 0) this.#say(`Waiting for ${others}${left}`);
    else if (!steps) this.#say("Starting");
    else {
      const images = this.slots.length;
      const which = images > 1 ? `Image ${this.#seeds.length + 1} of ${images}, step` : "Step";
      const each = steps / images;
      this.status.textContent = `${which} ${step - this.#seeds.length * each} of ${each}${left}`;
      this.progress.value = step / steps;
    }
  }

  #addSlots() {
    this.slots = Array.from({ length: this.settings.n }, () => new Slot(this.settings));
    this.images.append(...this.slots.map(({ figure }) => figure));
  }

  /** Show a sentence, and announce it to screen readers. */
  #say(sentence) {
    if (this.status.textContent !== sentence) this.page.announce(sentence);
    this.status.textContent = sentence;
  }

  /** The buttons of one image. */
  #actions(seed) {
    const one = this.slots.length === 1;
    const which = one ? "this image" : `image ${this.#seeds.length}`;
    const start = (file) => button("Start from it", () => this.page.startFrom(file), `Start from ${which}`);
    const use = () => button("Use its seed", () => this.page.use({ ...this.settings, n: 1, seed }), `Use the seed of ${which}`);
    return { start, use: one ? null : use, which };
  }

  #fail(error) {
    const made = this.#seeds.length ? ` after ${this.#seeds.length} of ${this.slots.length} images` : "";
    if (error.name === "AbortError") this.#end(`Cancelled${made}`);
    else {
      this.status.classList.add("error");
      this.#end(error instanceof ServerError ? error.message : "The connection to the server was lost.");
      if (!(error instanceof ServerError)) console.error(error);
    }
  }

  #end(sentence) {
    for (const slot of this.slots.slice(this.#seeds.length)) slot.figure.remove();
    this.#say(sentence);
    this.progress.remove();
    const focused = document.activeElement === this.cancel;
    this.cancel.hidden = true;
    this.remove.hidden = false;
    if (focused) this.reuse.focus();
  }

  #remove() {
    this.slots.forEach((slot) => slot.free());
    this.card.remove();
    this.page.announce("Removed");
    document.querySelector("#results").focus();
  }
}

/** The place of one image in a run: empty, then with previews, then with the image. */
class Slot {
  constructor(settings) {
    this.settings = settings;
    this.image = element("img", { alt: "", hidden: true });
    this.frame = element("div", { className: "frame" }, this.image);
    this.figure = element("figure", {}, this.frame);
  }

  preview(event) {
    this.#show(fileOf(event, "preview"), "preview", `Preview: ${this.settings.prompt}`);
  }

  finish(event, seed, { start, use, which }) {
    const file = fileOf(event, fileName(this.settings, seed));
    this.#show(file, "", this.settings.prompt);
    const { src: href } = this.image;
    const open = element("a", { href, target: "_blank", className: "frame", ariaLabel: `Open ${which}` }, this.image);
    this.frame.replaceWith(open);
    const download = element("a", { href, download: file.name, className: "button", ariaLabel: `Download ${which}` }, "Download");
    const buttons = element("div", { className: "row" }, download, start(file), ...(use ? [use()] : []));
    this.figure.append(element("figcaption", {}, element("span", {}, `Seed ${seed}`), buttons));
  }

  #show(file, className, alt) {
    this.free();
    Object.assign(this.image, { src: URL.createObjectURL(file), alt, className, hidden: false });
  }

  /** Free the memory of the image. */
  free() {
    if (this.image.src) URL.revokeObjectURL(this.image.src);
  }
}

/** The image of an event as a file. */
function fileOf({ b64_json: text, output_format: format }, name) {
  return new File([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], name, { type: `image/${format}` });
}

/** The settings of a run, in a line. */
function summary({ size, model, steps, guidance, image, strokes, strength, control, loras }) {
  const parts = [pixels(size), model];
  if (steps) parts.push(`${steps} step${steps === 1 ? "" : "s"}`);
  if (guidance !== undefined) parts.push(`guidance ${guidance}`);
  if (image) parts.push(`from an image${strokes.length ? " with a mask" : ""}, strength ${strength}`);
  if (control) parts.push(`with a control image${control.kind && ` (${control.kind})`}`);
  for (const lora of loras) parts.push(`${lora.name} ${lora.strength}`);
  return parts.join(" · ");
}

function duration(seconds) {
  const whole = Math.max(1, Math.round(seconds));
  return whole < 100 ? `${whole} s` : `${Math.round(whole / 60)} min`;
}
