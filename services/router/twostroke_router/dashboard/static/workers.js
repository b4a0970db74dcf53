/** The two pools: a card for each worker. */

import { arrange, el, setAttribute, setText } from "./dom.js";
import { ago, bytes, count, duration, percent, plural } from "./format.js";
import { Sparkline } from "./sparkline.js";

const KV_STATES = [
  ["used", "in use", (blocks) => blocks.leased],
  ["promised", "promised", (blocks) => blocks.promised],
  ["cached", "cached", (blocks) => blocks.cached - Math.max(0, blocks.promised - blocks.free)],
  ["free", "free", (blocks) => Math.max(0, blocks.free - blocks.promised)],
];

const TREND = { prefill: "Prompt tokens/s", decode: "Running" };

const EMPTY = {
  prefill: ["No prefill worker", "Decode workers compute prompts too: the colocated form."],
  decode: ["No decode worker", "Requests wait for one a while, then they are refused."],
};

/** One pool of the page. */
export class Pool {
  constructor(role, list, countLabel) {
    this._role = role;
    this._list = list;
    this._count = countLabel;
    this._cards = new Map();
    this._empty = el("li", { class: "card empty" }, el("strong", {}, EMPTY[role][0]), el("p", {}, EMPTY[role][1]));
  }

  /** Shows the entries of a roster. */
  show(entries, nowMs) {
    const cards = entries.map((entry) => {
      if (!this._cards.has(entry.id)) this._cards.set(entry.id, new Card(entry));
      const card = this._cards.get(entry.id);
      card.show(entry, nowMs);
      return card.element;
    });
    arrange(this._list, cards.length ? cards : [this._empty]);
    const shown = new Set(entries.map((entry) => entry.id));
    for (const id of this._cards.keys()) if (!shown.has(id)) this._cards.delete(id);
    const ready = entries.filter((entry) => entry.lostMs === null && entry.worker.state === "ready").length;
    const all = ready === entries.length ? "" : ` of ${entries.length}`;
    setText(this._count, entries.length ? `${ready}${all} ready` : "");
  }
}

class Card {
  constructor(entry) {
    this._state = el("span", { class: "badge" });
    this._facts = Object.fromEntries(["running", "waiting", "queued", "step"].map((name) => [name, el("dd")]));
    this._spark = new Sparkline();
    this._peak = el("span", { class: "peak", title: "in the last minute" });
    this._kv = new KvBar();
    this._foot = el("p", { class: "foot" });
    const fact = (label, name) => el("div", {}, el("dt", {}, label), this._facts[name]);
    this.element = el(
      "li",
      { class: `card ${entry.hue}`, "data-worker": entry.id },
      el("header", {}, el("span", { class: "swatch", "aria-hidden": "true" }), el("h3", {}, entry.id), this._state),
      el(
        "div",
        { class: "load" },
        el(
          "dl",
          { class: "facts" },
          fact("Running", "running"),
          fact("Waiting", "waiting"),
          fact("Queued", "queued"),
          fact("Step", "step"),
        ),
        el("div", { class: "trend" }, this._peak, this._spark.element),
      ),
      this._kv.element,
      this._foot,
    );
  }

  show(entry, nowMs) {
    const { worker, lostMs, samples } = entry;
    const load = worker.load;
    const state = lostMs === null ? worker.state : "lost";
    setAttribute(this.element, "data-state", state);
    setText(this._state, lostMs === null ? state : `lost ${ago((nowMs - lostMs) / 1000)}`);
    setText(this._facts.running, count(load.running));
    setText(this._facts.waiting, count(load.waiting));
    setText(this._facts.queued, count(load.queued_tokens));
    setText(this._facts.step, load.steps ? duration(load.step_s) : duration(null));
    this._spark.draw(samples);
    setText(this._peak, `${TREND[entry.role]}, peak ${count(Math.round(Math.max(0, ...samples)))}`);
    this._kv.show(worker.blocks);
    setText(this._foot, footOf(worker));
  }
}

function footOf(worker) {
  const parts = [];
  if (worker.hit_rate !== null) parts.push(`${percent(worker.hit_rate)} of prompt tokens from cache`);
  parts.push(`${bytes(worker.kv_bytes)} KV ${worker.role === "prefill" ? "sent" : "received"}`);
  if (worker.preemptions) parts.push(plural(worker.preemptions, "preemption"));
  if (worker.digest_failures) parts.push(plural(worker.digest_failures, "digest failure"));
  return parts.join(" · ");
}

class KvBar {
  constructor() {
    this._share = el("span");
    this._parts = KV_STATES.map(([name]) => el("span", { class: `part ${name}` }));
    this._counts = KV_STATES.map(() => el("b"));
    const legend = KV_STATES.map(([name, label], index) =>
      el("li", {}, el("span", { class: `key ${name}`, "aria-hidden": "true" }), this._counts[index], ` ${label}`),
    );
    this.element = el(
      "div",
      { class: "kv" },
      el("p", { class: "kv-title" }, "KV blocks", this._share),
      el("div", { class: "bar", "aria-hidden": "true" }, ...this._parts),
      el("ul", { class: "legend" }, ...legend),
    );
  }

  show(blocks) {
    const total = Math.max(1, blocks.total);
    setText(this._share, `${percent(blocks.leased / total)} in use`);
    KV_STATES.forEach(([, , of], index) => {
      const value = Math.max(0, of(blocks));
      this._parts[index].style.flexGrow = String(value / total);
      setText(this._counts[index], count(value));
    });
  }
}
