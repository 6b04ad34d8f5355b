// How an answer differs from another, and from what was expected.

const MOST_CELLS = 2e6; // of a comparison: a few hundredths of a second

/**
 * Return how `b` comes of `a`: runs of what both have (`same`), of `a` alone and of `b` alone, each
 * with its ends in both. What is too long to be compared piece by piece is replaced as a whole.
 * @param {string[]} a
 * @param {string[]} b
 * @returns {{kind: "same" | "del" | "ins", a: [number, number], b: [number, number]}[]}
 */
function diff(a, b) {
  let head = 0, tail = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  while (tail < a.length - head && tail < b.length - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++;
  const n = a.length - head - tail, m = b.length - head - tail, row = m + 1;
  const runs = /** @type {any[]} */ ([]);
  const add = (/** @type {string} */ kind, /** @type {number} */ i, /** @type {number} */ j, /** @type {number} */ di, /** @type {number} */ dj) => {
    if (!di && !dj) return;
    const last = runs.at(-1);
    if (last?.kind === kind) [last.a[1], last.b[1]] = [i + di, j + dj];
    else runs.push({ kind, a: [i, i + di], b: [j, j + dj] });
  };
  add("same", 0, 0, head, head);
  let i = 0, j = 0;
  if (n * m <= MOST_CELLS) {
    const longest = new Uint16Array((n + 1) * row); // common pieces of the rests from (i, j) on
    for (let x = n - 1; x >= 0; x--) {
      for (let y = m - 1; y >= 0; y--) {
        longest[x * row + y] = a[head + x] === b[head + y] ? longest[(x + 1) * row + y + 1] + 1
          : Math.max(longest[(x + 1) * row + y], longest[x * row + y + 1]);
      }
    }
    while (i < n && j < m) {
      if (a[head + i] === b[head + j]) add("same", head + i++, head + j++, 1, 1);
      else if (longest[(i + 1) * row + j] >= longest[i * row + j + 1]) add("del", head + i++, head + j, 1, 0);
      else add("ins", head + i, head + j++, 0, 1);
    }
  }
  add("del", head + i, head + j, n - i, 0);
  add("ins", head + n, head + j, 0, m - j);
  add("same", head + n, head + m, tail, tail);
  return runs;
}

/**
 * Make a narrow picture of where an answer's tokens stand as in the reference's; null where there is
 * nothing to compare.
 * @param {string[]} reference texts of its tokens
 * @param {string[]} texts
 * @param {string} name of the reference
 */
function agreement(reference, texts, name) {
  const shown = texts.filter(Boolean), runs = diff(reference.filter(Boolean), shown);
  if (!shown.length) return null;
  let same = 0;
  const parts = runs.filter(({ b: [from, to] }) => from < to).map(({ kind, b: [from, to] }) => {
    if (kind === "same") same += to - from;
    const part = h("span", { class: `cl-${kind}` });
    part.style.flexGrow = String(shown.slice(from, to).join("").length);
    return part;
  });
  const words = `${Math.floor(100 * same / shown.length)} % of its ${shown.length} tokens stand as in the answer of ${name}`;
  return h("div", { class: "cl-strip", role: "img", "aria-label": words, title: words }, ...parts);
}

/** Words and signs, each with the space before it. @param {string} text @returns {string[]} */
function pieces(text) {
  return text.match(/\s*(?:[\p{L}\p{N}_]+|\S)/gu) ?? [];
}

/**
 * Show how an answer differs from what was expected: word by word, and by field where both are JSON.
 * @param {string} expected
 * @param {string} text
 */
function comparison(expected, text) {
  const a = pieces(expected), b = pieces(text);
  const runs = diff(a.map((piece) => piece.trim()), b.map((piece) => piece.trim()));
  const count = { del: 0, ins: 0, same: 0 }, nodes = [];
  for (const { kind, a: [from, to], b: [start, stop] } of runs) {
    const words = visible((kind === "del" ? a.slice(from, to) : b.slice(start, stop)).join(""));
    count[kind] += to - from + stop - start;
    if (kind === "same") nodes.push(document.createTextNode(words));
    else nodes.push(h(kind, {}, h("span", { class: "cl-hidden" }, kind === "del" ? " missing: " : " not expected: "), words));
  }
  const fields = byField(expected, text);
  const verdict = count.del + count.ins === 0 ? "\u2713 as expected" :
    `\u2260 not as expected: ${count.del} words or signs missing, ${count.ins} too many`;
  const words = h("div", { class: "cl-wordwise", dir: "auto" }, ...nodes), differs = count.del + count.ins > 0;
  return h("div", { class: "cl-compared" }, h("p", {}, verdict), ...(fields ? [fields] : []),
    ...(!differs ? [] : fields ? [h("details", {}, h("summary", {}, "Word by word"), words)] : [words]));
}

/** @param {string} expected @param {string} text */
function byField(expected, text) {
  const [wanted, found] = [expected, text].map(leaves);
  if (!wanted || !found) return null;
  const rows = [...new Set([...wanted.keys(), ...found.keys()])].map((name) => {
    const [a, b] = [wanted.get(name), found.get(name)];
    const kind = a === b ? "\u2713 same" : b === undefined ? "\u2212 missing" : a === undefined ? "+ extra" : "\u2260 differs";
    const values = a === b ? [visible(String(a))] : [
      ...(a === undefined ? [] : [h("del", {}, visible(a))]), ...(b === undefined ? [] : [" ", h("ins", {}, visible(b))])];
    const path = visible(name).split(/(?<=[._\]])/).flatMap((part) => [part, h("wbr")]);
    return h("tr", {}, h("th", { scope: "row" }, ...path), h("td", { dir: "auto" }, h("b", {}, kind), " ", ...values));
  });
  return h("table", {}, h("caption", {}, "By field"),
    h("thead", {}, h("tr", {}, ...["Field", "Result"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, ...rows));
}

/**
 * Return the values of a JSON object or list by their paths, each as JSON; null of another text.
 * @param {string} text
 * @returns {Map<string, string> | null}
 */
function leaves(text) {
  /** @type {Map<string, string>} */
  const found = new Map();
  const walk = (/** @type {any} */ value, /** @type {string} */ path) => {
    const inner = value !== null && typeof value === "object" ? Object.entries(value) : [];
    for (const [key, part] of inner) walk(part, Array.isArray(value) ? `${path}[${key}]` : path ? `${path}.${key}` : key);
    if (!inner.length) found.set(path || "(all)", JSON.stringify(value));
  };
  try {
    const value = JSON.parse(text);
    if (value === null || typeof value !== "object") return null;
    walk(value, "");
    return found;
  } catch {
    return null; // no JSON, or nested too deeply
  }
}
