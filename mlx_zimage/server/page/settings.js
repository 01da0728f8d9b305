// Settings: a plain object with what the form shows, its conversion to a request, and from an image's metadata.
//
// {model, prompt, negative_prompt, size: "1024x1024", n, seed: "" or digits, steps, guidance, output_format,
//  image: {file, bitmap} or null, strokes (see mask.js), strength, control: {file, kind, scale} or null,
//  loras: [{name, strength}], others: {...}}
//
// What is left to the server is undefined. Seeds are strings, since they have up to 20 digits.

import { base64 } from "./api.js";
import { maskOf } from "./mask.js";

/** Settings of a request that the form has no field for, and their defaults; they come from images' metadata. */
const OTHERS = {
  shift: null,
  sigmas: null,
  rng: "torch",
  cfg_normalization: 0,
  cfg_truncation: 1,
  max_sequence_length: 512,
  sample_posterior: false,
  mask_feather: null,
  mask_grow: 0,
  mask_soft: false,
  mask_resample: null,
  outpaint: null,
  upscale: null,
  tile: null,
};
const ENDINGS = { png: "png", jpeg: "jpg", webp: "webp" }; // of files, by output_format
const RATIOS = ["1:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16"];

/** Width and height with an aspect ratio and about side x side pixels, as `generate --size 3:2` computes them. */
function sizeOf(width, height, side) {
  return `${multiple(side * Math.sqrt(width / height))}x${multiple(side * Math.sqrt(height / width))}`;
}

/** The same for an image, of which cropping then takes at most 8 pixels of one side. */
export function sizeLike({ width, height }, side) {
  const ratio = Math.max(width, height) / Math.min(width, height);
  const shorter = multiple(side / Math.sqrt(ratio));
  const longer = multiple(shorter * ratio);
  return width < height ? `${shorter}x${longer}` : `${longer}x${shorter}`;
}

function multiple(pixels) {
  return Math.max(1, Math.round(pixels / 16)) * 16;
}

/** A size as it is shown: 1024 × 1024. */
export function pixels(size) {
  return size.replace("x", " × ");
}

/** The sizes that suit a model, by their aspect ratios. */
export function sizesOf(model) {
  return RATIOS.map((ratio) => [ratio, sizeOf(...ratio.split(":"), model.size)]);
}

/** The values and files of a request. */
export async function requestOf(settings) {
  const { image, strokes, control, others, ...own } = settings;
  const values = { ...own, ...others };
  const files = {};
  if (control) {
    values.control = { image: await base64(control.file), kind: control.kind || undefined, scale: control.scale };
  }
  if (image) {
    files.image = image.file;
    if (strokes.length) files.mask = await maskOf(strokes, image.bitmap.width, image.bitmap.height);
  } else {
    delete values.strength;
  }
  return { values, files };
}

/** The settings in an image's metadata. The image that it started from is null, since metadata does not contain it. */
export function settingsFrom({ model, request }) {
  const others = Object.entries(OTHERS).filter(([name, usual]) => ![usual, undefined].includes(request[name]));
  return {
    model,
    prompt: request.prompt,
    negative_prompt: request.negative_prompt,
    size: `${request.width}x${request.height}`,
    n: 1,
    seed: String(request.seed),
    steps: request.steps,
    guidance: request.guidance_scale,
    image: null,
    strokes: [],
    strength: request.strength ?? undefined,
    control: null,
    loras: request.loras.map(({ name, strength }) => ({ name, strength })),
    others: Object.fromEntries(others.map(([name]) => [name, request[name]])),
  };
}

/** The name of an image's file: the beginning of its prompt, and its seed. */
export function fileName(settings, seed) {
  const words = settings.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["image"];
  return `${words.join("-").slice(0, 60)}-${seed}.${ENDINGS[settings.output_format]}`;
}
