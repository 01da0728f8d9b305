// The parts of the form that are more than one input: an image, and a list of LoRAs.

import { ServerError } from "./api.js";
import { button, element } from "./elements.js";

const LORA_STRENGTH = 1;

/** The number in an input; undefined if it is empty. ServerError, as the server's own, if it is not a number. */
export function number(selector, param, name) {
  const { value, validity } = document.querySelector(selector);
  if (validity.badInput) throw new ServerError(`${name} must be a number.`, param);
  return value === "" ? undefined : Number(value);
}

/** A place for one image: to drop or choose it, and to remove it. */
export class ImageField {
  chosen = null; // {file, bitmap}

  /** show(image, ...more) is called with what was chosen, or null. */
  constructor(root, show) {
    this.root = root;
    this.show = show;
    this.input = root.querySelector("input[type=file]");
    this.error = root.querySelector(":scope > .error");
    this.input.addEventListener("change", () => this.read(this.input.files[0]));
    root.querySelector(".remove").addEventListener("click", () => {
      this.choose(null);
      this.input.focus();
    });
  }

  /** Take a file, or say that this browser cannot read it. */
  async read(file) {
    if (!file) return;
    this.error.textContent = "";
    try {
      this.choose({ file, bitmap: await createImageBitmap(file) });
    } catch {
      this.error.textContent = `This browser cannot read ${file.name}; expected an image such as a PNG, JPEG or WebP file.`;
    }
    this.input.value = ""; // so that the same file can be chosen again
  }

  choose(image, ...more) {
    this.chosen = image;
    this.root.querySelector(".drop").hidden = Boolean(image);
    this.root.querySelector(".chosen").hidden = !image;
    this.show(image, ...more);
  }
}

/** The LoRAs that are used, and a menu of the others. */
export class LoraList {
  constructor(root, names, announce) {
    this.names = names;
    this.announce = announce;
    this.list = root.querySelector("ul");
    this.menu = root.querySelector("select");
    root.hidden = names.length === 0;
    this.menu.addEventListener("change", () => {
      const name = this.menu.value;
      this.#add(name, LORA_STRENGTH).focus();
      this.#fillMenu();
      this.announce(`${name} was added`);
    });
    this.#fillMenu();
  }

  read() {
    return [...this.list.children].map((row) => ({
      name: row.dataset.name,
      strength: Number(row.querySelector("input").value),
    }));
  }

  /** Use these LoRAs. Returns the names of those that are not there. */
  write(loras) {
    this.list.replaceChildren();
    const found = loras.filter(({ name }) => this.names.includes(name));
    for (const { name, strength } of found) this.#add(name, strength);
    this.#fillMenu();
    return loras.filter((lora) => !found.includes(lora)).map(({ name }) => name);
  }

  /** Add a row; returns its input. */
  #add(name, strength) {
    const input = element("input", { type: "number", step: 0.05, value: strength, ariaLabel: `Strength of ${name}` });
    const remove = () => {
      row.remove();
      this.#fillMenu();
      this.menu.focus();
      this.announce(`${name} was removed`);
    };
    const row = element("li", {}, element("span", {}, name), input, button("Remove", remove, `Remove ${name}`));
    row.dataset.name = name;
    this.list.append(row);
    return input;
  }

  #fillMenu() {
    const used = this.read().map(({ name }) => name);
    const others = this.names.filter((name) => !used.includes(name));
    const options = others.map((name) => element("option", { value: name }, name));
    this.menu.replaceChildren(element("option", { value: "" }, "Add a LoRA…"), ...options);
    this.menu.hidden = others.length === 0;
  }
}
