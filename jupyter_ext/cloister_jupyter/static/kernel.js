// A page's way to its widget in the kernel; shared by the pages of this package.

const SILENT_MS = 4000; // after which a kernel that says nothing is busy or gone

/**
 * What a page sends and hears. The page has `receive(message)`, `say(words)`, `detach()`, which is
 * called once where the kernel is gone, and `thing`, what it calls itself.
 */
class Link {
  /** @param {any} model @param {any} page */
  constructor(model, page) {
    Object.assign(this, { model, page, detached: false, byControl: model.get("control") });
    this.onMessage = (/** @type {any} */ message) => {
      this.settle();
      this.page.receive(message);
    };
    this.onLive = () => this.lookForKernel(true);
    model.on("msg:custom", this.onMessage);
    model.on("comm_live_update", this.onLive);
    this.looking = setInterval(() => this.lookForKernel(false), 1000);
    this.send({ type: "open" });
    this.silence = setTimeout(() => { // what lies between may not know the control channel's message
      this.byControl = false;
      this.send({ type: "open" });
    }, SILENT_MS);
  }

  dispose() {
    this.model.off("msg:custom", this.onMessage);
    this.model.off("comm_live_update", this.onLive);
    clearInterval(this.looking);
    this.settle();
  }

  /**
   * Send over the kernel's control channel, which no busy cell holds up, where kernel and page have
   * it; else as a message of the widget.
   * @param {any} content
   */
  send(content) {
    const kernel = this.model.widget_manager?.kernel;
    if (!this.byControl || typeof kernel?.sendControlMessage !== "function") {
      this.model.send(content);
      return;
    }
    kernel.sendControlMessage({
      header: { msg_id: newId(), msg_type: "cloister_widget", session: kernel.clientId,
        username: kernel.username ?? "", version: "5.3", date: new Date().toISOString() },
      parent_header: {}, metadata: {}, channel: "control", buffers: [],
      content: { widget: this.model.get("widget_id"), content },
    }, false, true);
  }

  /** Send what is answered, and tell of a kernel that does not. @param {any} content */
  ask(content) {
    this.settle();
    this.silence = setTimeout(() => { // what was sent waits for the kernel, or is lost
      if (!this.detached) this.page.say("The kernel does not answer: a cell may be running. If it was restarted, run this cell again.");
    }, SILENT_MS);
    this.send(content);
  }

  /** Expect no answer any more. */
  settle() {
    clearTimeout(this.silence);
  }

  /**
   * See whether the kernel is gone; a restart tells the model, a shutdown does not.
   * @param {boolean} told that the connection changed, which after a restart is final
   */
  lookForKernel(told) {
    const manager = this.model.widget_manager;
    if (!manager || !("kernel" in manager)) return; // another host, which does not tell
    const kernel = manager.kernel;
    const gone = !kernel || kernel.isDisposed || ["dead", "terminating", "restarting", "autorestarting"].includes(kernel.status);
    if ((!told && !gone) || this.detached) return;
    this.detached = true;
    this.page.detach();
    this.page.say(`This ${this.page.thing} is detached: its kernel is gone. Run this cell again for a new one; what is shown here stays until then.`);
  }
}

/** The badge that says what holds for privacy, and shows its evidence when it is opened. */
class Badge {
  /** @param {any} [lab] whose processes can try to reach out */
  constructor(lab) {
    this.lab = lab;
    this.probe = /** @type {HTMLButtonElement} */ (h("button", { type: "button", onclick: () => {
      this.probe.disabled = true;
      lab.send({ type: "probe" });
    } }, "Try to reach out"));
    this.summary = h("summary", {}, "privacy: asking the kernel\u2026");
    this.evidence = h("div", { class: "cl-evidence" });
    this.element = h("details", { class: "cl-badge" }, this.summary, ...(lab ? [this.probe] : []), this.evidence);
  }

  /** @param {{summary: string, tier: number | null, groups: [string, [string, string][]][]}} badge */
  show({ summary, tier, groups }) {
    this.summary.textContent = summary;
    this.summary.dataset.tier = String(tier ?? "unknown");
    this.evidence.replaceChildren(...groups.map(([title, rows]) => h("div", {},
      h("h4", {}, title),
      h("dl", {}, ...rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])))));
    if (this.probe.disabled) this.lab.announce(summary);
    this.probe.disabled = false;
  }

  /** Say that there is nothing left that anything could hold for. */
  detach() {
    this.summary.textContent = "privacy: the kernel is gone, and its model processes with it";
    this.evidence.replaceChildren();
    this.probe.disabled = true;
  }
}

/** How answers are sampled, folded away. */
class Sampling {
  constructor() {
    /** @type {Map<string, HTMLInputElement>} */
    this.fields = new Map();
    const uid = newId();
    const rows = SETTINGS.map(([name, label, step, min, max, placeholder]) => {
      const field = /** @type {HTMLInputElement} */ (h("input", { type: "number", step, min, max, placeholder, id: `${name}-${uid}` }));
      if (name === "max_tokens") field.value = "256";
      this.fields.set(String(name), field);
      return h("div", { class: "cl-field" }, h("label", { for: field.id }, String(label)), field);
    });
    this.element = h("details", { class: "cl-sampling" }, h("summary", {}, "Sampling"),
      h("div", { class: "cl-fields" }, ...rows));
  }

  /** Return what a request says of it; null where a field is wrong, which is shown. */
  values() {
    /** @type {Record<string, number>} */
    const sampling = {};
    for (const [name, field] of this.fields) {
      if (!field.checkValidity()) {
        this.element.open = true;
        field.reportValidity();
        return null;
      }
      if (field.value !== "" && name !== "max_tokens") sampling[name] = Number(field.value);
    }
    const most = this.fields.get("max_tokens").value;
    return { sampling, max_tokens: most === "" ? null : Number(most) };
  }
}

/**
 * Return why a text is refused, or "". Before it is sent: a server ends connections over large
 * messages.
 * @param {string} name @param {string} text @param {number} most bytes
 */
function tooLong(name, text, most) {
  const size = new TextEncoder().encode(text).length;
  return size <= most ? "" :
    `The ${name} has ${size.toLocaleString("en")} bytes and the lab takes ${most.toLocaleString("en")}; shorten it.`;
}
