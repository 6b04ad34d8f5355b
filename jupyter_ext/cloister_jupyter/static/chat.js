// The chat's page: a conversation, and a box to type in; see chat.py for the messages.
// One module with text.js, kernel.js and files.js, which stand before it.
//
// Nothing is loaded from anywhere. What was typed or answered becomes text nodes only, never markup,
// and leaves this page in custom messages only: no synced trait, no storage, no URL holds it.

/** @typedef {{role: string, text: string, media: string[], calls: string[]}} Said */

const WHO = { user: "You", system: "System prompt", tool: "Tool" };

/** One view of a conversation. */
class Chat {
  /** @param {{model: any, el: HTMLElement}} context */
  constructor({ model, el }) {
    this.model = model;
    this.thing = "chat";
    this.name = model.get("tier");
    this.uid = newId();
    this.next = -1; // sequence number that comes next; before the first snapshot none does
    /** @type {Said[]} */
    this.messages = [];
    this.turn = ""; // id of what is going on
    this.asked = null; // the question that this page sent, until it is kept
    this.following = true;
    this.build(el);
    this.link = new Link(model, this);
  }

  // ---- elements

  /** @param {HTMLElement} el */
  build(el) {
    this.badge = new Badge({
      send: () => this.begin("probe", "tries to reach out\u2026"),
      announce: (/** @type {string} */ words) => this.announce(words) });
    this.sampling = new Sampling();
    this.announced = h("div", { class: "cl-hidden", role: "status" });
    this.alert = h("div", { class: "cl-alert", role: "alert", hidden: true });
    this.note = h("span", { class: "cl-note" });
    this.used = h("span", { class: "cl-note cl-used" });
    this.stopButton = this.button("Stop", () => this.stop(), "cl-stop");
    this.sendButton = this.button("Send", () => this.sendNew(), "cl-run");
    this.forgetButton = this.button("Forget this conversation", () => this.confirm(true));
    this.confirmed = h("div", { class: "cl-confirm", role: "group", "aria-label": "Forget this conversation", hidden: true },
      h("span", {}, this.model.get("kept")
        ? "Delete what was said, and its key, from the vault? It cannot be taken back. What the disk or a backup still holds of it opens with the vault's key only, until `cloister vault rotate`."
        : "Delete what was said, and end the process that holds it?"),
      this.yesButton = this.button("Forget", () => this.forget(), "cl-stop"), this.button("Keep", () => this.confirm(false)));
    this.reopenButton = this.button("Take up what is kept", () => this.reopen());
    this.reopenButton.hidden = true;
    this.log = h("div", { class: "cl-log", role: "log", "aria-live": "off", tabindex: "0", "aria-label": `Conversation with ${this.name}` });
    this.log.addEventListener("scroll", () => {
      this.following = this.log.scrollTop + this.log.clientHeight > this.log.scrollHeight - 8;
    });
    this.box = this.textArea("message", `Message ${this.name}; Enter sends, Shift+Enter makes a line`);
    const compose = h("div", { class: "cl-compose" }, this.box, this.sendButton);
    this.files = new Files(this, compose);
    this.root = h("section", {
      class: "cloister-lab cloister-chat", "aria-label": `Chat with ${this.name}`,
      "data-lm-suppress-shortcuts": "true", "data-jp-suppress-context-menu": "true",
      onkeydown: (/** @type {KeyboardEvent} */ event) => this.onKey(event),
    },
      h("div", { class: "cl-toolbar", role: "toolbar", "aria-label": "Conversation" },
        h("strong", {}, this.name), this.stopButton, this.note, this.badge.element),
      this.alert, this.reopenButton, this.log,
      h("label", { for: this.box.id, class: "cl-hidden" }, "Message"),
      compose, this.files.element,
      h("div", { class: "cl-below" }, this.used, this.forgetButton), this.confirmed,
      this.sampling.element, this.announced);
    el.append(this.root);
    this.enable();
  }

  /** @param {string} words @param {() => void} onclick @param {string} [kind] */
  button(words, onclick, kind) {
    return /** @type {HTMLButtonElement} */ (h("button", { type: "button", class: kind, onclick }, words));
  }

  /** @param {string} name @param {string} placeholder */
  textArea(name, placeholder) {
    return /** @type {HTMLTextAreaElement} */ (h("textarea", {
      id: `${name}-${this.uid}`, rows: 2, placeholder,
      dir: "auto", oninput: () => this.say("") }));
  }

  /**
   * Make a message's element; its buttons act on the message that stands there.
   * @param {Said} said @param {number} at
   */
  item({ role, text, media, calls }, at) {
    const body = h("div", { class: "cl-said", dir: "auto" }, ...(calls.length ? calls.map(toolCall) : written(text)));
    const shown = media.length ? [h("ul", { class: "cl-files", "aria-label": "Files" }, ...media.map((label) => h("li", { class: "cl-file" }, label)))] : [];
    const item = h("article", { class: `cl-message cl-${role}`, "aria-label": WHO[role] ?? this.name },
      h("header", {}, h("strong", {}, WHO[role] ?? this.name),
        ...(role === "user" ? [this.button("Edit", () => this.edit(at, text), "cl-act")] : []),
        ...(role === "assistant" ? [this.button("Regenerate", () => this.regenerate(at), "cl-act cl-again")] : [])), ...shown, body);
    return item;
  }

  /** Show messages; those that are there already stay, with what has the focus in them. @param {Said[]} messages */
  show(messages) {
    const same = (/** @type {Said} */ a, /** @type {Said} */ b) => a?.role === b.role && a.text === b.text && String(a.media) === String(b.media);
    let from = 0;
    while (from < messages.length && same(this.messages[from], messages[from])) from++;
    while (this.log.children.length > from) this.log.lastElementChild?.remove();
    for (let at = from; at < messages.length; at++) this.log.append(this.item(messages[at], at));
    this.messages = messages;
    this.live = null;
    this.log.querySelectorAll(".cl-again").forEach((button, index, all) => {
      /** @type {HTMLElement} */ (button).hidden = index < all.length - 1;
    });
  }

  /** Show a question and the place of its answer, behind the first messages. @param {string} text @param {string[]} media @param {number} after @param {string} answer */
  showTurn(text, media, after, answer) {
    this.show(this.messages.slice(0, after));
    this.log.append(this.item({ role: "user", text, media, calls: [] }, after));
    const item = this.item({ role: "answer", text: answer, media: [], calls: [] }, after + 1);
    this.live = /** @type {HTMLElement} */ (item.querySelector(".cl-said"));
    this.live.replaceChildren(visible(answer));
    this.log.append(item);
    this.log.querySelectorAll(".cl-act").forEach((button) => button.toggleAttribute("disabled", true));
    this.following = true;
    this.follow();
  }

  /** Show the end, unless the reader scrolled up; once a frame, when the page is laid out anyway. */
  follow() {
    if (!this.following || this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.log.scrollTop = this.log.scrollHeight;
    });
  }

  /** Let buttons do what can be done now. */
  enable() {
    const gone = this.link?.detached ?? false, busy = this.turn !== "" || gone;
    this.stopButton.disabled = this.turn === "" || gone;
    for (const button of [this.sendButton, this.forgetButton, this.reopenButton, this.yesButton]) button.disabled = busy;
    this.log.querySelectorAll(".cl-act").forEach((button) => button.toggleAttribute("disabled", busy));
  }

  // ---- what the user does

  /** @param {KeyboardEvent} event */
  onKey(event) {
    event.stopPropagation(); // the notebook around has meanings of its own for arrows and letters
    if (event.isComposing) return;
    const control = event.ctrlKey || event.metaKey;
    const box = event.target instanceof HTMLTextAreaElement ? event.target : null;
    if (event.key === "Enter" && (control || (box && !event.shiftKey))) box && box !== this.box ? this.editing?.send() : box && this.sendNew();
    else if (event.key === "Escape" && this.turn) this.stop();
    else if (event.key === "Escape" && !this.confirmed.hidden) this.confirm(false);
    else if (event.key === "Escape" && this.editing) this.editing.cancel();
    else return;
    if (box || event.key === "Escape") event.preventDefault();
  }

  sendNew() {
    if (this.files.reading) return this.say("A file is still being read; send again in a moment.");
    this.ask(this.box.value, this.next < 0 ? null : this.messages.length, this.box, this.files.held);
  }

  /** @param {number} at of the answer */
  regenerate(at) {
    const asked = this.messages[at - 1];
    if (asked?.role !== "user") return this.say("No question stands before this answer.");
    if (this.ask(asked.text, at - 1, null) && !Number(this.sampling.fields.get("temperature")?.value)) {
      this.greedy = true; // said when the answer is there
    }
  }

  /** @param {number} at @param {string} text */
  edit(at, text) {
    this.editing?.cancel();
    const item = this.log.children[at], body = item.querySelector(".cl-said");
    const button = /** @type {HTMLElement} */ (item.querySelector(".cl-act"));
    const box = this.textArea("edit", ""), last = at >= this.messages.length - 2;
    box.value = text;
    box.rows = Math.min(10, text.split("\n").length + 1);
    box.setAttribute("aria-label", "Message, edited");
    const form = h("div", { class: "cl-edit" }, box,
      this.button(last ? "Send" : "Send, and drop what follows", () => this.editing?.send(), "cl-run"),
      this.button("Cancel", () => this.editing?.cancel()));
    body.replaceWith(form);
    const cancel = () => {
      form.replaceWith(body);
      this.editing = null;
      button.focus();
    };
    this.editing = { cancel, send: () => this.ask(box.value, at, box) && (this.editing = null) };
    box.focus();
  }

  /**
   * Ask; what stands behind the first `after` messages goes once the answer is there. Null keeps
   * all, which is for a page that was not told yet what there is.
   * @param {string} text @param {number | null} after @param {HTMLTextAreaElement | null} box it was typed in
   * @param {Held[] | null} [files] null: those that were asked about in that place
   */
  ask(text, after, box, files = null) {
    if (this.turn || this.link.detached) return false;
    const more = files?.length || (files === null && this.messages[after]?.media.length);
    const refused = text.trim() || more ? tooLong("message", text, this.model.get("limit_bytes")) : "There is no message; type one first.";
    const settings = refused ? null : this.sampling.values();
    if (refused) this.say(refused);
    if (!settings) return false;
    this.say("");
    this.turn = newId();
    this.asked = { turn: this.turn, text, box, files: files ?? [] };
    this.note.textContent = "asking\u2026";
    this.enable();
    this.link.ask({ type: "ask", run: this.turn, prompt: text, media: this.asked.files.map(({ id }) => id), again: files === null, after, ...settings });
    return true;
  }

  stop() {
    if (!this.turn) return;
    this.note.textContent = "stopping\u2026 (once more ends the model's process)";
    this.link.ask({ type: "stop", run: this.turn });
  }

  /** @param {boolean} open */
  confirm(open) {
    this.confirmed.hidden = !open;
    (open ? this.yesButton : this.forgetButton).focus();
  }

  forget() {
    this.confirm(false);
    this.begin("forget", "forgetting\u2026");
  }

  reopen() {
    this.begin("reopen", "asking the vault\u2026");
  }

  /** @param {string} type @param {string} words */
  begin(type, words) {
    if (this.turn || this.link.detached) return;
    this.say("");
    this.reopenButton.hidden = true;
    this.turn = newId();
    this.over = { forget: "forgotten", reopen: "taken up", probe: "tried" }[type];
    this.note.textContent = words;
    this.enable();
    this.link.ask({ type, run: this.turn });
  }

  // ---- the kernel

  dispose() {
    this.link.dispose();
  }

  detach() {
    this.root.classList.add("cl-detached");
    this.turn = "";
    this.note.textContent = "";
    this.badge.detach();
    this.enable();
    this.announce("The kernel is gone");
  }

  /** @param {any} message */
  receive(message) {
    if (message.type === "badge") return this.badge.show(message);
    if (message.type === "unattached") return this.files.refused(message);
    if (message.type === "invalid") return this.refused(message);
    if (message.type === "snapshot") this.restore(message);
    else if (message.seq === this.next) this.apply(message);
    else if (message.seq > this.next) return this.link.send({ type: "open" }); // one was missed
    else return;
    this.next = message.seq + 1;
  }

  /** @param {{turn: string, message: string, busy: boolean}} refusal */
  refused({ turn, message, busy }) {
    if (turn && turn !== this.turn) return;
    this.say(message);
    this.turn = "";
    this.asked = null;
    this.note.textContent = "";
    this.enable();
    if (busy) this.link.send({ type: "open" }); // another page of this chat asked
  }

  /** @param {any} event */
  apply(event) {
    if (event.type === "asked") {
      this.turn = event.turn;
      this.tokens = this.beganMs = 0;
      if (this.asked?.turn === event.turn && this.asked.box === this.box) {
        this.box.value = "";
        const gone = this.asked.files;
        this.files.show(this.files.held.filter((each) => !gone.includes(each)));
      }
      this.editing = null;
      this.showTurn(event.text, event.media, event.after, "");
      this.note.textContent = "loading\u2026";
      this.enable();
      this.announce("Asked");
    } else if (event.type === "ready") {
      this.note.textContent = event.load_s === null ? "reads\u2026" : `loaded in ${inTime(event.load_s)}, reads\u2026`;
    } else if (event.type === "delta") {
      const now = performance.now();
      this.beganMs ||= now;
      this.tokens += event.tokens;
      this.live?.append(visible(event.text));
      this.follow();
      const tookS = (now - this.beganMs) / 1000;
      this.note.textContent = tookS > 0.3 ? `answers, ${Math.round(this.tokens / tookS).toLocaleString("en")} tokens/s` : "answers";
    } else if (event.type === "ended") {
      this.over = FINISH[event.finish] ?? event.finish;
      if (event.tokens_per_s !== null) this.over += `, ${Math.round(event.tokens_per_s).toLocaleString("en")} tokens/s`;
      if (event.tokens) this.over += `, first after ${inTime(event.ttft_s)}`;
      if (event.finish === "context") this.say("The context is full: the answer was cut. Edit an earlier message to go on from there, or forget this conversation.");
    } else if (event.type === "failed") {
      this.over = "failed";
      this.say(event.message);
      this.reopenButton.hidden = event.kind !== "SessionMismatch";
    }
  }

  /** @param {any} all */
  restore({ messages, turn, over, text, media, after, answer, used, context, notice }) {
    const ended = over === this.turn && this.turn !== "";
    this.used.textContent = context ? `${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens` : "";
    this.show(messages);
    if (text || media.length) {
      this.showTurn(text, media, after, answer);
      this.note.textContent = "answers";
    }
    if (turn !== null || ended) this.turn = turn ?? ""; // else one of ours is on its way
    if (ended) this.finish(messages);
    if (notice && !this.noticed) this.say(notice);
    this.noticed ||= notice;
    this.enable();
    this.follow();
  }

  /** Say how it went, and give back a question that was not kept. @param {Said[]} messages */
  finish(messages) {
    const asked = this.asked, kept = asked && messages.some(({ role, text }) => role === "user" && text === asked.text);
    if (asked && !kept) {
      if (asked.box && !this.box.value) this.box.value = asked.text;
      this.files.show([...asked.files.filter((each) => !this.files.held.includes(each)), ...this.files.held]);
      if (this.over && this.over !== "failed") this.over += "; no answer, so nothing was kept";
    }
    if (asked && kept && this.greedy && this.alert.hidden) this.over += "; greedy, so the same question has the same answer: a temperature gives others";
    if (asked && kept) this.files.forget(asked.files.map(({ id }) => id));
    this.asked = null;
    this.greedy = false;
    this.note.textContent = this.over ?? "";
    this.announce(`${this.name}: ${this.over ?? ""}`);
    this.over = "";
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

/** Show a tool call. @param {string} text JSON, laid out */
function toolCall(text) {
  return h("div", { class: "cl-call" }, h("span", { class: "cl-note" }, "tool call"), h("pre", {}, visible(text)));
}

/** Return the nodes of a text: what stands between fences is code; nothing else is markup. @param {string} text */
function written(text) {
  return text.split(/^```[^\n`]*\n?/m).map((part, index) => index % 2 ? h("pre", {}, visible(part)) : h("span", {}, visible(part)));
}

export default {
  /** @param {{model: any, el: HTMLElement}} context */
  render(context) {
    const chat = new Chat(context);
    return () => chat.dispose();
  },
};
