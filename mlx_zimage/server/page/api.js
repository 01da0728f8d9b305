// The server's API: JSON, and images while they form. Asks for the API key if the server needs one.

const LARGEST = 32 * 2 ** 20; // bytes of a request; the server refuses larger ones
const KEY = "mlx-zimage key"; // in sessionStorage, which ends with the tab
const PREVIEWS = 3; // of each image
const TURNS = 4; // streams at once: browsers open six connections to a server, and some must stay free

/** What the server refuses or cannot do, in its words. `param` names the setting at fault, if the server does. */
export class ServerError extends Error {
  constructor(message, param = null) {
    super(message);
    this.param = param;
  }
}

export class Server {
  #running = 0;
  #waiting = [];

  /** askForKey(wrong) resolves to the API key, or to null; `wrong` says that the last one was not accepted. */
  constructor(askForKey) {
    this.askForKey = askForKey;
  }

  /** The served models, the default one first. */
  async models() {
    return (await this.#json("v1/models")).data;
  }

  /** The names of the LoRAs that requests may use. */
  async loras() {
    return (await this.#json("sdapi/v1/loras")).map((lora) => lora.name);
  }

  /** How an image file was generated: its settings and its model; ServerError if it is not one of ours. */
  async origin(file) {
    return (await this.#json("sdapi/v1/png-info", checked(post({ image: await base64(file) })))).origin;
  }

  /** Generate what `values` (see settings.js) describe: the events of the answer, until `signal` is aborted. */
  async *generate(values, files, signal) {
    signal.throwIfAborted();
    await this.#turn(signal);
    try {
      const all = { ...values, stream: true, progress: true, partial_images: PREVIEWS };
      const [path, options] = files.image ? ["v1/images/edits", form(all, files)] : ["v1/images/generations", post(all)];
      const response = await this.#request(path, { ...checked(options, files.image ? "image" : "control"), signal });
      const adjusted = response.headers.get("X-MLX-ZImage-Adjusted");
      if (adjusted) yield { type: "adjusted", changes: adjusted };
      yield* events(response);
    } finally {
      this.#running -= 1;
      this.#waiting.shift()?.();
    }
  }

  /** Wait until fewer than TURNS streams are open. */
  async #turn(signal) {
    if (this.#running >= TURNS) {
      await new Promise((resolve, reject) => {
        this.#waiting.push(resolve);
        signal.addEventListener("abort", () => {
          this.#waiting = this.#waiting.filter((other) => other !== resolve);
          reject(signal.reason);
        });
      });
    }
    this.#running += 1;
  }

  async #json(path, options) {
    return parse(await (await this.#request(path, options)).text());
  }

  async #request(path, options = {}) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
      const response = await fetch(path, { ...options, headers }).catch((error) => {
        throw error.name === "AbortError" ? error : new ServerError("The server does not answer; is it still running?");
      });
      if (response.ok) return response;
      const refused = await refusal(response);
      if (response.status !== 401) throw refused;
      const given = await this.askForKey(key !== null);
      if (!given) throw refused;
      sessionStorage.setItem(KEY, given);
    }
  }
}

/** Server-sent events of an answer, as objects. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = parse(block.slice(block.indexOf("data: ") + "data: ".length));
      if (event.error) throw new ServerError(sentence(event.error.message), event.error.param);
      yield event;
    }
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  const { message, param } = body.error?.message ? body.error : { message: body.detail };
  return new ServerError(sentence(message ?? `the server answered ${response.status} ${response.statusText}`), param);
}

/** The value of JSON text, with seeds that have more digits than JavaScript's numbers hold as strings. */
function parse(text) {
  // inside a string, the quotation marks would follow a backslash
  return JSON.parse(text.replace(/("seed": ?)(\d{16,})/g, '$1"$2"'));
}

/** The options of a request with a JSON body, in which the seed, a string of digits, becomes a number. */
function post({ seed, ...values }) {
  const json = JSON.stringify(values);
  const body = seed ? `{"seed":${seed},${json.slice(1)}` : json;
  return { method: "POST", body, headers: { "Content-Type": "application/json" } };
}

/** The options of a request with a form: strings as they are, everything else as JSON. */
function form(values, files) {
  const body = new FormData();
  for (const [name, value] of Object.entries(values)) {
    if (value !== undefined) body.append(name, typeof value === "string" ? value : JSON.stringify(value));
  }
  for (const [name, file] of Object.entries(files)) body.append(name, file);
  return { method: "POST", body };
}

/** The options of a request, unless its images are larger than the server accepts: ServerError about `param`. */
function checked(options, param) {
  const parts = typeof options.body === "string" ? [options.body] : [...options.body.values()];
  const bytes = parts.reduce((sum, part) => sum + (part.size ?? part.length), 0);
  if (bytes <= LARGEST) return options;
  const [sent, most] = [bytes, LARGEST].map((size) => `${Math.ceil(size / 2 ** 20)} MiB`);
  throw new ServerError(`This takes ${sent} to send, but the server accepts at most ${most}; choose a smaller file.`, param);
}

/** A file's content in base64. */
export function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new ServerError(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

/** An error as a sentence. */
function sentence(message) {
  const text = message[0].toUpperCase() + message.slice(1);
  return /[.?!]$/.test(text) ? text : `${text}.`;
}
