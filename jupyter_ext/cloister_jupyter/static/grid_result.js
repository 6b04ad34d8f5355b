// What the tiers answered to a grid: a verdict, bars, rows, one row in full, and two tiers compared.

class GridResult {
  /** @param {any} page */
  constructor(page) {
    this.page = page;
    this.view = 0;
    /** @type {string[]} */
    this.tiers = [];
    this.words = "";
    this.build();
  }

  build() {
    this.verdict = h("div", { class: "cl-verdict" });
    this.rates = h("div", { class: "cl-rates" });
    this.reasons = h("ul", { class: "cl-reasons", hidden: true });
    this.table = new RowTable({
      label: "Answers by case and tier", readOnly: true,
      need: (begin, count) => this.page.lab.send({ type: "grid.rows", view: this.view, begin, count, ...this.filter() }),
      fill: (cell, row, column) => this.fill(cell, row, column),
      open: (index) => {
        const row = this.table.row(index);
        if (row) this.page.lab.send({ type: "grid.row", prompt: row.prompt, case: row.case });
      },
    });
    this.differing = this.box("only where they differ");
    this.failing = this.box("only failures");
    this.counted = h("span", { class: "cl-note" });
    this.detail = h("section", { class: "cl-detail", hidden: true, tabindex: "-1", "aria-label": "A row in full",
      onkeydown: (/** @type {KeyboardEvent} */ event) => {
        if (event.key !== "Escape") return;
        event.stopPropagation(); // here Escape closes the row, and stops no run
        this.closeRow();
      } });
    this.path = h("input", { id: `path-${newId()}`, type: "text" });
    this.said = h("span", { class: "cl-note" });
    this.element = h("div", { class: "cl-result", hidden: true },
      this.verdict, this.rates, this.reasons,
      h("div", { class: "cl-jump" }, this.differing.label, this.failing.label, this.counted),
      this.table.element, h("p", { class: "cl-hint" }, "Enter or a double click opens a row."),
      this.detail, this.comparison());
  }

  /** @param {string} words */
  box(words) {
    const box = /** @type {HTMLInputElement} */ (h("input", { type: "checkbox", onchange: () => this.refilter() }));
    return { box, label: h("label", { class: "cl-toggle" }, box, words) };
  }

  comparison() {
    const choice = (/** @type {string} */ words) => /** @type {HTMLSelectElement} */ (h("select", { "aria-label": words }));
    this.before = choice("Before");
    this.after = choice("After");
    this.flips = h("div", { class: "cl-flips", "aria-live": "off" });
    return h("details", { class: "cl-baseline" }, h("summary", {}, "Baseline: two of them against each other"),
      h("div", { class: "cl-jump" }, h("span", {}, "before"), this.before, h("span", {}, "after"), this.after,
        this.page.button("Compare", () => this.page.lab.send({ type: "grid.compare", before: this.before.value, after: this.after.value }))),
      this.flips);
  }

  filter() {
    return { differing: this.differing.box.checked, failing: this.failing.box.checked };
  }

  refilter() {
    this.view += 1;
    this.table.forget();
    this.table.element.scrollTop = 0;
    this.table.setCount(Math.max(1, this.table.count)); // so that there is something to ask for
  }

  refresh() {
    this.table.stale();
    const { differing, failing } = this.filter();
    if ((differing || failing) && !this.table.count) this.refilter();
  }

  /** @param {string[]} tiers @param {string[]} variables @param {number} prompts */
  begin(tiers, variables, prompts) {
    this.view += 1;
    this.tiers = tiers;
    this.prompts = prompts;
    this.variables = variables;
    this.element.hidden = false;
    this.detail.hidden = true;
    this.words = "";
    for (const part of [this.verdict, this.rates, this.flips, this.said, this.counted]) part.replaceChildren();
    this.reasons.hidden = true;
    this.table.setColumns([
      { title: "line", width: "4em" }, ...(prompts > 1 ? [{ title: "template", width: "5em" }] : []),
      ...variables.map((title) => ({ title, width: "minmax(9em, 1fr)" })),
      { title: "expected", width: "minmax(9em, 1fr)" },
      ...tiers.map((title) => ({ title, width: "minmax(11em, 1.4fr)" }))]);
    this.table.setCount(1);
    for (const [select, chosen] of [[this.before, 0], [this.after, 1]]) {
      select.replaceChildren(...tiers.map((name, index) => h("option", { selected: index === chosen }, name)));
    }
  }

  /** @param {{view: number, begin: number, total: number, rows: any[]}} message */
  put({ view, begin, total, rows }) {
    if (view !== this.view) return;
    this.table.setCount(total);
    this.table.put(begin, rows);
  }

  /** @param {HTMLElement} cell @param {any} row @param {number} column */
  fill(cell, row, column) {
    const first = this.prompts > 1 ? 2 : 1, values = first + this.variables.length;
    if (column === 0) cell.textContent = row.line;
    else if (column < first) cell.textContent = row.prompt + 1;
    else if (column < values) cell.textContent = visible(row.values[column - first]);
    else if (column === values) cell.textContent = visible(row.expected);
    else this.fillAnswer(cell, row.tiers[this.tiers[column - values - 1]]);
  }

  /** @param {HTMLElement} cell @param {any} answer */
  fillAnswer(cell, answer) {
    if (!answer) { cell.textContent = ""; return; }
    const parts = [mark(answer.passed)];
    if (answer.why) parts.push(h("span", { class: "cl-why" }, `${answer.why}: `));
    answer.said.forEach(([text, count], index) => {
      if (index) parts.push(h("span", { class: "cl-or" }, " \u2502 "));
      if (answer.said.length > 1 || count > 1) parts.push(h("b", {}, `${count}\u00d7 `));
      parts.push(document.createTextNode(visible(text) || "(nothing)"));
    });
    if (answer.more) parts.push(h("span", { class: "cl-or" }, ` and ${answer.more} more`));
    cell.replaceChildren(...parts);
  }

  // ---- the verdict

  /** @param {any} result */
  show({ prompts, differing, failing, reasons, done, total }) {
    if (!prompts) return;
    this.words = prompts.map((each, index) => (prompts.length > 1 && each.verdict ? `Template ${index + 1}: ` : "") + each.verdict).join(" ");
    this.verdict.replaceChildren(...prompts.map((each, index) => h("p", {},
      ...(prompts.length > 1 ? [h("b", {}, `Template ${index + 1}: `)] : []),
      each.verdict || "Nothing was judged: give cases an expected answer or a check.",
      ...(done < total && each.verdict ? [h("span", { class: "cl-why" }, " (so far)")] : []))));
    this.rates.replaceChildren(...prompts.flatMap((each, index) => each.rates.map((rate) =>
      this.rate(rate, prompts.length > 1 ? `${index + 1}: ` : ""))));
    this.reasons.hidden = !Object.keys(reasons).length;
    this.reasons.replaceChildren(...Object.entries(reasons).map(([name, why]) => h("li", {}, `${name}: ${why}`)));
    this.counted.textContent = `${differing.toLocaleString("en")} differ, ${failing.toLocaleString("en")} with a failure`;
  }

  /** A pass rate as a bar, with its interval and the numbers. @param {any} rate @param {string} before */
  rate({ name, value, low, high, words }, before) {
    const wanted = Number(this.page.wanted.value) / 100;
    const bar = (/** @type {string} */ kind, /** @type {number} */ from, /** @type {number} */ to) => {
      const part = h("span", { class: kind });
      part.style.insetInlineStart = `${100 * from}%`;
      part.style.inlineSize = `${100 * (to - from)}%`;
      return part;
    };
    return h("div", { class: "cl-rate" }, h("span", { class: "cl-rate-name" }, before + name),
      h("span", { class: "cl-bar", "aria-hidden": "true" }, bar("cl-passed", 0, value), bar("cl-interval", low, high), bar("cl-wanted", wanted, wanted)),
      h("span", { class: "cl-figure" }, words));
  }

  // ---- a row in full

  /** @param {any} row */
  showRow(row) {
    const title = h("h4", {}, `Line ${row.line}${this.prompts > 1 ? `, template ${row.prompt + 1}` : ""}`);
    const promote = (/** @type {string | null} */ tier, /** @type {number} */ said) => this.page.button(
      tier === null ? "Promote with what is expected" : "Right: promote with this answer",
      () => this.page.lab.send({ type: "grid.promote", prompt: row.prompt, case: row.case, tier, said, path: this.path.value }));
    const text = (/** @type {string} */ words) => h("pre", { class: "cl-text", dir: "auto", tabindex: "0" }, visible(words));
    this.detail.replaceChildren(
      h("header", {}, title, this.page.button("Close", () => this.closeRow())),
      h("h5", {}, "Asked"), text(row.asked),
      ...(row.expected ? [h("h5", {}, "Expected"), text(row.expected), promote(null, 0)] : []),
      ...(row.check ? [h("h5", {}, "Check"), text(row.check)] : []),
      ...this.tiers.flatMap((tier) => (row.tiers[tier] ?? []).flatMap((said, index) => [
        h("h5", {}, mark(said.passed), `${tier}${said.count > 1 ? `, ${said.count}\u00d7` : ""}${said.seeds.length ? `, seeds ${said.seeds.join(", ")}` : ""}`,
          ...(said.why || said.error ? [h("span", { class: "cl-why" }, ` (${[said.error || said.why, ...said.fields].join(": ")})`)] : [])),
        ...(said.error ? [] : [text(said.text), h("p", { class: "cl-hint" }, took(said)), promote(tier, index)])])),
      h("div", { class: "cl-jump" }, h("label", { for: this.path.id }, "Regression file"), this.path, this.said));
    this.said.replaceChildren();
    this.detail.hidden = false;
    this.detail.focus();
    this.detail.scrollIntoView({ block: "nearest" });
  }

  closeRow() {
    this.detail.hidden = true;
    this.table.focus(this.table.active.row, this.table.active.column);
  }

  // ---- two against each other

  /** @param {any} message */
  showComparison({ before, after, words, receipts, complaint, rows, left }) {
    const table = (/** @type {string} */ caption, /** @type {string[]} */ titles, /** @type {any[][]} */ lines) =>
      h("div", { class: "cl-wide", tabindex: "0", role: "region", "aria-label": caption }, h("table", {}, h("caption", {}, caption),
        h("thead", {}, h("tr", {}, ...titles.map((title) => h("th", { scope: "col" }, title)))),
        h("tbody", {}, ...lines.map(([first, ...cells]) => h("tr", {}, h("th", { scope: "row" }, first), ...cells.map((cell) => h("td", { dir: "auto" }, cell)))))));
    const open = (/** @type {any} */ row) => this.page.button(`line ${row.line}`, () =>
      this.page.lab.send({ type: "grid.row", prompt: row.prompt, case: row.case }));
    this.flips.replaceChildren(h("p", { class: "cl-words" }, words),
      ...(rows.length ? [table("Cases that flip, each beside the row of the receipts that speaks of it",
        ["case", "", before, after, "why", "row of receipt.json", before, after],
        rows.map((row) => [open(row), row.kind, ...row.said.map((each) => visible(each) || "(nothing)"), row.why, row.receipt, ...(row.values.length ? row.values : ["\u2013", "\u2013"])]))] : []),
      ...(left ? [h("p", { class: "cl-hint" }, `${left.toLocaleString("en")} more flip.`)] : []),
      complaint ? h("p", { class: "cl-error" }, complaint) : table("What the receipts say", ["", before, after], receipts));
    this.page.lab.announce(words);
  }
}

/** A sign that says whether an answer passed, in words for who does not see it. @param {boolean | null} passed */
function mark(passed) {
  if (passed === null) return h("span", {});
  return h("span", { class: passed ? "cl-pass" : "cl-fail", role: "img", "aria-label": passed ? "passes" : "fails" }, passed ? "\u2713" : "\u2717");
}

/** @param {any} said what an answer took */
function took({ finish, tokens, ttft_s, tokens_per_s, kept }) {
  return [FINISH[finish] ?? finish, `${tokens} tokens`, `first after ${inTime(ttft_s)}`,
    ...(tokens_per_s === null ? [] : [`${Math.round(tokens_per_s).toLocaleString("en")} tokens/s`]), ...(kept ? ["kept from before"] : [])].join(", ");
}
