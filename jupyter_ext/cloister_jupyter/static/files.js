// Pictures and recordings that go with the next question; shared by the pages of this package.
//
// A file is sent to the kernel in custom messages, a part each, and nothing of it stays here but its
// size: no synced trait, no storage, no URL holds it.

const PART_BYTES = 384 << 10; // of a file, in a message: a server ends connections over large ones
const FILE_TYPES = {
  image: { word: "picture", types: "image/png,image/jpeg,image/webp", names: /\.(png|jpe?g|webp)$/i },
  audio: { word: "recording", types: "audio/wav,audio/flac,audio/ogg,audio/mpeg,.wav,.flac,.ogg,.opus,.mp3", names: /\.(wav|flac|ogg|opus|mp3)$/i },
};

/** @typedef {{id: string, label: string}} Held */

/** A button that takes files, a list of those that were taken, and a place to drop them on. */
class Files {
  /**
   * @param {any} page which has `model`, `link` and `say(words)`
   * @param {HTMLElement} target that files may be dropped on
   */
  constructor(page, target) {
    this.page = page;
    /** @type {string[]} kinds that the model takes */
    this.kinds = page.model.get("takes");
    /** @type {Held[]} */
    this.held = [];
    this.reading = 0; // files that are on their way to the kernel
    const words = this.kinds.map((kind) => FILE_TYPES[kind].word).join(" or ");
    this.picker = /** @type {HTMLInputElement} */ (h("input", { type: "file", multiple: true, hidden: true, tabindex: -1,
      accept: this.kinds.map((kind) => FILE_TYPES[kind].types).join(","),
      onchange: () => {
        const chosen = [...this.picker.files];
        this.picker.value = ""; // so that the same file can be chosen again
        this.add(chosen);
      } }));
    this.button = /** @type {HTMLButtonElement} */ (h("button", { type: "button", class: "cl-attach", onclick: () => this.picker.click() }, `Add ${words}`));
    this.list = h("ul", { class: "cl-files", "aria-label": "Files that go with the question", hidden: true });
    this.element = h("div", { class: "cl-attached", hidden: !this.kinds.length }, this.button, this.picker, this.list);
    for (const name of ["dragover", "drop"]) target.addEventListener(name, (event) => this.onDrag(/** @type {DragEvent} */ (event)));
  }

  get ids() {
    return this.held.map(({ id }) => id);
  }

  /** @param {DragEvent} event */
  onDrag(event) {
    if (!event.dataTransfer?.types.includes("Files")) return; // a text, which the box takes by itself
    event.preventDefault();
    event.stopPropagation(); // the notebook around would open it
    if (event.type === "drop") this.add([...event.dataTransfer.files]);
  }

  /** Take files, one after the other. @param {File[]} files */
  async add(files) {
    for (const file of files) {
      const kind = Object.keys(FILE_TYPES).find((each) => file.type.startsWith(`${each}/`) || FILE_TYPES[each].names.test(file.name));
      const most = this.page.model.get("file_bytes");
      if (!kind) this.page.say("A file is neither a picture nor a recording; choose another.");
      else if (!this.kinds.includes(kind)) this.page.say(`The model takes no ${FILE_TYPES[kind].word}s; choose another, or leave it out.`);
      else if (file.size > most) this.page.say(`A file has ${file.size.toLocaleString("en")} bytes and ${most.toLocaleString("en")} are taken; choose a smaller one.`);
      else if (this.held.length >= this.page.model.get("most_files")) this.page.say(`There are ${this.held.length} files; remove one first.`);
      else await this.send(file, kind);
    }
  }

  /** @param {File} file @param {string} kind */
  async send(file, kind) {
    this.reading++;
    const id = newId(), label = await labelOf(file, kind);
    try {
      const bytes = new Uint8Array(await file.arrayBuffer());
      for (let at = 0; at === 0 || at < bytes.length; at += PART_BYTES) {
        this.page.link.send({ type: "attach", id, kind, data: inBase64(bytes.subarray(at, at + PART_BYTES)), whole: at + PART_BYTES >= bytes.length });
      }
      this.show([...this.held, { id, label }]);
      this.page.announce(`${label} added`);
    } catch {
      this.page.say("A file cannot be read; choose another.");
    } finally {
      this.reading--;
    }
  }

  /** Take back a file that the kernel refused. @param {{id: string, message: string}} refusal */
  refused({ id, message }) {
    this.show(this.held.filter((each) => each.id !== id));
    this.page.say(message);
  }

  /** Let the kernel forget files that nobody asks about any more. @param {string[]} ids */
  forget(ids) {
    if (ids.length) this.page.link.send({ type: "remove", ids });
  }

  /** @param {string} id */
  remove(id) {
    this.forget([id]);
    this.show(this.held.filter((each) => each.id !== id));
    this.button.focus();
  }

  /** Show files as those that go with the next question. @param {Held[]} held */
  show(held) {
    this.held = held;
    this.list.hidden = !held.length;
    this.list.replaceChildren(...held.map(({ id, label }) => h("li", { class: "cl-file" }, label,
      h("button", { type: "button", "aria-label": `Remove ${label}`, onclick: () => this.remove(id) }, "\u00d7"))));
  }
}

/** Say what a file is, as far as this browser can tell. @param {File} file @param {string} kind */
async function labelOf(file, kind) {
  if (kind === "audio") return `recording ${inBytes(file.size)}`;
  try {
    const { width, height } = await createImageBitmap(file);
    return `picture ${width} x ${height}`;
  } catch {
    return "picture";
  }
}

/** @param {Uint8Array} bytes */
function inBase64(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 1 << 15) text += String.fromCharCode(...bytes.subarray(at, at + (1 << 15)));
  return btoa(text);
}
