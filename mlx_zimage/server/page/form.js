// The form: from what it shows to settings (see settings.js), and back.

import { ServerError } from "./api.js";
import { button, element, find } from "./elements.js";
import { ImageField, LoraList, number } from "./fields.js";
import { Painter, showOn } from "./mask.js";
import { pixels, sizeLike, sizesOf } from "./settings.js";

/** The kinds of control images that a server makes from a photo. */
const KINDS = {
  canny: "its edges (canny)",
  scribble: "its coarse edges (scribble)",
  gray: "its light and shade (gray)",
  tile: "its colours and shapes (tile)",
  lines: "its straight lines",
  pose: "the poses of people",
  depth: "its depth",
};
const STRENGTH = 0.6; // the server's defaults, without and with a mask
const MASKED_STRENGTH = 1;

/** What the server's messages about a setting begin with or contain, and the setting's field. */
const ABOUT = [
  [/^(the )?negative prompt/i, "negative_prompt"],
  [/^(the )?prompt/i, "prompt"],
  [/^(width|height|size)|largest size that fits/i, "size"],
  [/^seed/i, "seed"],
  [/^(the )?number of images/i, "n"],
  [/^steps|^sigmas/i, "steps"],
  [/^guidance/i, "guidance"],
  [/^strength/i, "strength"],
  [/lora/i, "loras"],
  [/control/i, "control"],
  [/^(the )?mask/i, "mask"],
  [/image to start from|^(the )?image/i, "image"],
];

export class SettingsForm {
  #others = {};

  /** `announce` has screen readers read out a sentence. */
  constructor(models, loras, announce) {
    this.models = models;
    this.announce = announce;
    this.form = find("#settings");
    this.image = new ImageField(find("#start"), (image) => this.#showImage(image));
    this.control = new ImageField(find("#control"), (image) => this.#showControlImage(image));
    this.painter = new Painter(find("#painting"));
    this.loras = new LoraList(find("#loras"), loras, announce);
    find("#model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
    find("#model").addEventListener("change", () => this.#showModel());
    find("#size").addEventListener("change", () => this.#showCustomSize());
    find("#strength").addEventListener("input", () => this.#setStrength(find("#strength").value));
    find("#random").addEventListener("click", () => this.#randomSeed());
    this.form.addEventListener("input", ({ target }) => this.#clearError(target.closest("[data-field]")));
    this.#connectMask();
    this.#showModel();
    this.#setStrength(STRENGTH);
  }

  get model() {
    return this.models.find(({ id }) => id === find("#model").value);
  }

  /** The settings that are shown. ServerError, as the server's own, if one of them is not a number. */
  read() {
    const { model } = this;
    const image = this.image.chosen;
    return {
      model: model.id,
      prompt: find("#prompt").value,
      negative_prompt: model.takes_guidance ? find("#negative_prompt").value : undefined,
      size: this.#size(),
      n: number("#n", "n", "The number of images") ?? 1,
      seed: this.#seed(),
      steps: number("#steps", "steps", "Steps"),
      guidance: model.takes_guidance ? number("#guidance", "guidance", "Guidance") : undefined,
      output_format: find("#output_format").value,
      image,
      strokes: image ? this.painter.strokes : [],
      strength: Number(find("#strength").value),
      control: model.control && this.control.chosen ? this.#control() : null,
      loras: this.loras.read(),
      others: this.#others,
    };
  }

  /** Show settings. Returns sentences about those that this server does not have. */
  write(settings) {
    const missing = [];
    this.clearErrors();
    if (this.models.some(({ id }) => id === settings.model)) find("#model").value = settings.model;
    else missing.push(`The model ${settings.model} is not on this server.`);
    this.#showModel();
    find("#prompt").value = settings.prompt;
    find("#negative_prompt").value = settings.negative_prompt ?? "";
    for (const name of ["n", "seed", "steps", "guidance"]) find(`#${name}`).value = settings[name] ?? "";
    find("#output_format").value = settings.output_format ?? find("#output_format").value;
    this.image.choose(settings.image, settings.strokes);
    this.control.choose(settings.control);
    if (settings.control) {
      find("#kind").value = settings.control.kind;
      find("#scale").value = settings.control.scale ?? "";
    }
    this.#setStrength(settings.strength ?? STRENGTH);
    missing.push(...this.loras.write(settings.loras).map((name) => `The LoRA ${name} is not on this server.`));
    this.#showOthers(settings.others);
    this.#showSize(settings.size);
    return missing;
  }

  // ---- errors

  /** Show an error next to the setting that it concerns, or next to the button, and go there. */
  showError(error) {
    const about = ABOUT.find(([words]) => words.test(error.message))?.[1];
    const fields = [error.param, about, "generate"].map((name) => document.querySelector(`[data-field="${name}"]`));
    const field = fields.find((candidate) => candidate && !candidate.closest("[hidden]"));
    const message = [...field.querySelectorAll(":scope > .error")].at(-1);
    message.textContent = error.message;
    message.id ||= `${field.dataset.field}-error`;
    const control = field.querySelector("input, textarea, select");
    if (control && field.dataset.field !== "generate") {
      control.setAttribute("aria-invalid", "true");
      control.setAttribute("aria-errormessage", message.id);
      control.focus();
    }
    field.scrollIntoView({ block: "nearest" });
  }

  /** Show a sentence above the button, which screen readers read out. */
  note(sentence) {
    find("#note").textContent = `${find("#note").textContent} ${sentence}`.trim();
  }

  clearErrors() {
    for (const field of document.querySelectorAll("[data-field]")) this.#clearError(field);
    find("#note").textContent = "";
  }

  #clearError(field) {
    if (!field) return;
    for (const message of field.querySelectorAll(":scope > .error")) message.textContent = "";
    for (const control of field.querySelectorAll("[aria-invalid]")) {
      control.removeAttribute("aria-invalid");
      control.removeAttribute("aria-errormessage");
    }
  }

  // ---- size and seed

  #showModel() {
    const { model } = this;
    find("#steps").placeholder = String(model.steps);
    find("#guidance").placeholder = String(model.guidance);
    for (const field of document.querySelectorAll('[data-for="guidance"]')) field.hidden = !model.takes_guidance;
    this.#showControl();
    this.#showSizes();
  }

  #showControl() {
    const { control } = this.model;
    find("#control").hidden = !control;
    if (!control) return;
    find("#scale").placeholder = String(control.scale);
    const kinds = [...control.kinds.map((kind) => [kind, KINDS[kind] ?? kind]), ["", "the image as it is"]];
    replaceOptions(find("#kind"), kinds);
  }

  /** The sizes to choose from, with the selected one as before if it is still there. */
  #showSizes() {
    const sizes = sizesOf(this.model).map(([ratio, size]) => [size, `${ratio} – ${pixels(size)}`]);
    const image = this.image.chosen ?? this.control.chosen;
    if (image) {
      const size = sizeLike(image.bitmap, this.model.size);
      sizes.unshift([size, `like the image – ${pixels(size)}`]);
    }
    replaceOptions(find("#size"), [...sizes, ["custom", "custom"]]);
    this.#showCustomSize();
  }

  #showSize(size) {
    const known = [...find("#size").options].some(({ value }) => value === size);
    find("#size").value = known ? size : "custom";
    this.#showCustomSize(size);
  }

  #showCustomSize(size = find("#size").value) {
    find("#custom-size").hidden = find("#size").value !== "custom";
    if (size !== "custom") [find("#width").value, find("#height").value] = size.split("x");
  }

  #size() {
    if (find("#size").value !== "custom") return find("#size").value;
    return `${number("#width", "size", "Width") ?? ""}x${number("#height", "size", "Height") ?? ""}`;
  }

  #randomSeed() {
    find("#seed").value = "";
    this.#clearError(find('[data-field="seed"]'));
    this.announce("The seed is random");
  }

  #seed() {
    const seed = find("#seed").value.trim();
    if (seed && !/^\d{1,20}$/.test(seed)) throw new ServerError("The seed must be a whole number.", "seed");
    return seed || undefined;
  }

  // ---- images

  /** The field of an image that has an element in it, if there is one. */
  imageFieldAt(target) {
    return [this.image, this.control].find(({ root }) => root.contains(target));
  }

  #showImage(image, strokes = []) {
    this.#setPainting(false);
    if (image) this.painter.show(image.bitmap, strokes);
    this.#showSizes();
    if (image) this.#useSizeOfImage();
  }

  #showControlImage(image) {
    if (image) showOn(find("#control canvas"), image.bitmap);
    this.#showSizes();
    if (image && !this.image.chosen) this.#useSizeOfImage();
  }

  #useSizeOfImage() {
    find("#size").selectedIndex = 0;
    this.#showCustomSize();
  }

  #connectMask() {
    const { painter } = this;
    find("#paint").addEventListener("click", (event) => {
      this.#setPainting(!painter.active);
      if (painter.active && event.detail === 0) painter.canvas.focus(); // by keyboard
    });
    find("#undo").addEventListener("click", () => painter.undo());
    find("#clear").addEventListener("click", () => painter.clear());
    find("#brush").addEventListener("input", ({ target }) => (painter.brush = target.value / 100));
    painter.addEventListener("move", () => {
      const [across, down] = painter.position;
      this.announce(`Brush at ${across}% from the left, ${down}% from the top`);
    });
    let masked = false;
    painter.addEventListener("change", () => {
      const now = painter.strokes.length > 0;
      find("#undo").disabled = find("#clear").disabled = !now;
      const usual = masked ? MASKED_STRENGTH : STRENGTH;
      if (now !== masked && Number(find("#strength").value) === usual) {
        this.#setStrength(now ? MASKED_STRENGTH : STRENGTH);
      }
      masked = now;
    });
  }

  #setPainting(active) {
    this.painter.setActive(active);
    find("#paint").setAttribute("aria-pressed", String(active));
    find("#mask-tools").hidden = !active;
  }

  #setStrength(strength) {
    find("#strength").value = strength;
    find('output[for="strength"]').textContent = Number(find("#strength").value).toFixed(2);
  }

  #control() {
    const { file, bitmap } = this.control.chosen;
    return { file, bitmap, kind: find("#kind").value, scale: number("#scale", "control", "The scale") };
  }

  // ---- settings without a field

  #showOthers(others) {
    this.#others = others;
    find("#others").hidden = Object.keys(others).length === 0;
    const rows = Object.entries(others).map(([name, value]) => {
      const remove = button("Remove", () => this.#showOthers(without(this.#others, name)), `Remove ${name}`);
      return element("li", {}, element("span", {}, `${name}: ${JSON.stringify(value)}`), remove);
    });
    find("#others ul").replaceChildren(...rows);
  }
}

/** Replace the options of a menu, [value, text] each; the selected one stays so if it is still there. */
function replaceOptions(menu, options) {
  const before = menu.value;
  menu.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
  if (options.some(([value]) => value === before)) menu.value = before;
}

function without(values, name) {
  return Object.fromEntries(Object.entries(values).filter(([other]) => other !== name));
}
