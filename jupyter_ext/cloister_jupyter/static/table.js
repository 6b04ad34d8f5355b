// A table of many rows, of which only those in sight are elements.

const ROW_PX = 44, AHEAD = 6; // rows above and below the sight that are elements, too
const BLOCK = 100, BLOCKS = 200; // rows that are asked for together, and how many blocks are kept
const ASK_MS = 40; // between two looks at which rows are missing, while one scrolls

/**
 * A grid in the sense of ARIA: arrows, Home, End and the page keys move the focus from cell to cell,
 * and Enter or a double click opens one. Rows are positioned by transforms, which costs no layout.
 */
class RowTable {
  /**
   * @param {{
   *   label: string, readOnly: boolean,
   *   need: (begin: number, count: number) => void,
   *   fill: (cell: HTMLElement, row: any, column: number) => void,
   *   open: (row: number, column: number) => void,
   *   commit?: (row: number, column: number, text: string) => void,
   * }} how `need` asks for rows, which `put` then brings
   */
  constructor(how) {
    this.how = how;
    this.count = 0;
    /** @type {{title: string, width: string}[]} */
    this.columns = [];
    /** @type {Map<number, any[]>} */
    this.blocks = new Map();
    this.fresh = new Set(); // blocks that need not be asked for
    this.active = { row: 0, column: 0 };
    /** @type {Map<number, HTMLElement>} */
    this.shown = new Map();
    this.free = [];
    /** @type {HTMLElement | undefined} */
    this.tabbable = undefined;
    this.frame = 0;
    this.asking = 0;
    this.heading = h("div", { role: "row", class: "cl-row cl-heading", "aria-rowindex": 1 });
    this.body = h("div", { role: "rowgroup", class: "cl-rows" });
    this.element = h("div", {
      role: "grid", class: "cl-table", "aria-label": how.label, "aria-readonly": how.readOnly ? "true" : "false",
      onscroll: () => this.drawSoon(),
      onkeydown: (/** @type {KeyboardEvent} */ event) => this.onKey(event),
      onclick: (/** @type {MouseEvent} */ event) => this.onClick(event),
      ondblclick: (/** @type {MouseEvent} */ event) => { if (this.place(event)) this.how.open(this.active.row, this.active.column); },
    }, h("div", { role: "rowgroup", class: "cl-head" }, this.heading), this.body);
    new ResizeObserver(() => this.drawSoon()).observe(this.element);
  }

  /** @param {{title: string, width: string}[]} columns */
  setColumns(columns) {
    this.columns = columns;
    this.element.style.setProperty("--cl-widths", columns.map((column) => column.width).join(" "));
    this.element.setAttribute("aria-colcount", String(columns.length));
    this.heading.replaceChildren(...columns.map((column, index) =>
      h("div", { role: "columnheader", class: "cl-cell", "aria-colindex": index + 1, title: column.title }, column.title)));
    this.shown.forEach((row) => row.remove());
    this.shown.clear();
    this.free = [];
    this.active = { row: 0, column: 0 };
    this.forget();
  }

  /** @param {number} count */
  setCount(count) {
    if (count !== this.count) {
      this.count = count;
      this.body.style.height = `${count * ROW_PX}px`;
      this.element.setAttribute("aria-rowcount", String(count + 1));
      this.active.row = Math.max(0, Math.min(this.active.row, count - 1));
    }
    this.drawSoon();
  }

  /** Rows that came. @param {number} begin @param {any[]} rows */
  put(begin, rows) {
    const block = begin / BLOCK;
    this.blocks.delete(block);
    this.blocks.set(block, rows);
    this.fresh.add(block);
    if (this.blocks.size > BLOCKS) this.blocks.delete(this.blocks.keys().next().value);
    this.drawSoon();
  }

  /** Ask anew for what is in sight; what is shown stays until it comes. */
  stale() {
    this.fresh.clear();
    this.drawSoon();
  }

  /** Drop all rows. */
  forget() {
    this.blocks.clear();
    this.stale();
  }

  /** @param {number} index */
  row(index) {
    return this.blocks.get(Math.floor(index / BLOCK))?.[index % BLOCK];
  }

  // ---- what is in sight

  drawSoon() {
    this.frame ||= requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  /** @returns {[number, number]} the first row in sight, and the one after the last */
  sight() {
    const { scrollTop, clientHeight } = this.element;
    return [Math.max(0, Math.floor(scrollTop / ROW_PX) - AHEAD),
      Math.min(this.count, Math.ceil((scrollTop + clientHeight) / ROW_PX) + AHEAD)];
  }

  draw() {
    if (!this.element.clientHeight) return; // its tab is not shown
    const [begin, end] = this.sight();
    for (const [index, row] of this.shown) {
      if ((index < begin || index >= end) && (index !== this.active.row || index >= this.count)) {
        this.shown.delete(index);
        this.free.push(row);
      }
    }
    for (let index = begin; index < end; index++) this.drawRow(index);
    if (this.active.row < this.count) this.drawRow(this.active.row);
    const cell = this.cell(this.active.row, this.active.column); // the one that Tab comes to
    if (cell !== this.tabbable) {
      if (this.tabbable) this.tabbable.tabIndex = -1;
      if (cell) cell.tabIndex = 0;
      this.tabbable = cell;
    }
    for (const row of this.free.splice(2 * AHEAD)) row.remove();
    for (const row of this.free) row.hidden = true;
    if (!this.asking) this.asking = setTimeout(() => { this.asking = 0; this.ask(); }, ASK_MS);
  }

  /** @param {number} index */
  drawRow(index) {
    let row = this.shown.get(index);
    const content = this.row(index);
    if (!row) {
      row = this.free.pop() ?? this.newRow();
      this.shown.set(index, row);
      row.hidden = false;
      row.style.transform = `translateY(${index * ROW_PX}px)`;
      row.setAttribute("aria-rowindex", String(index + 2));
      row.content = null;
    }
    if (row.content === content) return;
    row.content = content;
    [...row.children].forEach((cell, column) => {
      if (cell.querySelector("textarea")) return; // being edited
      if (content === undefined) cell.textContent = column === 0 ? "\u2026" : "";
      else this.how.fill(/** @type {HTMLElement} */ (cell), content, column);
    });
  }

  newRow() {
    const row = h("div", { role: "row", class: "cl-row" }, ...this.columns.map((_, index) =>
      h("div", { role: "gridcell", class: "cl-cell", "aria-colindex": index + 1, tabindex: -1, dir: "auto" })));
    this.body.append(row);
    return row;
  }

  /** Ask for the blocks in sight that are not there or not fresh. */
  ask() {
    const [begin, end] = this.sight();
    for (let block = Math.floor(begin / BLOCK); block * BLOCK < end; block++) {
      if (this.fresh.has(block) && this.blocks.has(block)) continue;
      this.fresh.add(block);
      if (!this.blocks.has(block)) this.blocks.set(block, []);
      this.how.need(block * BLOCK, BLOCK);
    }
  }

  // ---- keys and clicks

  /** @param {KeyboardEvent} event */
  onKey(event) {
    if (event.target instanceof HTMLTextAreaElement || event.altKey || event.metaKey) return;
    const page = Math.max(1, Math.floor(this.element.clientHeight / ROW_PX) - 2);
    const { row, column } = this.active, far = event.ctrlKey, last = this.columns.length - 1;
    const to = {
      ArrowDown: [row + 1, column], ArrowUp: [row - 1, column],
      ArrowRight: [row, column + 1], ArrowLeft: [row, column - 1],
      PageDown: [row + page, column], PageUp: [row - page, column],
      Home: [far ? 0 : row, 0], End: [far ? this.count - 1 : row, last],
    }[event.key];
    if (to) this.focus(to[0], to[1]);
    else if ((event.key === "Enter" && !far) || event.key === "F2") this.how.open(row, column);
    else return;
    event.preventDefault();
  }

  /** @param {MouseEvent} event @returns {boolean} whether it was on a cell */
  place(event) {
    const cell = /** @type {HTMLElement} */ (event.target).closest("[role=gridcell]");
    if (!cell?.parentElement) return false;
    this.active = { row: Number(cell.parentElement.getAttribute("aria-rowindex")) - 2, column: Number(cell.getAttribute("aria-colindex")) - 1 };
    return true;
  }

  /** @param {MouseEvent} event */
  onClick(event) {
    if (event.target instanceof HTMLTextAreaElement || getSelection()?.type === "Range") return;
    if (this.place(event)) this.focus(this.active.row, this.active.column);
  }

  /** Move the focus to a cell, or the nearest that there is. @param {number} row @param {number} column */
  focus(row, column) {
    if (!this.count) return;
    row = Math.max(0, Math.min(row, this.count - 1));
    column = Math.max(0, Math.min(column, this.columns.length - 1));
    this.active = { row, column };
    const head = this.heading.offsetHeight, top = row * ROW_PX;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (top + ROW_PX + head > this.element.scrollTop + this.element.clientHeight) {
      this.element.scrollTop = top + ROW_PX + head - this.element.clientHeight;
    }
    this.draw();
    const cell = this.cell(row, column);
    cell?.focus({ preventScroll: true });
    cell?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** @param {number} row @param {number} column @returns {HTMLElement | undefined} */
  cell(row, column) {
    return /** @type {HTMLElement | undefined} */ (this.shown.get(row)?.children[column]);
  }

  // ---- editing

  /** Let a cell be edited. @param {number} row @param {number} column @param {string} text */
  edit(row, column, text) {
    this.focus(row, column);
    const cell = this.cell(row, column);
    if (!cell) return;
    const field = /** @type {HTMLTextAreaElement} */ (h("textarea", {
      rows: 1, dir: "auto", "aria-label": `${this.columns[column].title}, row ${row + 1}` }));
    field.value = text;
    let over = false;
    const end = (/** @type {boolean} */ kept) => {
      if (over) return;
      over = true;
      field.remove();
      const shown = this.shown.get(row);
      if (shown) shown.content = null;
      if (kept && field.value !== text) this.how.commit?.(row, column, field.value);
      this.drawSoon();
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      event.stopPropagation(); // here Escape leaves the cell, and stops no run
      if (event.key === "Escape" || (event.key === "Enter" && !event.shiftKey) || event.key === "Tab") {
        event.preventDefault();
        end(event.key !== "Escape");
        this.focus(event.key === "Enter" ? row + 1 : row, event.key === "Tab" ? column + (event.shiftKey ? -1 : 1) : column);
      }
    });
    cell.replaceChildren(field);
    field.focus();
    field.select();
  }
}
