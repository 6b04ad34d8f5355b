// The lab's tab "Export": results are looked through for personal data, and written to a file.

/** @typedef {{value: number, text: string, label: string, by: string, on: boolean, count: number}} MarkedValue */

const SOURCES = { run: "the last run", history: "runs chosen in History" };
const BY = { tier: "a tier", form: "its form", you: "you" };

class ResultsPanel {
  static panel = "results";
  static title = "Export";

  /** @param {any} lab */
  constructor(lab) {
    this.lab = lab;
    /** @type {number[]} */
    this.places = []; // of runs that were chosen in History
    /** @type {string[]} */
    this.sources = [];
    this.looked = false; // what is shown is what would be written
    this.build();
  }

  build() {
    const button = (/** @type {string} */ words, /** @type {() => void} */ onclick, more = {}) =>
      h("button", { type: "button", onclick, ...more }, words);
    const id = (/** @type {string} */ name) => `export-${name}-${this.lab.uid}`;
    this.source = h("select", { id: id("source"), onchange: () => this.reset() });
    this.format = h("select", { id: id("format"), onchange: () => this.rename() },
      ...[["html", "HTML, one page"], ["csv", "CSV"], ["parquet", "Parquet"]].map(([value, words]) => h("option", { value }, words)));
    this.path = h("input", { id: id("path"), value: "results.html" });
    this.bom = h("input", { type: "checkbox" });
    this.forSheets = h("label", { hidden: true }, this.bom, " begin with a mark, by which spreadsheets know UTF-8");
    this.replace = h("input", { type: "checkbox" });
    const choice = (/** @type {boolean} */ redact, /** @type {string} */ words) => h("label", { class: "cl-choice" },
      h("input", { type: "radio", name: id("redact"), value: String(redact), checked: redact, onchange: () => this.choose(redact) }), words);
    this.redact = true;
    this.lookButton = button("Look for personal data", () => this.look(), { class: "cl-run" });
    this.stopButton = button("Stop", () => this.stop(), { class: "cl-stop", disabled: true });
    this.writeButton = button("Write file", () => this.write(), { disabled: true });
    this.progress = h("span", { class: "cl-note" });
    this.written = h("p", { class: "cl-written", hidden: true });
    this.misses = h("p");
    this.values = h("tbody");
    this.unsure = h("p", { hidden: true });
    this.texts = h("div", { class: "cl-texts" });
    this.pages = h("div", { class: "cl-tools" });
    this.more = h("input", { "aria-label": "Also replace", placeholder: "also replace\u2026",
      onkeydown: (/** @type {KeyboardEvent} */ event) => { if (event.key === "Enter") this.add(this.more.value); } });
    this.preview = h("section", { "aria-label": "Preview", hidden: true }, this.misses,
      h("div", { class: "cl-list", role: "region", "aria-label": "What is replaced", tabindex: "0" },
        h("table", {}, h("thead", {}, h("tr", {}, ...["Replace", "What", "Becomes", "Found by", "Places"].map((name) => h("th", { scope: "col" }, name)))),
          this.values)),
      h("div", { class: "cl-tools" }, this.more, button("Add", () => this.add(this.more.value)),
        button("Replace what is selected", () => this.add(String(document.getSelection() ?? "")),
          { onmousedown: (/** @type {Event} */ event) => event.preventDefault() })), // which would end the selection
      this.unsure, this.texts, this.pages);
    this.element = h("div", { class: "cl-export" },
      h("div", { class: "cl-request" },
        h("label", { for: this.source.id }, "Write"), h("span", {}, this.source),
        h("label", { for: this.format.id }, "As"), h("span", { class: "cl-tools" }, this.format, this.forSheets),
        h("label", { for: this.path.id }, "File, beside the notebook"),
        h("span", { class: "cl-tools" }, this.path, h("label", {}, this.replace, " in place of one that is there")),
        h("span", { class: "cl-label" }, "Personal data"), h("div", { role: "radiogroup", "aria-label": "Personal data" },
          choice(true, "Replaced: you look through the texts first, and the file is searched for what was replaced"),
          choice(false, "Left as it is: every prompt and answer is written word for word, with all names and numbers in it"))),
      h("div", { class: "cl-tools" }, this.lookButton, this.stopButton, this.writeButton, this.progress), this.written, this.preview);
    this.showSources([]);
  }

  shown() {
    this.lab.send({ type: "results.sources" });
  }

  run() {
    if (!this.lookButton.disabled && this.redact) this.look();
  }

  stop() {
    if (!this.stopButton.disabled) this.lab.send({ type: "results.stop" });
  }

  /** Take what was chosen in another tab. @param {string} source @param {number[]} places */
  from(source, places) {
    this.places = places;
    this.showSources([...this.sources, source]);
    this.source.value = source;
    this.reset();
    this.lab.root.querySelector(`#tab-results-${this.lab.uid}`).click();
    this.lookButton.focus();
  }

  /** @param {string[]} sources */
  showSources(sources) {
    this.sources = [...new Set([...sources, ...(this.places.length ? ["history"] : [])])];
    const before = this.source.value;
    const title = (/** @type {string} */ name) => SOURCES[name] ?? this.lab.panels.find((/** @type {any} */ each) => each.name === name)?.title ?? name;
    this.source.replaceChildren(...this.sources.map((name) => h("option", { value: name },
      title(name) + (name === "history" ? ` (${this.places.length})` : ""))));
    if (this.sources.includes(before)) this.source.value = before;
    this.source.disabled = !this.sources.length;
    if (!this.sources.length) this.source.replaceChildren(h("option", { value: "" }, "nothing was run yet"));
    this.busy(false);
  }

  rename() {
    this.path.value = this.path.value.replace(/(\.(html|csv|parquet))?$/, `.${this.format.value}`);
    this.forSheets.hidden = this.format.value !== "csv";
  }

  /** @param {boolean} redact */
  choose(redact) {
    this.redact = redact;
    this.preview.hidden = !redact || !this.looked;
    this.busy(false);
  }

  reset() {
    this.looked = false;
    this.preview.hidden = this.written.hidden = true;
    this.busy(false);
  }

  /** @param {boolean} busy @param {string} words */
  busy(busy, words = "") {
    this.progress.textContent = words;
    this.stopButton.disabled = !busy;
    this.lookButton.disabled = busy || !this.redact || !this.sources.length;
    this.writeButton.disabled = busy || !this.sources.length || (this.redact && !this.looked);
    this.writeButton.textContent = this.redact ? "Write file" : "Write file, with personal data";
  }

  look() {
    this.reset();
    this.busy(true, "looking\u2026");
    this.lab.say("");
    this.lab.send({ type: "results.look", source: this.source.value, places: this.places });
  }

  write() {
    this.written.hidden = true;
    this.busy(true, "writing\u2026");
    this.lab.say("");
    this.lab.send({ type: "results.write", source: this.source.value, places: this.places, path: this.path.value,
      redact: this.redact, replace: this.replace.checked, bom: this.bom.checked && this.format.value === "csv" });
  }

  /** @param {string} text */
  add(text) {
    if (!text.trim()) return this.lab.say("Nothing is selected; select a name in a text below, or type it.");
    this.more.value = "";
    this.lab.send({ type: "results.add", text });
  }

  /** @param {any} message */
  receive(message) {
    if (message.type === "results.sources") this.showSources(message.sources);
    else if (message.type === "results.progress") this.busy(true, `${message.stage}: ${message.done} of ${message.total} sentences`);
    else if (message.type === "results.stopped") this.busy(false, "stopped");
    else if (message.type === "results.values") this.showValues(message);
    else if (message.type === "results.texts") this.showTexts(message);
    else if (message.type === "results.written") this.showWritten(message);
    else {
      this.busy(false);
      this.lab.say(message.message);
    }
  }

  /** @param {{values: MarkedValue[], misses: string}} message */
  showValues({ values, misses }) {
    const first = !this.looked;
    this.looked = true;
    this.preview.hidden = !this.redact;
    this.misses.textContent = misses;
    this.values.replaceChildren(...values.map((value) => {
      const box = h("input", { type: "checkbox", checked: value.on, "aria-label": `Replace ${visible(value.text)}`,
        onchange: () => this.switchValue(value.value, box.checked) });
      return h("tr", {}, h("td", {}, box), h("td", { class: "cl-first", dir: "auto" }, visible(value.text)), h("td", {}, value.label),
        h("td", {}, BY[value.by] ?? value.by), h("td", {}, String(value.count)));
    }));
    const on = values.filter((value) => value.on).length;
    this.busy(false, `${on} of ${values.length} are replaced`);
    if (first) this.lab.announce(`${values.length} proposals; look through the texts`);
  }

  /** @param {number} value @param {boolean} on */
  switchValue(value, on) {
    this.lab.send({ type: "results.switch", value, on });
  }

  /** @param {any} message */
  showTexts({ number, pages, total, unsure, texts }) {
    this.unsure.hidden = !unsure;
    this.unsure.textContent = `In ${unsure} of ${total} texts a tier lost its way; they are marked "unsure": read those with care.`;
    this.texts.replaceChildren(...texts.map((/** @type {any} */ text) => h("div", { class: "cl-shown" },
      h("div", { class: "cl-note" }, text.where + (text.unsure ? " \u00b7 unsure" : "")),
      h("div", { class: "cl-passage", dir: "auto" }, ...text.parts.map((/** @type {[string, number | null]} */ [part, value]) =>
        value === null ? visible(part) : h("button", { type: "button", class: "cl-black", title: "is replaced; press to leave it",
          onclick: () => this.switchValue(value, false) }, visible(part)))))));
    const turn = (/** @type {string} */ words, /** @type {number} */ to) => h("button", { type: "button", disabled: to < 0 || to >= pages,
      onclick: () => this.lab.send({ type: "results.page", number: to }) }, words);
    this.pages.replaceChildren(...(pages > 1 ? [turn("\u2190 texts", number - 1), `page ${number + 1} of ${pages}, ${total} texts`, turn("texts \u2192", number + 1)] : [`${total} texts`]));
  }

  /** @param {any} message */
  showWritten({ path, rows, size_bytes, searched, replaced }) {
    this.busy(false);
    this.written.textContent = `Written: ${path}, ${rows} rows, ${inBytes(size_bytes)}. ` + (searched === null ?
      "Nothing was replaced: who gets the file reads all of it." :
      `${replaced} places replaced; the file was searched for all ${searched} values, also in base64, hexadecimal and other encodings: none is in it.`);
    this.written.hidden = false;
    this.lab.announce(this.written.textContent);
  }
}

PANELS.push(ResultsPanel);
