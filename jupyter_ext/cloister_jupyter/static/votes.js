// The vote's tab: a form, then two answers side by side; see votes_panel.py for the messages.
//
// Until the names are shown the kernel does not send them, and while a vote goes on the form, which
// names the tiers, is not in the page.

const VOTES = [["left", "A is better"], ["right", "B is better"], ["tie", "Tie"], ["both bad", "Both bad"]];
const VOTE_BYTES = 1 << 20; // of all prompts; a server ends connections over large messages

class VotesPanel {
  static panel = "votes";
  static title = "Vote";

  /** @param {any} lab */
  constructor(lab) {
    this.lab = lab;
    this.uid = newId();
    this.state = "none";
    this.number = 0; // of the vote that comes next
    this.form = this.makeForm();
    this.ballot = this.makeBallot();
    this.outcome = h("div", { class: "cl-outcome" });
    this.alert = h("p", { class: "cl-alert", role: "alert", hidden: true });
    this.element = h("div", { class: "cl-votes", onkeydown: (event) => this.onKey(event) }, this.alert, this.form);
  }

  makeForm() {
    const id = (/** @type {string} */ name) => `votes-${name}-${this.uid}`;
    const area = (/** @type {string} */ name, rows, placeholder) => h("textarea", {
      id: id(name), rows, placeholder, dir: "auto",
      oninput: () => this.say("") });
    this.prompts = area("prompts", 5, "One a line; \\n in a line stands for a line break");
    this.system = area("system", 1, "none");
    this.boxes = this.lab.columns.map(({ id: value, name }) => [h("input", { type: "checkbox", value, checked: true }), name]);
    this.most = h("input", { type: "number", id: id("most"), min: 1, step: 1, value: 256 });
    this.name = h("input", { type: "text", id: id("name"), maxlength: 200, placeholder: "not kept" });
    this.kept = h("select", { id: id("kept") });
    this.beginButton = h("button", { type: "button", class: "cl-run", onclick: () => this.run() }, "Ask, then vote");
    this.keptRow = h("div", { class: "cl-votes-row", hidden: true },
      h("label", { for: this.kept.id }, "Kept votes"), this.kept,
      h("button", { type: "button", onclick: () => this.send("resume", { name: this.kept.value }) }, "Go on"),
      h("button", { type: "button", onclick: () => this.send("forget", { name: this.kept.value }) }, "Forget"));
    this.nameRow = h("div", { class: "cl-votes-row" }, h("label", { for: this.name.id }, "Keep it as"), this.name);
    this.noVault = h("span", { class: "cl-note" }, "Votes end with this kernel: the lab has no vault (PromptLab(vault=...)).");
    return h("div", { class: "cl-request" },
      h("label", { for: this.prompts.id }, "Prompts"), h("div", {}, this.prompts,
        h("button", { type: "button", onclick: () => this.send("take") }, "Add what the other tabs asked last")),
      h("label", { for: this.system.id }, "System prompt"), this.system,
      h("span", { class: "cl-label" }, "Tiers"), h("div", { class: "cl-toggles", role: "group", "aria-label": "Tiers to vote on" },
        ...this.boxes.map(([box, name]) => h("label", { class: "cl-toggle" }, box, name))),
      h("label", { for: this.most.id }, "Tokens at most"), h("div", { class: "cl-votes-row" }, this.most),
      h("span", { class: "cl-label" }, "Keeping"), h("div", {}, this.nameRow, this.noVault, this.keptRow),
      h("span"), h("div", { class: "cl-votes-row" }, this.beginButton));
  }

  makeBallot() {
    this.heading = h("h3", { tabindex: "-1" });
    this.prompt = h("div", { class: "cl-answer cl-asked", tabindex: "0", dir: "auto", role: "group", "aria-label": "Prompt" });
    this.sides = ["A", "B"].map((letter) => h("div", { class: "cl-answer", tabindex: "0", dir: "auto", role: "group", "aria-label": `Answer ${letter}` }));
    this.columns = h("div", { class: "cl-columns" }, ...this.sides.map((side, index) => h("section", {
      class: "cl-column", "aria-label": `Answer ${"AB"[index]}` }, h("header", {}, h("h4", {}, "AB"[index])), side)));
    this.buttons = VOTES.map(([vote, label], index) => h("button", { type: "button", "aria-keyshortcuts": String(index + 1),
      onclick: () => this.vote(vote) }, h("kbd", {}, String(index + 1)), ` ${label}`));
    this.undoButton = h("button", { type: "button", "aria-keyshortcuts": "u", onclick: () => this.undo() }, h("kbd", {}, "U"), " Undo");
    this.revealButton = h("button", { type: "button", onclick: () => this.send("reveal") }, "End, and show the names");
    this.stopButton = h("button", { type: "button", class: "cl-stop", onclick: () => this.stop() }, "Stop");
    this.standing = h("ul", { class: "cl-standing" });
    this.rest = h("p", { class: "cl-note" });
    this.shownPart = h("div", {}, this.prompt, this.columns);
    this.choices = h("div", { class: "cl-votes-row", role: "group", "aria-label": "Your vote" }, ...this.buttons, this.undoButton);
    return h("div", {}, this.heading, h("div", { class: "cl-votes-row" }, this.stopButton), this.shownPart, this.choices, this.standing, this.rest,
      h("div", { class: "cl-votes-row" }, this.revealButton, this.leaveButton()));
  }

  leaveButton() {
    return h("button", { type: "button", onclick: () => this.send("leave") }, "Begin another vote");
  }

  // ---- what the user does

  /** @param {KeyboardEvent} event */
  onKey(event) {
    const typing = event.target instanceof HTMLTextAreaElement || event.target instanceof HTMLInputElement;
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const vote = VOTES[Number(event.key) - 1];
    if (vote && this.state === "voting") this.vote(vote[0]);
    else if (event.key.toLowerCase() === "u" && !this.undoButton.disabled) this.undo();
    else return;
    event.preventDefault();
  }

  run() {
    if (!this.form.isConnected) return;
    const prompts = this.prompts.value.split("\n").map((line) => line.trim()).filter(Boolean)
      .map((line) => line.replaceAll("\\n", "\n"));
    const size = new TextEncoder().encode(this.prompts.value + this.system.value).length;
    if (size > VOTE_BYTES) {
      return this.say(`The prompts have ${size.toLocaleString("en")} bytes and a vote takes ${VOTE_BYTES.toLocaleString("en")}; take fewer.`);
    }
    if (!this.most.reportValidity()) return;
    this.say("");
    this.send("begin", { prompts, system: this.system.value, name: this.name.value.trim(), max_tokens: Number(this.most.value),
      columns: this.boxes.filter(([box]) => box.checked).map(([box]) => box.value) });
  }

  stop() {
    if (this.state === "asking") this.send("stop");
  }

  /** Add prompts that there are not yet. @param {string[]} prompts */
  takePrompts(prompts) {
    if (!prompts.length) return this.say("Nothing was asked under the other tabs yet.");
    const lines = [...this.prompts.value.split("\n"), ...prompts.map((prompt) => prompt.trim().replaceAll("\n", "\\n"))];
    this.prompts.value = [...new Set(lines.map((line) => line.trim()).filter(Boolean))].join("\n");
  }

  /** @param {string} vote */
  vote(vote) {
    this.send("vote", { number: this.number, vote });
  }

  undo() {
    this.send("undo");
  }

  /** @param {string} kind @param {any} [values] */
  send(kind, values = {}) {
    this.lab.send({ type: `votes.${kind}`, ...values });
  }

  // ---- what the kernel says

  /** @param {any} message */
  receive(message) {
    const kind = message.type.slice("votes.".length);
    if (kind === "invalid") return this.say(message.message);
    if (kind === "kept") return this.showKept(message);
    if (kind === "taken") return this.takePrompts(message.prompts);
    this.say("");
    const held = this.element.contains(document.activeElement) || document.activeElement === document.body;
    const before = this.state;
    this.state = kind === "revealed" ? kind : message.state;
    const part = this.state === "none" ? this.form : this.state === "revealed" ? this.outcome : this.ballot;
    if (!part.isConnected) this.element.replaceChildren(this.alert, part);
    if (this.state === "revealed") this.showOutcome(message);
    else if (this.state !== "none") this.showBallot(message);
    // What had the focus is gone or disabled: the next key must not go to the notebook.
    if (before !== this.state && held && !this.element.closest("[hidden]")) {
      (this.state === "none" ? this.prompts : this.element.querySelector("h3"))?.focus();
    }
  }

  /** @param {{vault: boolean, names: string[]}} kept */
  showKept({ vault, names }) {
    this.nameRow.hidden = !vault;
    this.noVault.hidden = vault;
    this.keptRow.hidden = !names.length;
    this.kept.replaceChildren(...[...names].reverse().map((name) => h("option", { value: name }, visible(name))));
  }

  /** @param {any} state */
  showBallot(state) {
    const asking = this.state === "asking", voting = this.state === "voting";
    this.number = state.voted;
    this.heading.textContent = asking ? `Asking ${state.tiers} tiers: ${state.asked} of ${state.total} answers`
      : voting ? `Pair ${state.voted + 1} of ${state.pairs}: which answer is better?` : `All ${state.pairs} pairs are voted on`;
    this.stopButton.hidden = !asking;
    this.shownPart.hidden = !voting;
    this.choices.hidden = asking;
    for (const button of this.buttons) button.disabled = !voting;
    this.undoButton.disabled = asking || !state.voted;
    this.revealButton.hidden = asking;
    this.standing.replaceChildren(...(state.standing ?? []).map((words) => h("li", {}, words)));
    this.rest.textContent = asking ? "" : [
      state.same ? `${state.same} pairs had equal answers and are not shown.` : "",
      state.lacking ? `${state.lacking} pairs lack an answer.` : ""].join(" ");
    if (!voting) return this.lab.announce(this.state === "over" ? this.heading.textContent : "");
    this.prompt.textContent = visible(state.prompt);
    [state.left, state.right].forEach((text, index) => {
      this.sides[index].textContent = visible(text) || "(empty)";
      this.sides[index].scrollTop = 0;
    });
    this.lab.announce(`Pair ${state.voted + 1} of ${state.pairs}`);
  }

  /** @param {any} message */
  showOutcome({ outcome, reasons, took, votes, lacking }) {
    const cell = (/** @type {any} */ text) => h("td", {}, String(text));
    const table = (caption, head, rows) => h("table", {}, h("caption", {}, caption),
      h("thead", {}, h("tr", {}, ...head.map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, ...rows));
    this.outcome.replaceChildren(
      h("h3", { tabindex: "-1" }, "The names"),
      h("ul", {}, ...outcome.map((words) => h("li", {}, words)),
        ...Object.entries(reasons).map(([name, words]) => h("li", {}, `${name} was not asked to the end: ${words}`))),
      h("p", { class: "cl-note" }, lacking ? `${lacking} pairs lack an answer.` : ""),
      table("What the answers took", ["tier", "first token, median", "tokens/s, median", "peak memory"],
        Object.entries(took).map(([name, each]) => h("tr", {}, h("th", { scope: "row" }, name), cell(inTime(each.ttft_s)),
          cell(each.tokens_per_s === null ? "–" : Math.round(each.tokens_per_s).toLocaleString("en")), cell(inBytes(each.peak_rss_bytes))))),
      h("details", {}, h("summary", {}, `The ${votes.length} votes`), h("div", { class: "cl-scroll", tabindex: "0", role: "region", "aria-label": "The votes" },
        table("Votes in order", ["prompt", "A", "B", "vote"], votes.map((each) => h("tr", {},
          h("th", { scope: "row", dir: "auto" }, visible(each.prompt)), cell(each.left), cell(each.right),
          cell(VOTES.find(([vote]) => vote === each.vote)?.[1] ?? each.vote)))))),
      h("div", { class: "cl-votes-row" }, this.leaveButton()));
    this.lab.announce(outcome.join(" "));
  }

  /** @param {string} words */
  say(words) {
    this.alert.hidden = !words;
    this.alert.textContent = words;
  }
}
PANELS.push(VotesPanel);
