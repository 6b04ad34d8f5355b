// The prompt lab's page: a request on top, one column a tier below; see lab.py for the messages.
// One module with the files that stand before it.
//
// Nothing is loaded from anywhere. What was typed or answered becomes text nodes only, never markup,
// and leaves this page in custom messages only: no synced trait, no storage, no URL holds it.

/** @typedef {{id: string, name: string}} Column */

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
    this.tokens = false; // whether answers are shown as tokens
    this.work = "run"; // what is going on, or was last
    /** @type {Map<string, AnswerView>} of the run at hand: columns, and branches after them */
    this.answers = new Map();
    /** @type {Map<string, AnswerView>} of all columns */
    this.views = new Map();
    this.popover = new Popover(this);
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
    this.badge = new Badge(this);
    this.sampling = new Sampling();
    this.alert = h("div", { class: "cl-alert", role: "alert", hidden: true });
    this.prompt = this.textArea("prompt", 3, "A request, for every tier that is chosen");
    this.system = this.textArea("system", 1, "none");
    this.toggles = h("div", { class: "cl-toggles", role: "group", "aria-label": "Tiers" });
    this.expected = this.textArea("expected", 1, "optional: what each answer is compared with");
    this.expected.addEventListener("input", () => {
      clearTimeout(this.comparing);
      this.comparing = setTimeout(() => this.answers.forEach((view) => view.compare(this.expected.value)), 200);
    });
    this.grid = h("div", { class: "cl-columns" });
    for (const column of this.columns) this.addColumn(column);
    this.jump = h("div", { class: "cl-jump", hidden: true },
      h("button", { type: "button", onclick: () => this.jumpBy(-1), "aria-keyshortcuts": "[" }, "\u2190 difference"),
      h("button", { type: "button", onclick: () => this.jumpBy(1), "aria-keyshortcuts": "]" }, "difference \u2192"),
      this.differences = h("span", { class: "cl-note" }));
    this.panels = PANELS.map((Panel) => ({ name: Panel.panel, title: Panel.title, panel: new Panel(this) }));
    const asked = h("div", { class: "cl-asked" }, this.prompt);
    this.files = new Files(this, asked);
    asked.append(this.files.element);
    this.main = h("div", {},
      h("div", { class: "cl-request" },
        h("label", { for: this.prompt.id }, "Prompt"), asked,
        h("label", { for: this.system.id }, "System prompt"),
        h("div", { class: "cl-system" }, ...this.taskPicker(), this.system),
        h("label", { for: this.expected.id }, "Expected answer"), this.expected,
        h("span", { class: "cl-label" }, "Tiers"), this.toggles),
      this.sampling.element, h("div", { class: "cl-views" }, ...this.tokenView(), this.jump), this.grid);
    this.root = h("section", {
      class: "cloister-lab", "aria-label": "Prompt lab", "data-lm-suppress-shortcuts": "true",
      "data-jp-suppress-context-menu": "true",
      onkeydown: (/** @type {KeyboardEvent} */ event) => this.onKey(event),
    },
      h("div", { class: "cl-toolbar", role: "toolbar", "aria-label": "Run and stop" },
        this.runButton, this.stopButton, this.note,
        this.badge.element),
      this.alert, ...this.tabs(), this.announced, this.popover.element);
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
      id: `${name}-${this.uid}`, rows, placeholder,
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

  /** The switch that shows tokens, and what their background tells. */
  tokenView() {
    const legend = h("span", { class: "cl-legend cl-note", hidden: true });
    this.measure = /** @type {HTMLSelectElement} */ (h("select", { "aria-label": "Background of tokens", hidden: true,
      onchange: () => {
        legend.textContent = MEASURES[this.measure.value].legend;
        this.answers.forEach((view) => view.tokens.paint(0, view.texts.length));
      } }, ...Object.entries(MEASURES).map(([name, { label }]) => h("option", { value: name }, label))));
    legend.textContent = MEASURES.rank.legend;
    const button = h("button", { type: "button", "aria-pressed": "false", onclick: () => {
      this.tokens = !this.tokens;
      button.setAttribute("aria-pressed", String(this.tokens));
      this.measure.hidden = legend.hidden = !this.tokens;
      this.popover.hide();
      this.answers.forEach((view) => { if (view.ended) view.render(); });
      if (this.tokens) this.score();
    } }, "Tokens");
    return [button, this.measure, legend];
  }

  /** @param {Column} column */
  addColumn(column) {
    const chosen = h("input", { type: "checkbox", value: column.id, checked: true,
      onchange: () => { section.hidden = !chosen.checked && !this.answers.has(column.id); } });
    this.toggles.append(h("label", { class: "cl-toggle" }, chosen, column.name));
    const view = new AnswerView(this, column.id, column.name), { section } = view;
    this.grid.append(section);
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
    const chosen = [...this.toggles.querySelectorAll("input:checked")].map((box) => box.value);
    // Before the answers that are shown are cleared; the kernel would say the same.
    if (this.files.reading) return this.say("A file is still being read; run again in a moment.");
    if (!prompt && !this.files.held.length) return this.say("There is no prompt; type one first.");
    if (!chosen.length) return this.say("No tier is chosen; choose at least one.");
    const settings = this.sampling.values();
    if (!settings) return;
    const run = newId();
    this.show(run, chosen);
    this.link.ask({ type: "run", run, columns: chosen, prompt, media: this.files.ids, system: this.system.value || null, ...settings });
  }

  stop() {
    if (!this.running) return;
    this.note.textContent = "stopping\u2026 (once more ends the model's process)";
    this.link.ask({ type: "stop", run: this.run });
  }

  /** Ask how likely each token was, unless that is known. */
  score() {
    const open = [...this.answers.values()].some((view) => view.texts.length > view.tokens.scores.own.length
      || !view.tokens.why && view.id.split(".")[0] !== this.reference() && view.texts.length > view.tokens.scores.higher.length);
    if (!open || this.running || this.detached) return;
    this.resume("scores", "Scoring");
    this.send({ type: "score", run: this.run });
  }

  /** The highest column that answered: its model scores the others' tokens. */
  reference() {
    return [...this.answers.values()].find((view) => view.texts.length)?.id;
  }

  /** Go on from an answer with another token. @param {AnswerView} view @param {number} at @param {number} id */
  branch(view, at, id) {
    if (this.detached) return;
    if (this.running) return this.say("A run is going on; stop it first.");
    this.say("");
    this.popover.hide();
    view.tokens.elements[at]?.focus({ preventScroll: true });
    this.popover.hide();
    this.resume("branch", "Branch");
    this.link.ask({ type: "branch", run: this.run, parent: view.id, at, id });
  }

  /** Move the focus to the next mark, or to the one before. @param {number} step */
  jumpBy(step) {
    const marks = [...this.grid.querySelectorAll("mark, .cl-parts")];
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
    if (message.type === "unattached") return this.files.refused(message);
    if (message.type === "likeliest") return message.run === this.run && this.popover.receive(message);
    if (message.type === "snapshot") return this.restore(message);
    if (message.type === "invalid") {
      if (message.about === "probe") return this.say(message.message);
      if (message.run !== this.run) return;
      if (message.about !== "likeliest") this.end("");
      if (message.about !== "run") return this.say(message.message);
      this.answers.clear();
      this.views.forEach((view) => view.setState("waiting", ""));
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
    Object.assign(this, { run, next: 0, running: true, work: "run" });
    this.say("");
    this.popover.hide();
    this.answers.clear();
    for (const [id, view] of this.views) {
      const asked = chosen.includes(id);
      view.section.hidden = !asked;
      view.clear();
      if (asked) this.answers.set(id, view);
      view.setState("waiting", asked ? "waits for its turn" : "");
    }
    this.jump.hidden = true;
    this.resume("run", "Run");
  }

  /** More is told from now on. @param {"run" | "branch" | "scores"} work @param {string} name */
  resume(work, name) {
    Object.assign(this, { running: true, work });
    this.runButton.disabled = true;
    this.stopButton.disabled = false;
    this.note.textContent = work === "scores" ? "scoring\u2026" : "running\u2026";
    this.announce(`${name} started`);
  }

  /** @param {any} event */
  apply(event) {
    if (event.type === "waits") this.note.textContent = "waits: this kernel asks something else, in this lab or another\u2026";
    if (event.type === "over") return this.over(event.stopped);
    if (event.type === "resumed") return this.resume(event.scores ? "scores" : "branch", event.scores ? "Scoring" : "Branch");
    if (event.type === "branched") return this.addBranch(event);
    const view = this.answers.get(event.column);
    if (!view) return;
    view.apply(event);
    if (event.type === "began") this.note.textContent = `running ${view.name}\u2026`;
    else if (event.type === "ended") {
      this.markDifferences();
      if (!view.rendered) view.render();
      view.compare(this.expected.value);
      this.announce(`${view.name} ${FINISH[event.finish] ?? event.finish}`);
    } else if (event.type === "refused" || event.type === "unscored") this.announce(`${view.name}: ${event.message}`);
  }

  /** @param {{column: string, parent: string, at: number}} branch */
  addBranch({ column, parent, at }) {
    const before = this.answers.get(parent), root = this.answers.get(column.split(".")[0]);
    if (!before || !root) return;
    const view = new AnswerView(this, column, root.name, before, at);
    root.branches.append(view.section);
    if (this.running) view.section.scrollIntoView({ block: "nearest" });
    this.answers.set(column, view);
  }

  /** @param {boolean} stopped */
  over(stopped) {
    for (const view of this.answers.values()) {
      if (!["ended", "refused"].includes(view.state)) view.setState("left out", "stopped before it answered");
    }
    this.end(stopped ? "stopped" : "done");
    this.announce(stopped ? "Stopped" : "Done");
    if (this.work === "scores") return;
    this.markDifferences();
    if (this.tokens && !stopped) this.score();
  }

  /** @param {string} words */
  end(words) {
    this.running = false;
    this.note.textContent = words;
    this.stopButton.disabled = true;
    this.runButton.disabled = this.detached;
    this.link.settle();
  }

  /**
   * Mark where each answer parts from the highest tier's that ended; and in that one, where they do.
   * A stopped answer is compared as far as it goes.
   */
  markDifferences() {
    const ended = [...this.answers.values()].filter((view) => view.state === "ended" && !view.parent);
    if (ended.length < 2) return;
    const [first, ...others] = ended;
    /** @type {Map<number, string[]>} */
    const inFirst = new Map();
    let same = 0;
    for (const view of others) {
      const at = parting(first.text, view.text), { finish } = view.ended;
      const cut = finish !== "end" && at === view.text.length;
      view.agree(first);
      if (at === Math.max(first.text.length, view.text.length) || cut) {
        same += 1;
        view.mark([]);
        view.setState("ended", `${FINISH[finish] ?? finish}; as ${first.name}`);
        continue;
      }
      view.mark([[at, `${view.name} parts from ${first.name} here`]]);
      inFirst.set(at, [...(inFirst.get(at) ?? []), view.name]);
    }
    first.mark([...inFirst].sort((a, b) => a[0] - b[0])
      .map(([at, names]) => [at, `${names.join(", ")} ${names.length > 1 ? "part" : "parts"} here`]));
    this.jump.hidden = same === others.length;
    this.differences.textContent = same === others.length ? "" :
      `${others.length - same} of ${others.length} part from ${first.name}; [ and ] jump`;
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
