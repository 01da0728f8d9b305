// The page: connects the form, the server and the runs, and takes images that are dropped anywhere.

import { Server, ServerError } from "./api.js";
import { find } from "./elements.js";
import { SettingsForm } from "./form.js";
import { Run } from "./runs.js";
import { settingsFrom } from "./settings.js";

const server = new Server(askForKey);
let form;

start().catch((error) => {
  find("#note").textContent = error instanceof ServerError ? error.message : "The page could not start.";
  if (!(error instanceof ServerError)) throw error;
});

async function start() {
  const models = await server.models();
  form = new SettingsForm(models, await server.loras(), announce);
  form.form.addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  find("#prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) generate();
  });
  find("#load").addEventListener("change", ({ target }) => {
    if (target.files[0]) load(target.files[0]);
    target.value = "";
  });
  takeDrops();
}

async function generate() {
  form.clearErrors();
  try {
    const run = new Run(form.read(), { use, startFrom, announce });
    find("#empty").hidden = true;
    find("#runs").prepend(run.card);
    run.card.querySelector("h3").scrollIntoView({ block: "nearest" });
    const refusal = await run.start(server);
    if (refusal) form.showError(refusal);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    form.showError(error);
  }
}

/** Show settings in the form. */
function use(settings, what = "The settings") {
  const missing = form.write(settings);
  form.note([`${what} are now in the form.`, ...missing].join(" "));
  find("#prompt").focus();
}

/** Start the next images from this one. */
async function startFrom(file) {
  await form.image.read(file);
  announce("The next images will start from this one");
  find("#start").scrollIntoView({ block: "nearest" });
  find("#strength").focus();
}

/** Show the settings in the metadata of an image. */
async function load(file) {
  form.clearErrors();
  try {
    const origin = await server.origin(file);
    use(settingsFrom(origin), `The settings of ${file.name}`);
    const { image, mask_image: mask, controls } = origin.request;
    const lacking = [image && "the image that it started from", mask && "its mask", controls?.length && "its control image"];
    const names = lacking.filter(Boolean);
    if (names.length) form.note(`The file does not contain ${names.join(" or ")}: add ${names.length > 1 ? "them" : "it"} again.`);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    form.showError(new ServerError(error.message, "load"));
  }
}

function takeDrops() {
  const dropping = (event, on) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", on);
  };
  document.addEventListener("dragover", (event) => dropping(event, true));
  document.addEventListener("dragleave", (event) => dropping(event, Boolean(event.relatedTarget)));
  document.addEventListener("drop", (event) => {
    dropping(event, false);
    const [file] = event.dataTransfer.files;
    if (!file) return;
    const field = form.imageFieldAt(event.target);
    if (field) field.read(file);
    else load(file);
  });
}

/** Have screen readers read out a sentence. */
function announce(sentence) {
  find("#announcements").textContent = sentence;
}

/** The API key that a person enters, or null. */
function askForKey(wrong) {
  const dialog = find("#key");
  const input = find("#key-value");
  dialog.querySelector(".error").textContent = wrong ? "The server did not accept this key." : "";
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" ? input.value : null), { once: true });
  });
}
