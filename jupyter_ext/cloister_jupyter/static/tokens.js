// An answer as its tokens: how likely each was, and what else might have stood in its place.

const LEVELS = 5; // of a token's background
const MEASURES = {
  rank: { label: "rank", legend: "number: how many tokens were likelier, and itself; none: it was the likeliest",
    level: (/** @type {any} */ t) => [2, 4, 11, 101].filter((bound) => t.rank >= bound).length,
    number: (/** @type {any} */ t) => (t.rank > 1 ? t.rank.toLocaleString("en") : "") },
  probability: { label: "probability", legend: "number: probability in percent",
    level: (/** @type {any} */ t) => [0.5, 0.2, 0.05, 0.01].filter((bound) => Math.exp(t.logprob) < bound).length,
    number: (/** @type {any} */ t) => percent(t.logprob) },
  divergence: { label: "divergence", legend: "number: how much likelier it was to the answer's own tier, in nats",
    level: (/** @type {any} */ t) => [0.1, 0.7, 2, 4].filter((bound) => t.own - t.logprob >= bound).length,
    number: (/** @type {any} */ t) => (Math.abs(t.own - t.logprob) >= 0.1 ? (t.own - t.logprob).toFixed(1) : "") },
};
const PART = 200; // tokens that are laid out at a time

/** @param {number} logprob */
function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 10 ? share.toFixed(0) : share >= 0.1 ? share.toFixed(1) : "<0.1";
}

/** The tokens of one answer; a view of the lab shows them where they are wanted. */
class Tokens {
  /** @param {any} view */
  constructor(view) {
    this.view = view;
    this.lab = view.lab;
    this.clear();
    const of = (/** @type {Event} */ event) => /** @type {HTMLElement | null} */ (
      /** @type {HTMLElement} */ (event.target).closest?.(".cl-token"));
    const on = (/** @type {string} */ type, /** @type {(token: HTMLElement, event: any) => void} */ act) =>
      view.answer.addEventListener(type, (/** @type {Event} */ event) => {
        const token = of(event);
        if (token) act(token, event);
      });
    on("mouseover", (token) => this.lab.popover.soon(this, Number(token.dataset.at)));
    on("mouseout", () => this.lab.popover.leave());
    on("focusin", (token) => this.focused(Number(token.dataset.at)));
    on("focusout", () => this.lab.popover.leave());
    on("click", (token) => token.focus());
    on("keydown", (token, event) => this.onKey(Number(token.dataset.at), event));
  }

  clear() {
    /** @type {HTMLElement[]} */
    this.elements = [];
    this.at = 0; // the one that Tab reaches
    /** @type {{own: any[], higher: any[]}} */
    this.scores = { own: [], higher: [] };
    this.by = ""; // name of the higher column, where that scored
    this.why = ""; // it did not
    /** @type {Map<number, any>} */
    this.likeliest = new Map();
    this.work = 0;
  }

  hide() {
    clearTimeout(this.work);
    this.elements = [];
    this.view.by.hidden = true;
  }

  /** Take up how likely some tokens are. @param {any} event */
  score({ by, column, at, logprobs, ranks }) {
    const own = by === column.split(".")[0];
    if (!own) this.by = this.lab.views.get(by).name;
    const into = own ? this.scores.own : this.scores.higher;
    logprobs.forEach((/** @type {number} */ logprob, /** @type {number} */ index) => {
      into[at + index] = { logprob, rank: ranks[index] };
    });
    this.paint(at, at + logprobs.length);
    this.explain();
  }

  /** @param {string} why */
  unscored(why) {
    this.why = why;
    this.explain();
  }

  /** Show the tokens in place of the text, some at a time. */
  show() {
    this.hide();
    const { view } = this, marks = new Map();
    let offset = 0;
    view.texts.forEach((/** @type {string} */ text, /** @type {number} */ index) => {
      for (const [from, label] of view.marks) if (from >= offset && from < offset + Math.max(1, text.length)) marks.set(index, label);
      offset += text.length;
    });
    view.answer.replaceChildren();
    const lay = (/** @type {number} */ from) => {
      const part = view.texts.slice(from, from + PART).map((/** @type {string} */ text, /** @type {number} */ index) => {
        const at = from + index, label = marks.get(at);
        return h("span", { class: `cl-token${label ? " cl-parts" : ""}`, role: "button", "data-at": at, title: label,
          tabindex: at === this.at ? "0" : "-1" }, this.shown(at));
      });
      this.elements.push(...part);
      view.answer.append(...part);
      this.paint(from, from + part.length);
      if (from + PART < view.texts.length) this.work = setTimeout(() => lay(from + PART));
    };
    lay(0);
    this.explain();
  }

  /** A token as it is shown. @param {number} at */
  shown(at) {
    const text = this.view.texts[at];
    if (text) return visible(text).replaceAll("\n", "\u21b5\n");
    return at === this.view.texts.length - 1 && this.view.ended.finish === "end" ? "\u25a0" : "\u25cc"; // part of a character
  }

  /** What is known of a token: by the higher column where that scored it, else by its own. @param {number} at */
  known(at) {
    const own = this.scores.own[at];
    return own && { own: own.logprob, ...(this.scores.higher[at] ?? own) };
  }

  /** Give some tokens their background and number. @param {number} from @param {number} to */
  paint(from, to) {
    const measure = MEASURES[this.lab.measure.value];
    for (let at = from; at < Math.min(to, this.elements.length); at++) {
      const known = this.known(at), element = this.elements[at];
      if (!known) continue;
      const number = measure.number(known);
      element.dataset.level = String(measure.level(known));
      element.dataset.number = number;
      element.setAttribute("aria-label", `${this.shown(at)}${number ? `, ${measure.label} ${number}` : ""}`);
    }
  }

  /** Say by which model the numbers are. */
  explain() {
    const { by } = this.view, own = this.view.name;
    by.hidden = !this.elements.length;
    const scored = this.scores.higher.length, part = scored < this.view.texts.length;
    by.textContent = this.why || (!scored ? `as ${own} itself sees it` : `as ${this.by} sees it`
      + (part ? ` up to token ${scored}, from there as ${own} itself does` : ""));
  }

  /** @param {number} at */
  focused(at) {
    this.elements[this.at]?.setAttribute("tabindex", "-1");
    this.at = at;
    this.elements[at].setAttribute("tabindex", "0");
    this.lab.popover.show(this, at);
  }

  /** @param {number} at @param {KeyboardEvent} event */
  onKey(at, event) {
    const last = this.elements.length - 1;
    const to = { ArrowRight: Math.min(at + 1, last), ArrowLeft: Math.max(at - 1, 0), Home: 0, End: last }[event.key];
    if (to !== undefined && !event.ctrlKey && !event.metaKey) this.elements[to].focus();
    else if (["ArrowDown", "Enter", " "].includes(event.key) && !event.ctrlKey && !event.metaKey) this.lab.popover.enter();
    else if (event.key === "Escape" && this.lab.popover.shown) this.lab.popover.hide();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

/** What else might have stood in a token's place; one for the lab, beside the token at hand. */
class Popover {
  /** @param {any} lab */
  constructor(lab) {
    this.lab = lab;
    /** @type {Tokens | null} */
    this.tokens = null;
    this.at = 0;
    this.timer = 0;
    this.element = h("div", { class: "cl-popover", id: `popover-${lab.uid}`, role: "group", "aria-label": "Likeliest tokens", hidden: true,
      onmouseenter: () => clearTimeout(this.timer), onmouseleave: () => this.leave(),
      onfocusin: () => clearTimeout(this.timer), onfocusout: () => this.leave(),
      onkeydown: (/** @type {KeyboardEvent} */ event) => this.onKey(event) });
  }

  get shown() {
    return !this.element.hidden;
  }

  /** Show it if the pointer stays. @param {Tokens} tokens @param {number} at */
  soon(tokens, at) {
    clearTimeout(this.timer);
    if (!this.element.contains(document.activeElement)) this.timer = setTimeout(() => this.show(tokens, at), 80);
  }

  /** Hide it soon, unless it is come back to. */
  leave() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      const focus = document.activeElement;
      if (this.element.contains(focus)) return;
      const token = this.tokens?.elements.indexOf(/** @type {HTMLElement} */ (focus)) ?? -1;
      if (token >= 0) this.show(/** @type {Tokens} */ (this.tokens), token);
      else this.hide();
    }, 250);
  }

  hide() {
    clearTimeout(this.timer);
    this.tokens?.elements[this.at]?.removeAttribute("aria-describedby");
    this.element.hidden = true;
    this.tokens = null;
  }

  /** @param {Tokens} tokens @param {number} at */
  show(tokens, at) {
    if (!tokens.elements[at]?.isConnected) return;
    this.hide();
    [this.tokens, this.at] = [tokens, at];
    tokens.elements[at].setAttribute("aria-describedby", this.element.id);
    this.element.hidden = false;
    if (!this.fill()) this.lab.send({ type: "likeliest", run: this.lab.run, column: tokens.view.id, start: Math.max(0, at - 8) });
    this.place();
  }

  /** Take up what the kernel tells of some tokens. @param {any} message */
  receive({ column, at, rows }) {
    const tokens = this.lab.answers.get(column)?.tokens;
    rows.forEach((/** @type {any} */ row, /** @type {number} */ index) => tokens?.likeliest.set(at + index, row));
    if (tokens && tokens === this.tokens && !this.element.contains(document.activeElement)) {
      this.fill();
      this.place();
    }
  }

  /** Fill it; whether all that it shows is known. */
  fill() {
    const { tokens, at } = this, row = tokens?.likeliest.get(at);
    if (!tokens) return true;
    const { view } = tokens, own = tokens.scores.own[at], higher = tokens.scores.higher[at];
    const words = (/** @type {any} */ score) => `${percent(score.logprob)} %, rank ${score.rank.toLocaleString("en")}`;
    const line = (/** @type {string} */ name, /** @type {any} */ score) => (score ? [h("dt", {}, name), h("dd", {}, words(score))] : []);
    this.element.replaceChildren(
      h("p", {}, h("b", {}, `\u201c${tokens.shown(at)}\u201d`), ` token ${at + 1} of ${view.texts.length}`),
      h("dl", {}, ...line(view.name, own), ...line(tokens.by, higher)),
      ...(row ? [this.list(view.name, row[0], row[2]), ...(row[1] ? [this.list(tokens.by, row[1], row[2])] : [])] : [h("p", {}, "asking the kernel\u2026")]));
    return Boolean(row && (row[1] || !higher));
  }

  /**
   * The likeliest tokens by one model.
   * @param {string} name
   * @param {[number, string, number][]} likeliest ids, texts and log-probabilities
   * @param {number} chosen id of the one that stands there
   */
  list(name, likeliest, chosen) {
    const { tokens, at } = this, title = h("p", { class: "cl-likeliest" }, `likeliest to ${name}`);
    return h("div", {}, title, h("ol", {}, ...likeliest.map(([id, text, logprob]) => h("li", {}, h("button", {
      type: "button", disabled: id === chosen, onclick: () => this.lab.branch(tokens?.view, at, id),
    }, h("span", {}, visible(text).replaceAll("\n", "\u21b5").replaceAll(" ", "\u2423") || "\u25cc"), ` ${percent(logprob)} %`)))));
  }

  /** Stand below the token, or above it where there is no room. */
  place() {
    const token = this.tokens?.elements[this.at], root = this.lab.root.getBoundingClientRect();
    if (!token) return;
    const around = token.getClientRects()[0], { offsetWidth: width, offsetHeight: height } = this.element;
    const above = around.bottom + height + 4 > window.innerHeight && around.top - height - 4 > root.top;
    this.element.style.left = `${Math.max(4, Math.min(around.left - root.left, root.width - width - 8))}px`;
    this.element.style.top = `${(above ? around.top - height - 4 : around.bottom + 4) - root.top}px`;
  }

  /** Move the focus into it. */
  enter() {
    this.element.querySelector("button:enabled")?.focus();
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    const buttons = [...this.element.querySelectorAll("button:enabled")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key], token = this.tokens?.elements[this.at];
    const at = buttons.indexOf(/** @type {HTMLButtonElement} */ (document.activeElement));
    if (step) buttons[(at + step + buttons.length) % buttons.length].focus();
    else if (event.key === "Escape") {
      token?.focus();
      this.hide();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
