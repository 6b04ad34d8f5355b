// The lab's tab "History": runs that the vault keeps, to open, search, export and delete.

/**
 * A line of the list; of a run that cannot be read `run` is null and `why` says it.
 * @typedef {{place: number, run: string | null, at_s: number, tiers: string[], words: string, size_bytes: number, why?: string}} KeptLine
 */

class HistoryPanel {
  static panel = "history";
  static title = "History";

  /** @param {any} lab */
  constructor(lab) {
    this.lab = lab;
    /** @type {KeptLine[]} */
    this.lines = [];
    this.chosen = new Set(); // places
    /** @type {Set<number> | null} */
    this.found = null; // places that a search found; null: there is none
    /** @type {any} */
    this.opened = null;
    this.build();
  }

  build() {
    const button = (/** @type {string} */ words, /** @type {() => void} */ onclick) =>
      h("button", { type: "button", onclick }, words);
    this.why = h("p", { hidden: true });
    this.keep = h("input", { type: "checkbox",
      onchange: () => this.lab.send({ type: "history.keep", on: this.keep.checked }) });
    this.words = h("input", { type: "search", "aria-label": "Words to find in prompts and answers",
      placeholder: "words in prompts and answers", onchange: () => this.find() });
    this.count = h("span", { class: "cl-note" });
    this.all = h("input", { type: "checkbox", "aria-label": "All that are shown", onchange: () => {
      this.chosen = new Set(this.all.checked ? this.shownLines().map((line) => line.place) : []);
      this.draw();
    } });
    this.body = h("tbody");
    this.remove = button("Delete chosen", () => this.ask());
    this.send = button("Export chosen", () => this.lab.panels.find((/** @type {any} */ each) => each.name === "results")
      ?.panel.from("history", [...this.chosen]));
    this.question = h("div", { class: "cl-question", role: "group", "aria-label": "Delete for good", hidden: true });
    this.shownRun = h("section", { class: "cl-kept", "aria-label": "The opened run", tabindex: "-1", hidden: true });
    this.content = h("div", {},
      h("div", { class: "cl-tools" }, h("label", { class: "cl-toggle" }, this.keep, "Keep history"),
        this.words, button("Find", () => this.find()), this.count),
      h("div", { class: "cl-list", role: "region", "aria-label": "Kept runs", tabindex: "0" },
        h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, this.all),
          ...["When", "Tiers", "Prompt", ""].map((name) => h("th", { scope: "col" }, name || h("span", { class: "cl-hidden" }, "Open"))))),
        this.body)),
      h("div", { class: "cl-tools" }, this.send, this.remove), this.question, this.shownRun);
    this.element = h("div", { class: "cl-history" }, this.why, this.content);
  }

  shown() {
    if (this.why.hidden) this.lab.send({ type: "history.list" });
  }

  stop() {
    if (this.question.hidden) return;
    this.question.hidden = true;
    this.remove.focus();
  }

  find() {
    if (this.words.value.trim()) this.lab.send({ type: "history.find", words: this.words.value });
    else {
      this.found = null;
      this.draw();
    }
  }

  /** @param {any} message */
  receive(message) {
    if (message.type === "history.state") {
      this.keep.checked = message.keeping;
      this.why.textContent = message.why;
      this.why.hidden = !message.why;
      this.content.hidden = Boolean(message.why);
    } else if (message.type === "history.lines") {
      this.lines = message.lines;
      const there = new Set(this.lines.map((line) => line.place));
      this.chosen = new Set([...this.chosen].filter((place) => there.has(place)));
      this.draw();
    } else if (message.type === "history.found") {
      if (message.words !== this.words.value) return;
      this.found = new Set(message.places);
      this.draw();
      this.lab.announce(`${this.found.size} runs found`);
    } else if (message.type === "history.opened") this.open(message);
    else if (message.type === "history.kept" && !this.element.hidden) this.shown();
    else if (message.type === "history.forgotten") {
      this.lab.announce(`${message.count} runs deleted`);
      if (this.opened && !this.shownRun.hidden) this.shownRun.hidden = true;
    } else if (message.message) this.lab.say(message.message);
  }

  shownLines() {
    const found = this.found;
    return found ? this.lines.filter((line) => found.has(line.place)) : this.lines;
  }

  draw() {
    const lines = this.shownLines();
    this.body.replaceChildren(...lines.map((line) => this.row(line)));
    const size = this.lines.reduce((sum, line) => sum + (line.size_bytes ?? 0), 0);
    this.count.textContent = (this.found ? `${lines.length} found of ` : "") +
      `${this.lines.length} ${this.lines.length === 1 ? "run" : "runs"}, ${inBytes(size)}`;
    this.all.checked = lines.length > 0 && lines.every((line) => this.chosen.has(line.place));
    this.remove.disabled = this.send.disabled = !this.chosen.size;
    this.question.hidden = true;
  }

  /** @param {KeptLine} line */
  row(line) {
    const when = line.run === null ? "?" : inDays(line.at_s);
    const words = line.run === null ? String(line.why) : visible(line.words);
    const box = h("input", { type: "checkbox", checked: this.chosen.has(line.place), "aria-label": `Choose the run of ${when}`,
      onchange: () => {
        if (box.checked) this.chosen.add(line.place);
        else this.chosen.delete(line.place);
        this.remove.disabled = this.send.disabled = !this.chosen.size;
        this.all.checked = false;
      } });
    return h("tr", {}, h("td", {}, box), h("td", {}, when), h("td", {}, (line.tiers ?? []).join(", ")),
      h("td", { class: line.run === null ? "cl-unread" : "cl-first", dir: "auto" }, words),
      h("td", {}, line.run === null ? "" : h("button", { type: "button", "aria-label": `Open the run of ${when}`,
        onclick: () => this.lab.send({ type: "history.open", place: line.place }) }, "Open")));
  }

  /** Ask once before what is chosen is deleted. */
  ask() {
    const runs = this.lines.filter((line) => this.chosen.has(line.place)).map((line) => [line.place, line.run]);
    const no = h("button", { type: "button", onclick: () => this.stop() }, "Keep them");
    this.question.replaceChildren(
      h("span", {}, `Delete ${runs.length} of ${this.lines.length} runs for good? Their keys are destroyed; nothing brings them back.`),
      h("button", { type: "button", class: "cl-stop", onclick: () => {
        this.stop();
        this.lab.send({ type: "history.forget", runs });
        this.words.focus();
      } }, "Delete"), no);
    this.question.hidden = false;
    no.focus();
  }

  /** Show a kept run, and how to take it up again. @param {any} run */
  open(run) {
    this.opened = run;
    const settings = Object.entries({ max_tokens: run.max_tokens, ...run.sampling })
      .filter(([, value]) => value !== null).map(([name, value]) => `${name} ${value}`).join(", ");
    const text = (/** @type {string} */ name, /** @type {string} */ words) => h("div", { class: "cl-passage", dir: "auto", tabindex: "0",
      role: "group", "aria-label": name }, visible(words) || "\u2013");
    this.shownRun.replaceChildren(
      h("h3", {}, `Kept on ${inDays(run.at_s)}; not run now`),
      h("div", { class: "cl-tools" }, h("button", { type: "button", class: "cl-run", onclick: () => this.takeUp() }, "Show in One request"),
        h("button", { type: "button", onclick: () => { this.shownRun.hidden = true; } }, "Close")),
      h("dl", {}, h("dt", {}, "Prompt"), h("dd", {}, text("Kept prompt", run.prompt)),
        h("dt", {}, "System prompt"), h("dd", {}, text("Kept system prompt", run.system ?? "")), h("dt", {}, "Settings"), h("dd", {}, settings),
        ...run.answers.flatMap((/** @type {any} */ answer) => [
          h("dt", {}, answer.tier, h("br"), h("small", {}, answer.error ? "error" : FINISH[answer.finish] ?? "not asked")),
          h("dd", {}, answer.error ? visible(answer.error) : text(`Kept answer of ${answer.tier}`, answer.text))])));
    this.shownRun.hidden = false;
    this.shownRun.focus();
  }

  /** Fill the request, and show the answers of the tiers that this lab has. */
  takeUp() {
    const { lab, opened } = this;
    if (lab.running) return lab.say("A run is going on; stop it first.");
    // A run that the kernel does not know: it cannot be scored, or gone on from.
    const events = [], columns = [], run = `kept ${opened.run}`;
    for (const answer of opened.answers) {
      const column = lab.columns.find((/** @type {any} */ each) => each.name === answer.tier);
      if (!column) continue;
      columns.push(column.id);
      if (!answer.finish && !answer.error) continue;
      const at = { run, column: column.id };
      events.push({ ...at, type: "ready", load_s: answer.load_s }, { ...at, type: "delta", texts: answer.text.match(/\s*\S+|\s+$/g) ?? [] },
        answer.error ? { ...at, type: "refused", message: answer.error } :
          { ...at, ...answer, type: "ended", forced_tokens: 0 });
    }
    lab.prompt.value = opened.prompt;
    lab.system.value = opened.system ?? "";
    lab.system.dispatchEvent(new Event("input"));
    for (const [name, field] of lab.sampling.fields) {
      const value = name === "max_tokens" ? opened.max_tokens : opened.sampling[name];
      field.value = value ?? "";
    }
    lab.toggles.querySelectorAll("input").forEach((/** @type {HTMLInputElement} */ box) => {
      box.checked = columns.includes(box.value);
    });
    lab.root.querySelector(`#tab-run-${lab.uid}`).click();
    lab.restore({ request: { run, columns, prompt: opened.prompt, system: opened.system },
      events: [...events, { type: "over", stopped: opened.stopped, run }].map((event, seq) => ({ ...event, seq })) });
    for (const id of columns) {
      const { stateText } = lab.views.get(id);
      stateText.textContent = `kept: ${stateText.textContent}`;
    }
    lab.note.textContent = `kept on ${inDays(opened.at_s)}, not run now`;
    const missing = opened.answers.length - columns.length;
    if (missing) lab.say(`${missing} of the answers are of tiers that this lab has not; History shows them.`);
    lab.prompt.focus();
  }
}

/** @param {number} seconds since 1970 */
function inDays(seconds) {
  return new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

PANELS.push(HistoryPanel);
