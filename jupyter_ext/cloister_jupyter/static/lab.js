// The prompt lab's page: a request on top, one column a tier below; see lab.py for the messages.
// One module with text.js and the panels' files, which stand before it.
//
// Nothing is loaded from anywhere. What was typed or answered becomes text nodes only, never markup,
// and leaves this page in custom messages only: no synced trait, no storage, no URL holds it.

/** @typedef {{id: string, name: string}} Column */
/**
 * What is known of a column of the run at hand.
 * @typedef {{
 *   state: "waiting" | "loading" | "reading" | "answering" | "ended" | "refused" | "left out",
 *   text: string, loadS: number | null, tokens: number, beganMs: number, figures: any,
 * }} Answer
 */

/**
 * The elements of a column; `following` while its end is kept in sight.
 * @typedef {{
 *   section: HTMLElement, state: HTMLElement, answer: HTMLElement, error: HTMLElement,
 *   figures: HTMLElement, following: boolean, frame: number,
 * }} View
 */

/** One view of a lab: its elements, and what it knows of the run at hand. */
class Lab {
  /** @param {{model: any, el: HTMLElement}} context */
  constructor({ model, el }) {
    this.model = model;
    /** @type {Column[]} */
    this.columns = model.get("columns");
    this.uid = newId();
    this.run = ""; // id of the run that is shown
    this.next = 0; // sequence number that comes next
    this.running = false;
    /** @type {Map<string, Answer>} */
    this.answers = new Map();
    /** @type {Map<string, View>} */
    this.views = new Map();
    this.build(el);
    this.thing = "lab";
    this.link = new Link(model, this);
  }

  dispose() {
    this.link.dispose();
  }

  get detached() {
    return this.link?.detached ?? false;
  }

  // ---- elements

  /** @param {HTMLElement} el */
  build(el) {
    this.runButton = h("button", { type: "button", class: "cl-run", onclick: () => this.begin() }, "Run");
    this.stopButton = h("button", { type: "button", class: "cl-stop", disabled: true, onclick: () => this.stop() }, "Stop");
    this.note = h("span", { class: "cl-note" });
    this.announced = h("div", { class: "cl-hidden", role: "status" });
    this.badge = new Badge();
    this.sampling = new Sampling();
    this.alert = h("div", { class: "cl-alert", role: "alert", hidden: true });
    this.prompt = this.textArea("prompt", 3, "A request, for every tier that is chosen");
    this.system = this.textArea("system", 1, "none");
    this.toggles = h("div", { class: "cl-toggles", role: "group", "aria-label": "Tiers" });
    this.grid = h("div", { class: "cl-columns" });
    for (const column of this.columns) this.addColumn(column);
    this.jump = h("div", { class: "cl-jump", hidden: true },
      h("button", { type: "button", onclick: () => this.jumpBy(-1), "aria-keyshortcuts": "[" }, "\u2190 difference"),
      h("button", { type: "button", onclick: () => this.jumpBy(1), "aria-keyshortcuts": "]" }, "difference \u2192"),
      this.differences = h("span", { class: "cl-note" }));
    this.panels = PANELS.map((Panel) => ({ name: Panel.panel, title: Panel.title, panel: new Panel(this) }));
    this.main = h("div", {},
      h("div", { class: "cl-request" },
        h("label", { for: this.prompt.id }, "Prompt"), this.prompt,
        h("label", { for: this.system.id }, "System prompt"),
        h("div", { class: "cl-system" }, ...this.taskPicker(), this.system),
        h("span", { class: "cl-label" }, "Tiers"), this.toggles),
      this.sampling.element, this.jump, this.grid);
    this.root = h("section", {
      class: "cloister-lab", "aria-label": "Prompt lab", "data-lm-suppress-shortcuts": "true",
      "data-jp-suppress-context-menu": "true",
      onkeydown: (/** @type {KeyboardEvent} */ event) => this.onKey(event),
    },
      h("div", { class: "cl-toolbar", role: "toolbar", "aria-label": "Run and stop" },
        this.runButton, this.stopButton, this.note,
        this.badge.element),
      this.alert, ...this.tabs(), this.announced);
    el.append(this.root);
  }

  /** The tabs and what they show; a lab without panels has none. */
  tabs() {
    const parts = [{ name: "run", title: "One request", element: this.main },
      ...this.panels.map(({ name, title, panel }) => ({ name, title, element: panel.element }))];
    if (parts.length === 1) return [this.main];
    /** @type {any} */
    this.shownPanel = null; // none: one request
    const tabs = parts.map(({ name, title }) => h("button", {
      type: "button", role: "tab", id: `tab-${name}-${this.uid}`, "aria-controls": `panel-${name}-${this.uid}`,
      onclick: () => choose(name) }, title));
    const choose = (/** @type {string} */ name) => parts.forEach((part, index) => {
      const chosen = part.name === name;
      tabs[index].setAttribute("aria-selected", String(chosen));
      tabs[index].tabIndex = chosen ? 0 : -1;
      part.element.hidden = !chosen;
      if (chosen) {
        this.shownPanel = this.panels[index - 1]?.panel ?? null;
        this.runButton.hidden = this.stopButton.hidden = this.note.hidden = this.shownPanel !== null;
        this.shownPanel?.shown?.();
      }
    });
    parts.forEach(({ name, element }, index) => {
      element.id = `panel-${name}-${this.uid}`;
      element.setAttribute("role", "tabpanel");
      element.setAttribute("aria-labelledby", tabs[index].id);
    });
    const list = h("div", { class: "cl-tabs", role: "tablist", "aria-label": "Parts of the lab",
      onkeydown: (/** @type {KeyboardEvent} */ event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const to = (tabs.indexOf(/** @type {HTMLElement} */ (document.activeElement)) + step + tabs.length) % tabs.length;
        choose(parts[to].name);
        tabs[to].focus();
      } }, ...tabs);
    choose("run");
    return [list, ...parts.map(({ element }) => element)];
  }

  /** @param {string} name @param {number} rows @param {string} placeholder */
  textArea(name, rows, placeholder) {
    return /** @type {HTMLTextAreaElement} */ (h("textarea", {
      id: `${name}-${this.uid}`, rows, placeholder, spellcheck: "false", autocomplete: "off",
      dir: "auto", oninput: () => this.say("") }));
  }

  /** The system prompts that the shipped family was made for. */
  taskPicker() {
    const tasks = this.model.get("tasks");
    if (!tasks.length) return [];
    const picker = /** @type {HTMLSelectElement} */ (h("select", {
      "aria-label": "Task", class: "cl-task",
      onchange: () => { this.system.value = picker.value; },
    }, h("option", { value: "" }, "no task"), ...tasks.map((/** @type {string} */ task) => h("option", {}, task))));
    this.system.addEventListener("input", () => {
      picker.value = tasks.includes(this.system.value) ? this.system.value : "";
    });
    return [picker];
  }

  /** @param {Column} column */
  addColumn(column) {
    const chosen = h("input", { type: "checkbox", value: column.id, checked: true,
      onchange: () => { section.hidden = !chosen.checked && !this.answers.has(column.id); } });
    this.toggles.append(h("label", { class: "cl-toggle" }, chosen, column.name));
    const title = h("h3", { id: `t${column.id}-${this.uid}` }, column.name);
    const state = h("span", { class: "cl-state" });
    const answer = h("div", { class: "cl-answer", "aria-live": "off", tabindex: "0", dir: "auto",
      role: "group", "aria-label": `Answer of ${column.name}` });
    const error = h("p", { class: "cl-error", hidden: true });
    const figures = h("dl", { class: "cl-figures" });
    const section = h("section", { class: "cl-column", "aria-labelledby": title.id },
      h("header", {}, title, state), answer, error, figures);
    this.grid.append(section);
    /** @type {View} */
    const view = { section, state, answer, error, figures, following: true, frame: 0 };
    answer.addEventListener("scroll", () => {
      view.following = answer.scrollTop + answer.clientHeight > answer.scrollHeight - 8;
    });
    this.views.set(column.id, view);
  }

  // ---- what the user does

  /** @param {KeyboardEvent} event */
  onKey(event) {
    event.stopPropagation(); // the notebook around has meanings of its own for arrows and letters
    const typing = event.target instanceof HTMLTextAreaElement || event.target instanceof HTMLInputElement;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.shownPanel ? this.shownPanel.run?.() : this.begin();
    else if (event.key === "Escape") this.shownPanel ? this.shownPanel.stop?.() : this.stop();
    else if (this.shownPanel) return;
    else if (event.key === "]" && !typing) this.jumpBy(1);
    else if (event.key === "[" && !typing) this.jumpBy(-1);
    else return;
    event.preventDefault();
  }

  begin() {
    if (this.running || this.detached) return;
    const prompt = this.prompt.value, most = this.model.get("limit_bytes");
    const refused = tooLong("prompt", prompt, most) || tooLong("system prompt", this.system.value, most);
    if (refused) return this.say(refused);
    const settings = this.sampling.values();
    if (!settings) return;
    const chosen = [...this.toggles.querySelectorAll("input:checked")].map((box) => box.value);
    const run = newId();
    this.show(run, chosen);
    this.link.ask({ type: "run", run, columns: chosen, prompt, system: this.system.value || null, ...settings });
  }

  stop() {
    if (!this.running) return;
    this.note.textContent = "stopping\u2026 (once more ends the model's process)";
    this.link.ask({ type: "stop", run: this.run });
  }

  /** Move the focus to the next mark, or to the one before. @param {number} step */
  jumpBy(step) {
    const marks = [...this.grid.querySelectorAll("mark")];
    if (!marks.length) return;
    const at = marks.indexOf(/** @type {HTMLElement} */ (document.activeElement));
    const to = at < 0 ? (step > 0 ? 0 : marks.length - 1) : (at + step + marks.length) % marks.length;
    marks[to].focus();
    marks[to].scrollIntoView({ block: "nearest" });
  }

  // ---- the kernel

  /** @param {any} content */
  send(content) {
    this.link.send(content);
  }

  detach() {
    this.root.classList.add("cl-detached");
    this.end("");
    this.runButton.disabled = true;
    this.badge.detach();
    this.panels.forEach(({ panel }) => panel.detached?.());
  }

  /** @param {any} message */
  receive(message) {
    const panel = this.panels.find(({ name }) => message.type.startsWith(`${name}.`));
    if (panel) return panel.panel.receive(message);
    if (message.type === "badge") return this.badge.show(message);
    if (message.type === "snapshot") return this.restore(message);
    if (message.type === "invalid") {
      if (message.run !== this.run) return;
      this.end("");
      this.answers.clear();
      this.grid.querySelectorAll(".cl-state").forEach((state) => state.replaceChildren());
      return this.say(message.message);
    }
    if (message.run !== this.run || message.seq !== this.next) {
      if (message.seq === 0 || message.seq > this.next) this.send({ type: "open" }); // one was missed
      return;
    }
    this.next = message.seq + 1;
    this.apply(message);
  }

  /** @param {any} message */
  restore({ request, events }) {
    if (!request || !events.length || events[0].run !== request.run) return; // nothing was run yet
    if (this.running && request.run !== this.run && this.next === 0) return; // ours is on its way
    if (!this.prompt.value) {
      this.prompt.value = request.prompt;
      this.system.value = request.system ?? "";
    }
    this.show(request.run, request.columns);
    for (const event of events) {
      this.apply(event);
      this.next = event.seq + 1;
    }
  }

  // ---- what is shown

  /** Clear the columns for a run. @param {string} run @param {string[]} chosen */
  show(run, chosen) {
    Object.assign(this, { run, next: 0, running: true });
    this.say("");
    this.answers.clear();
    for (const [id, view] of this.views) {
      const asked = chosen.includes(id);
      view.section.hidden = !asked;
      view.answer.replaceChildren();
      view.figures.replaceChildren();
      view.error.hidden = true;
      view.following = true;
      if (asked) this.answers.set(id, { state: "waiting", text: "", loadS: null, tokens: 0, beganMs: 0, figures: null });
      view.state.textContent = asked ? "waits for its turn" : "";
    }
    this.jump.hidden = true;
    this.runButton.disabled = true;
    this.stopButton.disabled = false;
    this.note.textContent = "running\u2026";
    this.announce("Run started");
  }

  /** @param {any} event */
  apply(event) {
    const answer = this.answers.get(event.column), view = this.views.get(event.column);
    if (event.type === "waits") this.note.textContent = "waits for another lab of this kernel\u2026";
    if (event.type === "over") return this.over(event.stopped);
    if (!answer || !view) return;
    const name = this.nameOf(event.column);
    if (event.type === "began") {
      this.note.textContent = `running ${name}\u2026`;
      this.setState(event.column, "loading", "loading");
    } else if (event.type === "ready") {
      answer.loadS = event.load_s;
      this.setState(event.column, "reading", "reads the request");
    } else if (event.type === "delta") {
      const more = event.texts.join(""), now = performance.now();
      answer.text += more;
      answer.tokens += event.texts.length;
      answer.beganMs ||= now;
      view.answer.append(document.createTextNode(visible(more)));
      this.follow(view);
      const tookS = (now - answer.beganMs) / 1000;
      this.setState(event.column, "answering",
        tookS > 0.3 ? `answers, ${Math.round(answer.tokens / tookS).toLocaleString("en")} tokens/s` : "answers");
    } else if (event.type === "ended") {
      answer.figures = event;
      this.setState(event.column, "ended", FINISH[event.finish] ?? event.finish);
      this.showFigures(event.column);
      this.markDifferences();
      this.announce(`${name} ${FINISH[event.finish] ?? event.finish}`);
    } else if (event.type === "refused") {
      this.setState(event.column, "refused", "error");
      view.error.textContent = event.message;
      view.error.hidden = false;
      this.announce(`${name}: ${event.message}`);
    }
  }

  /**
   * Show the end of an answer, unless the reader scrolled up; once a frame, when the page is laid
   * out anyway.
   * @param {View} view
   */
  follow(view) {
    if (!view.following || view.frame) return;
    view.frame = requestAnimationFrame(() => {
      view.frame = 0;
      view.answer.scrollTop = view.answer.scrollHeight;
    });
  }

  /** @param {string} id @param {Answer["state"]} state @param {string} words */
  setState(id, state, words) {
    const answer = this.answers.get(id), view = this.views.get(id);
    if (!answer || !view) return;
    answer.state = state;
    view.state.textContent = words;
  }

  /** @param {boolean} stopped */
  over(stopped) {
    for (const [id, answer] of this.answers) {
      if (!["ended", "refused"].includes(answer.state)) this.setState(id, "left out", "stopped before it answered");
    }
    this.end(stopped ? "stopped" : "done");
    this.announce(stopped ? "Run stopped" : "Run done");
    this.markDifferences();
  }

  /** @param {string} words */
  end(words) {
    this.running = false;
    this.note.textContent = words;
    this.stopButton.disabled = true;
    this.runButton.disabled = this.detached;
    this.link.settle();
  }

  /** @param {string} id */
  showFigures(id) {
    const { figures, loadS } = /** @type {Answer} */ (this.answers.get(id));
    const rows = [
      ["first token", inTime(figures.ttft_s)],
      ["tokens/s", figures.tokens_per_s === null ? "\u2013" : Math.round(figures.tokens_per_s).toLocaleString("en")],
      ["tokens", `${figures.tokens} after ${figures.prompt_tokens}`],
      ["peak memory", inBytes(figures.peak_rss_bytes)],
      ["bundle", inBytes(figures.bundle_bytes)],
      ["start", loadS === null ? "warm" : `cold, ${inTime(loadS)} to load`],
    ];
    this.views.get(id)?.figures.replaceChildren(
      ...rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }

  /**
   * Mark where each answer parts from the highest tier's that ended; and in that one, where they do.
   * A stopped answer is compared as far as it goes.
   */
  markDifferences() {
    const ended = [...this.answers].filter(([, answer]) => answer.state === "ended");
    if (ended.length < 2) return;
    const [[firstId, first], ...others] = ended;
    /** @type {Map<number, string[]>} */
    const inFirst = new Map();
    let same = 0;
    for (const [id, answer] of others) {
      const at = parting(first.text, answer.text);
      const cut = answer.figures.finish !== "end" && at === answer.text.length;
      if (at === Math.max(first.text.length, answer.text.length) || cut) {
        same += 1;
        this.showMarks(id, answer.text, []);
        this.setState(id, "ended", `${FINISH[answer.figures.finish] ?? answer.figures.finish}; as ${this.nameOf(firstId)}`);
        continue;
      }
      this.showMarks(id, answer.text, [[at, `${this.nameOf(id)} parts from ${this.nameOf(firstId)} here`]]);
      inFirst.set(at, [...(inFirst.get(at) ?? []), this.nameOf(id)]);
    }
    this.showMarks(firstId, first.text, [...inFirst].sort((a, b) => a[0] - b[0])
      .map(([at, names]) => [at, `${names.join(", ")} ${names.length > 1 ? "part" : "parts"} here`]));
    this.jump.hidden = same === others.length;
    this.differences.textContent = same === others.length ? "" :
      `${others.length - same} of ${others.length} part from ${this.nameOf(firstId)}; [ and ] jump`;
  }

  /** @param {string} id @param {string} text @param {[number, string][]} marks in order */
  showMarks(id, text, marks) {
    const nodes = [];
    let at = 0;
    for (const [from, label] of marks) {
      const begin = Math.max(at, from), to = Math.max(begin, wordEnd(text, from));
      nodes.push(document.createTextNode(visible(text.slice(at, begin))));
      nodes.push(h("mark", { tabindex: "-1", title: label, "aria-label": `${label}: ${visible(text.slice(begin, to)) || "the end"}`, role: "mark" },
        visible(text.slice(begin, to)) || "\u23f9"));
      at = to;
    }
    nodes.push(document.createTextNode(visible(text.slice(at))));
    this.views.get(id)?.answer.replaceChildren(...nodes);
  }

  /** @param {string} id */
  nameOf(id) {
    return this.columns.find((column) => column.id === id)?.name ?? id;
  }

  /** Show a sentence, or none. @param {string} words */
  say(words) {
    this.alert.hidden = !words;
    this.alert.textContent = words;
  }

  /** @param {string} words */
  announce(words) {
    this.announced.textContent = words;
  }
}

export default {
  /** @param {{model: any, el: HTMLElement}} context */
  render(context) {
    const lab = new Lab(context);
    return () => lab.dispose();
  },
};
