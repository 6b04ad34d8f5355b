// Elements, and texts as people read them; shared by the pages of this package.

/**
 * Classes of the parts of the lab that have a tab: static `panel` (the name before the dot in the
 * types of its messages) and `title`; a constructor that is given the lab and makes `element`;
 * `receive(message)`; and where there is a need `shown()`, `run()` and `stop()`.
 * @type {any[]}
 */
const PANELS = [];
const WORD = 24; // most characters that a mark covers

const FINISH = {
  end: "ended by itself", length: "cut at the most tokens", context: "context full",
  stop: "stopped",
};
const SETTINGS = [
  // name, label, step, least, most, placeholder
  ["max_tokens", "Tokens at most", 1, 1, undefined, "no bound"],
  ["temperature", "Temperature", "any", 0, undefined, "0 (greedy)"],
  ["top_k", "Top k", 1, 0, undefined, "0 (all)"],
  ["top_p", "Top p", "any", 0, 1, "1"],
  ["min_p", "Min p", "any", 0, 1, "0"],
  ["repetition_penalty", "Repetition penalty", "any", 0.01, 100, "1"],
  ["seed", "Seed", 1, 0, Number.MAX_SAFE_INTEGER, "drawn"],
];

/**
 * Make an element. Strings among the children become text nodes.
 * @param {string} tag
 * @param {Record<string, any>} [attributes] `class`, listeners (`onclick`), properties, attributes
 * @param {...(Node | string)} children
 */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  // Else browsers keep in their profile what is typed and chosen, and may send it to be spell-checked.
  if (["input", "textarea", "select"].includes(tag)) {
    element.autocomplete = "off";
    element.spellcheck = false;
  }
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children);
  return element;
}

/**
 * Return text as it can be shown: control characters and those that turn the direction of what
 * follows are made visible, since an answer must not rearrange the page around it.
 * @param {string} text
 */
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, (found) => {
    const code = found.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
}

/**
 * Return where two texts part, never within a character.
 * @param {string} a
 * @param {string} b
 */
function parting(a, b) {
  const most = Math.min(a.length, b.length);
  let at = 0;
  while (at < most && a[at] === b[at]) at++;
  if (at > 0 && /[\ud800-\udbff]/.test(a[at - 1])) at--;
  return at;
}

/**
 * Return the end of the word that stands at `from`.
 * @param {string} text
 * @param {number} from
 */
function wordEnd(text, from) {
  let to = Math.min(text.length, from + 1);
  while (to < text.length && to < from + WORD && !/\s/.test(text[to])) to++;
  if (/[\ud800-\udbff]/.test(text[to - 1] ?? "")) to++;
  return to;
}

/** Return an id; also where a page that came over plain HTTP has no `crypto.randomUUID`. */
function newId() {
  return [...crypto.getRandomValues(new Uint32Array(4))].map((word) => word.toString(16).padStart(8, "0")).join("");
}

/** @param {number} bytes */
function inBytes(bytes) {
  return bytes < 1e5 ? `${(bytes / 1e3).toFixed(1)} kB` : bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}

/** @param {number} seconds */
function inTime(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`;
}
