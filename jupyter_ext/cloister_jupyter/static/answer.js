// An answer as it is shown: a column's, or below it that of a branch.

/** The parts that a page shows of one answer, and what it knows of it. */
class AnswerView {
  /**
   * @param {any} lab
   * @param {string} id
   * @param {string} name
   * @param {AnswerView | null} [parent] the answer that this one leaves
   * @param {number} [at] number of the token at which it does
   */
  constructor(lab, id, name, parent = null, at = 0) {
    Object.assign(this, { lab, id, name, parent, at });
    this.title = h(parent ? "h4" : "h3", { id: `t${id}-${lab.uid}` }, parent ? "Branch" : name);
    this.stateText = h("span", { class: "cl-state" });
    this.strip = h("div", { class: "cl-strips" });
    this.by = h("p", { class: "cl-by", hidden: true });
    this.answer = h("div", { class: "cl-answer", "aria-live": "off", tabindex: "0", dir: "auto", role: "group",
      "aria-label": parent ? `Branch of ${name}` : `Answer of ${name}` });
    this.error = h("p", { class: "cl-error", hidden: true });
    this.figures = h("dl", { class: "cl-figures" });
    this.compared = h("div", { hidden: true });
    this.branches = h("div", { class: "cl-branches" });
    const header = h("header", {}, this.title, this.stateText);
    const parts = [this.strip, this.by, this.answer, this.error, this.compared, this.figures];
    this.section = h("section", { class: parent ? "cl-branch" : "cl-column", "aria-labelledby": this.title.id },
      header, ...(parent ? parts : [h("div", { class: "cl-beside" }, h("div", { class: "cl-original" }, ...parts), this.branches)]));
    this.tokens = new Tokens(this);
    this.answer.addEventListener("scroll", () => {
      this.following = this.answer.scrollTop + this.answer.clientHeight > this.answer.scrollHeight - 8;
    });
    this.frame = 0;
    this.clear();
  }

  /** Forget everything: another run begins. */
  clear() {
    /** @type {"waiting" | "loading" | "reading" | "answering" | "ended" | "refused" | "left out"} */
    this.state = "waiting";
    this.text = "";
    /** @type {string[]} texts of the tokens */
    this.texts = [];
    /** @type {number | null} */
    this.loadS = null;
    this.beganMs = 0;
    /** @type {any} */
    this.ended = null;
    /** @type {[number, string][]} */
    this.marks = [];
    this.following = true;
    this.tokens.clear();
    this.error.hidden = this.by.hidden = this.compared.hidden = true;
    for (const part of [this.answer, this.figures, this.strip, this.branches, this.compared]) part.replaceChildren();
  }

  /** @param {AnswerView["state"]} state @param {string} words */
  setState(state, words) {
    this.state = state;
    this.stateText.textContent = words;
  }

  /** What becomes of the answer by an event of the run. @param {any} event */
  apply(event) {
    if (event.type === "began") this.setState("loading", "loading");
    else if (event.type === "ready") {
      this.loadS = event.load_s;
      this.setState("reading", "reads the request");
    } else if (event.type === "delta") this.add(event.texts);
    else if (event.type === "ended") {
      this.ended = event;
      this.rendered = false; // as tokens, where these are wanted
      this.setState("ended", FINISH[event.finish] ?? event.finish);
      this.showFigures();
      if (this.parent) this.label();
    } else if (event.type === "refused") {
      this.setState("refused", "error");
      this.fail(event.message);
    } else if (event.type === "scored") this.tokens.score(event);
    else if (event.type === "unscored") this.tokens.unscored(event.message);
  }

  /** Whether the tokens are known: of an answer that was kept only the text is. */
  get whole() {
    return this.ended !== null && this.texts.length === this.ended.tokens;
  }

  /** @param {string} words */
  fail(words) {
    this.error.textContent = words;
    this.error.hidden = false;
  }

  /** @param {string[]} texts */
  add(texts) {
    const more = texts.join(""), now = performance.now();
    this.text += more;
    this.texts.push(...texts);
    this.beganMs ||= now;
    this.answer.append(document.createTextNode(visible(more)));
    this.follow();
    const tookS = (now - this.beganMs) / 1000;
    this.setState("answering",
      tookS > 0.3 ? `answers, ${Math.round(this.texts.length / tookS).toLocaleString("en")} tokens/s` : "answers");
  }

  /** Show the end of the answer, unless the reader scrolled up; once a frame. */
  follow() {
    if (!this.following || this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.answer.scrollTop = this.answer.scrollHeight;
    });
  }

  /** Say where a branch leaves the answer before it, and mark the place. */
  label() {
    const word = (/** @type {string | undefined} */ text) => `\u201c${visible(text ?? "").trim() || "\u25a0"}\u201d`;
    const before = /** @type {AnswerView} */ (this.parent);
    this.title.textContent = `Branch at token ${this.at + 1}: ${word(this.texts[this.at])} for ${word(before.texts[this.at])}`;
    this.answer.setAttribute("aria-label", `${this.name}: ${this.title.textContent}`);
    const from = this.texts.slice(0, this.at).join("").length;
    this.mark([[from, "another token was forced here"]]);
  }

  showFigures() {
    const figures = this.ended, given = figures.forced_tokens;
    const rows = [
      ["first token", inTime(figures.ttft_s)],
      ["tokens/s", figures.tokens_per_s === null ? "\u2013" : Math.round(figures.tokens_per_s).toLocaleString("en")],
      ["tokens", `${figures.tokens} after ${figures.prompt_tokens}${given ? `, ${given} of them given` : ""}`],
      ["peak memory", inBytes(figures.peak_rss_bytes)],
      ["bundle", inBytes(figures.bundle_bytes)],
      ["start", this.loadS === null ? "warm" : `cold, ${inTime(this.loadS)} to load`],
    ];
    this.figures.replaceChildren(
      ...rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }

  /** Show how far the answer goes with that of another column. @param {AnswerView} reference */
  agree(reference) {
    if (this.strip.firstChild || !this.whole || !reference.whole) return;
    const picture = agreement(reference.texts, this.texts, reference.name);
    this.strip.replaceChildren(...(picture ? [picture] : []));
  }

  /** Show how the answer differs from what was expected, if anything was. @param {string} expected */
  compare(expected) {
    const shown = expected.trim() !== "" && this.state === "ended";
    this.compared.hidden = !shown;
    this.compared.replaceChildren(...(shown ? [comparison(expected, this.text)] : []));
  }

  /** Mark places, each with words for it; in order. @param {[number, string][]} marks */
  mark(marks) {
    const same = this.rendered && String(marks) === String(this.marks);
    this.marks = marks;
    if (!same) this.render();
  }

  /** Show the answer's text, or its tokens where these are wanted. */
  render() {
    this.rendered = true;
    if (this.lab.tokens && this.whole) return this.tokens.show();
    this.tokens.hide();
    const nodes = [];
    let at = 0;
    for (const [from, label] of this.marks) {
      const begin = Math.max(at, from), to = Math.max(begin, wordEnd(this.text, from));
      nodes.push(document.createTextNode(visible(this.text.slice(at, begin))));
      nodes.push(h("mark", { tabindex: "-1", title: label, "aria-label": `${label}: ${visible(this.text.slice(begin, to)) || "the end"}`, role: "mark" },
        visible(this.text.slice(begin, to)) || "\u23f9"));
      at = to;
    }
    nodes.push(document.createTextNode(visible(this.text.slice(at))));
    this.answer.replaceChildren(...nodes);
  }
}
