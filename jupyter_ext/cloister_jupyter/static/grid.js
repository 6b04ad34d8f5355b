// The grid's page: templates and cases on top, what the tiers answered below; see grid_panel.py.

const CHECK_HELP = [
  ["exact", "is the text, but for outer spaces; without a check, what is expected is compared so"],
  ["contains: Paris", "has the text in it"],
  ['{"contains": ["a", "b"]}', "has every one of the texts in it"],
  ['json: {"name": "none"}', "is JSON with these fields; a.b.0 is a place in it"],
  ['schema: {"type": "object"}', "is JSON that the JSON Schema allows"],
  ["regex: ^[0-9]+$", "has a match of the regular expression (Python's)"],
  ["function: name", "makes a function of PromptLab(functions={...}) return True; it has 10 s, and cannot be ended before it returns"],
];
const REFRESH_MS = 1000; // between two looks at the rows of a run

class GridPage {
  static panel = "grid";
  static title = "Grid";

  /** @param {any} lab */
  constructor(lab) {
    this.lab = lab;
    this.uid = newId();
    this.running = this.begun = false;
    this.run_ = ""; // id of the run that is shown
    this.heard = this.refreshed = 0; // answers, and when they were shown
    this.build();
  }

  // ---- elements

  build() {
    this.runButton = h("button", { type: "button", class: "cl-run", onclick: () => this.run() }, "Run grid");
    this.stopButton = h("button", { type: "button", class: "cl-stop", disabled: true, onclick: () => this.stop() }, "Stop");
    this.note = h("span", { class: "cl-note" });
    this.bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Answers of the grid" });
    this.result = new GridResult(this);
    this.element = h("div", { class: "cl-grid" },
      h("div", { class: "cl-toolbar", role: "toolbar", "aria-label": "Run and stop the grid" },
        this.runButton, this.stopButton, this.bar, this.note),
      h("details", { open: true, class: "cl-ask" }, h("summary", {}, "What is asked"),
        this.request(), this.settings()),
      this.result.element);
  }

  request() {
    this.templates = this.area(3, "A prompt with {variables}");
    this.system = this.area(1, "none");
    this.pasted = this.area(2, "Cells from a spreadsheet, CSV or JSON lines, with a line of headings");
    this.pasted.addEventListener("paste", () => setTimeout(() => this.read()));
    this.file = h("input", { type: "file", accept: ".csv,.tsv,.txt,.jsonl,.json", "aria-label": "A file with a table",
      onchange: () => this.readFile() });
    this.check = h("input", { id: `check-${this.uid}`, type: "text", placeholder: "exact" });
    this.caseNote = h("span", { class: "cl-note" }, "no cases");
    this.cases = new RowTable({
      label: "Cases", readOnly: false,
      need: (begin, count) => this.lab.send({ type: "grid.cases", view: 0, begin, count }),
      fill: (cell, row, column) => { cell.textContent = column ? visible(row.cells[column - 1]) : row.line; },
      open: (row, column) => { if (column) this.lab.send({ type: "grid.cell", row, column: column - 1 }); },
      commit: (row, column, text) => this.lab.send({ type: "grid.edit", row, column: column - 1, text }),
    });
    this.cases.element.hidden = true;
    this.rowButtons = h("span", { hidden: true },
      this.button("Add a case", () => this.lab.send({ type: "grid.insert", row: this.cases.count ? this.cases.active.row + 1 : 0 })), " ",
      this.button("Remove the case", () => { if (this.cases.count) this.lab.send({ type: "grid.remove", row: this.cases.active.row }); }));
    return h("div", { class: "cl-request" },
      h("label", { for: this.templates.id }, "Templates"),
      h("div", {}, this.templates, h("p", { class: "cl-hint" }, "A line of --- stands between several; {{ and }} are braces.")),
      h("label", { for: this.system.id }, "System prompt"),
      h("div", { class: "cl-system" }, ...this.taskPicker(), this.system),
      h("label", { for: this.pasted.id }, "Paste a table"),
      h("div", {}, this.pasted, h("div", { class: "cl-jump" },
        this.button("Read what is pasted", () => this.read()), this.file,
        this.button("New from the templates", () => this.lab.send({ type: "grid.blank", templates: this.templates.value })))),
      h("span", { class: "cl-label" }, "Cases"),
      h("div", {}, h("div", { class: "cl-jump" }, this.caseNote, this.rowButtons), this.cases.element),
      h("label", { for: this.check.id }, "Default check"),
      h("div", {}, this.check, this.help()));
  }

  help() {
    this.functions = h("p", { class: "cl-hint", hidden: true });
    return h("details", {}, h("summary", {}, "Kinds of checks"),
      h("p", { class: "cl-hint" }, "A table may have columns \u201cexpected\u201d and \u201ccheck\u201d. An answer passes where it"),
      h("dl", { class: "cl-checks" }, ...CHECK_HELP.flatMap(([how, what]) => [h("dt", {}, h("code", {}, how)), h("dd", {}, what)])),
      this.functions);
  }

  settings() {
    const field = (/** @type {string} */ name, /** @type {string} */ label, /** @type {any} */ given) => {
      const input = /** @type {HTMLInputElement} */ (h("input", { id: `${name}-${this.uid}`, ...given }));
      this[name] = input;
      return h("div", { class: "cl-field" }, h("label", { for: input.id }, label), input);
    };
    this.toggles = h("div", { class: "cl-toggles", role: "group", "aria-label": "Tiers of the grid" },
      ...this.lab.columns.map((/** @type {any} */ column) => h("label", { class: "cl-toggle" },
        h("input", { type: "checkbox", value: column.id, checked: true }), column.name)));
    this.keepButtons = h("span", { class: "cl-jump", hidden: true },
      this.button("Take up", () => { this.taking = true; this.lab.send({ type: "grid.take", name: this.named.value }); }),
      this.button("Forget", () => this.lab.send({ type: "grid.forget", name: this.named.value })));
    this.keepNote = h("p", { class: "cl-hint" });
    return h("div", {}, h("div", { class: "cl-fields" },
      field("seeds", "Seeds", { type: "text", placeholder: "drawn, or 1-4" }),
      field("temperature", "Temperature", { type: "number", step: "any", min: 0, value: 0, required: true }),
      field("maxTokens", "Tokens at most", { type: "number", step: 1, min: 1, value: 64, required: true }),
      field("wanted", "Wanted pass rate, %", { type: "number", step: "any", min: 1, max: 99.9, value: 90, required: true }),
      field("named", "Kept under the name", { type: "text", value: "grid", maxlength: 256 }), this.keepButtons),
    this.keepNote, this.toggles);
  }

  /** @param {number} rows @param {string} placeholder */
  area(rows, placeholder) {
    return /** @type {HTMLTextAreaElement} */ (h("textarea", {
      id: `area-${newId()}`, rows, placeholder, dir: "auto" }));
  }

  /** @param {string} words @param {() => void} act */
  button(words, act) {
    return h("button", { type: "button", onclick: () => { this.lab.say(""); act(); } }, words);
  }

  taskPicker() {
    const tasks = this.lab.model.get("tasks");
    if (!tasks.length) return [];
    const picker = /** @type {HTMLSelectElement} */ (h("select", {
      "aria-label": "Task of the grid", onchange: () => { this.system.value = picker.value; },
    }, h("option", { value: "" }, "no task"), ...tasks.map((/** @type {string} */ task) => h("option", {}, task))));
    this.pickTask = () => { picker.value = tasks.includes(this.system.value) ? this.system.value : ""; };
    this.system.addEventListener("input", this.pickTask);
    return [picker];
  }

  // ---- what the user does

  read() {
    const text = this.pasted.value, size = new TextEncoder().encode(text).length;
    if (!text.trim() || this.tooLarge(size)) return;
    this.lab.send({ type: "grid.read", text });
  }

  async readFile() {
    const file = this.file.files[0];
    this.lab.say("");
    if (!file || this.tooLarge(file.size)) return;
    const bytes = new Uint8Array(await file.arrayBuffer());
    let text = "";
    for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
    this.lab.send({ type: "grid.file", base64: btoa(text) });
    this.file.value = ""; // the same file may be chosen again, once it is corrected
  }

  /** @param {number} size of a table, which is refused before it is sent: a server ends connections */
  tooLarge(size) {
    const most = this.limit ?? 0;
    if (size > most) this.lab.say(`The table has ${size.toLocaleString("en")} bytes and the page takes ${most.toLocaleString("en")}; split it, or use cloister_jupyter.cases.load_table in a cell.`);
    return size > most;
  }

  run() {
    if (this.running || this.lab.detached) return;
    for (const field of [this.temperature, this.maxTokens, this.wanted]) {
      if (!field.checkValidity()) return field.reportValidity();
    }
    this.lab.say("");
    this.run_ = newId();
    this.begun = false;
    this.setRunning(true, "begins\u2026");
    this.lab.announce("Grid started");
    this.lab.link.ask({ type: "grid.run", run: this.run_, name: this.named.value,
      columns: [...this.toggles.querySelectorAll("input:checked")].map((box) => box.value),
      form: { templates: this.templates.value, system: this.system.value, check: this.check.value, seeds: this.seeds.value,
        temperature: Number(this.temperature.value), max_tokens: Number(this.maxTokens.value), wanted: Number(this.wanted.value) / 100 } });
  }

  stop() {
    if (!this.running) return;
    this.note.textContent = "stopping\u2026";
    this.lab.send({ type: "grid.stop", run: this.run_ });
  }

  /** @param {boolean} running @param {string} words */
  setRunning(running, words) {
    this.running = running;
    this.note.textContent = words;
    this.runButton.disabled = running || this.lab.detached;
    this.stopButton.disabled = !running;
    this.bar.hidden = !running;
  }

  shown() {
    this.cases.drawSoon();
    this.result.table.drawSoon();
  }

  detached() {
    this.setRunning(false, this.keeps ? "the kernel is gone; what was answered is kept" : "the kernel is gone");
  }

  // ---- what the kernel says

  /** @param {any} message */
  receive(message) {
    const kind = message.type.split(".")[1];
    if (["began", "progress", "result", "over"].includes(kind) && !this.ours(message)) return;
    const show = /** @type {any} */ (this)[`on_${kind}`];
    if (show) show.call(this, message);
  }

  /** Tell whether a message is of the run that is shown; one of another page's is shown from now on. @param {any} message */
  ours({ type, run }) {
    if (run !== this.run_ && type === "grid.began") this.run_ = run;
    return run === this.run_;
  }

  /** @param {any} message */
  on_state({ form, name, functions, vault, path, limit_bytes, run }) {
    this.limit = limit_bytes;
    this.keeps = vault;
    this.keepButtons.hidden = !vault;
    this.keepNote.textContent = vault ? "Answers are kept in the vault under the name: a grid that is stopped goes on from there."
      : "Answers are kept in this kernel's memory only; PromptLab(vault=...) keeps them in the vault.";
    this.functions.hidden = !functions.length;
    this.functions.textContent = `Functions: ${functions.join(", ")}`;
    this.result.path.value ||= path;
    if (this.taking || !this.templates.value) {
      this.templates.value = form.templates;
      this.system.value = form.system;
      this.check.value = form.check;
      this.seeds.value = form.seeds;
      this.temperature.value = String(form.temperature);
      this.maxTokens.value = String(form.max_tokens);
      this.wanted.value = String(Math.round(form.wanted * 1000) / 10);
      this.named.value = name;
      this.pickTask?.();
    }
    this.taking = false;
    if (!run || this.run_ === run.run) return;
    this.run_ = run.run;
    this.begun = true;
    this.setRunning(run.running, run.running ? "running\u2026" : "done");
    this.result.begin(run.columns, run.variables, run.result.prompts.length);
    this.result.show(run.result);
  }

  /** @param {{columns: string[], count: number}} message */
  on_table({ columns, count }) {
    const titles = ["line", ...columns];
    if (titles.join("\n") !== this.cases.columns.map((column) => column.title).join("\n")) {
      this.cases.setColumns(titles.map((title, index) => ({ title, width: index ? "minmax(9em, 1fr)" : "4em" })));
    }
    this.cases.element.hidden = !count;
    this.rowButtons.hidden = columns.length < 3 && !count;
    this.caseNote.textContent = count ? `${count.toLocaleString("en")} ${count > 1 ? "cases" : "case"}; Enter or a double click edits a cell` : "no cases";
    this.cases.setCount(count);
    this.cases.stale();
    if (count) this.lab.announce(this.caseNote.textContent);
  }

  /** @param {any} message */
  on_cases({ begin, rows }) { this.cases.put(begin, rows); }

  /** @param {any} message */
  on_cell({ row, column, text }) { this.cases.edit(row, column + 1, text); }

  on_edited() { this.cases.stale(); }

  /** @param {any} message */
  on_began({ columns, variables, prompts, total, cases }) {
    this.begun = true;
    this.setRunning(true, `asks ${total.toLocaleString("en")} answers`);
    this.heard = 0;
    this.result.begin(columns, variables, prompts);
    this.result.table.setCount(prompts * cases);
  }

  /** @param {any} message */
  on_progress({ tier, done, total, note, left_s, heard }) {
    const state = { loading: `loads ${tier}`, waits: "waits: this kernel asks something else, in this lab or another" }[note] ?? `asks ${tier}`;
    const left = left_s === null ? "" : `; about ${left_s < 100 ? `${Math.round(left_s)} s` : `${Math.round(left_s / 60)} min`} left`;
    if (this.running && this.note.textContent !== "stopping\u2026") {
      this.note.textContent = `${state}: ${done.toLocaleString("en")} of ${total.toLocaleString("en")} answers${left}`;
    }
    this.bar.max = total;
    this.bar.value = done;
    if (heard !== this.heard && performance.now() - this.refreshed > REFRESH_MS) {
      this.heard = heard;
      this.refreshed = performance.now();
      this.result.refresh();
    }
  }

  /** @param {any} result */
  on_result(result) { this.result.show(result); }

  /** @param {any} message */
  on_over({ stopped, message, result }) {
    const told = `${result.done?.toLocaleString("en") ?? 0} of ${result.total?.toLocaleString("en") ?? 0} answers`;
    this.setRunning(false, message ? "" : stopped ? `stopped after ${told}; Run goes on` : `done: ${told}`);
    if (message) this.lab.say(message);
    if (this.begun) {
      this.result.show(result);
      this.result.refresh();
    }
    this.lab.announce(message || `Grid ${stopped ? "stopped" : "done"}. ${this.result.words}`);
  }

  /** @param {any} message */
  on_rows(message) { this.result.put(message); }

  /** @param {any} message */
  on_row(message) { this.result.showRow(message); }

  /** @param {any} message */
  on_compared(message) { this.result.showComparison(message); }

  /** @param {any} message */
  on_said({ message }) {
    this.result.said.textContent = message;
    this.note.textContent = this.running ? this.note.textContent : message;
    this.lab.announce(message);
  }

  /** @param {any} message */
  on_invalid({ message }) {
    if (this.running && !this.begun) this.setRunning(false, "");
    this.taking = false;
    this.lab.say(message);
  }
}
PANELS.push(GridPage);
