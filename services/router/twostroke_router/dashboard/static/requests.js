/** The table of recent requests; each row opens what is known of its request. */

import { el, setText } from "./dom.js";
import { clock, count, duration, plural } from "./format.js";
import { explanation, route } from "./explanation.js";
import { ribbon } from "./waterfall.js";

export const LIMIT = 50;
const COLUMNS = [
  ["Arrived", "time"],
  ["Request", "request wide"],
  ["Outcome", "outcome"],
  ["Tokens", "number", "in, out"],
  ["TTFT", "number"],
  ["ITL", "number wide"],
  ["Where TTFT went", "went wide"],
  ["Ran on", "ran wide"],
];
const GOOD = new Set(["stop", "length"]);

/** The panel of recent requests. */
export class Requests {
  constructor({ body, more, note, roster }) {
    this._body = body;
    this._more = more;
    this._note = note;
    this._roster = roster;
    this._rows = null;
    this._shown = [];
    this._latest = [];
    this._open = null;
    more.addEventListener("click", () => this._render());
    addEventListener("resize", () => this._open && span(this._open.details));
    body.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this._open) {
        event.preventDefault();
        this._close(true);
      }
    });
  }

  /** Takes what /requests said, newest first. While a row is open, what is new waits behind a button. */
  show(requests) {
    this._latest = requests;
    if (this._open) this._offer();
    else this._render();
  }

  /** Says why there is no table to show. */
  fail(message) {
    if (!this._rows) this._body.replaceChildren(el("p", { class: "empty" }, message));
  }

  _offer() {
    const known = new Set(this._shown.map((request) => request.request_id));
    const fresh = this._latest.filter((request) => !known.has(request.request_id)).length;
    this._more.hidden = !fresh;
    setText(this._more, `Show ${fresh} new`);
  }

  _render() {
    this._more.hidden = true;
    if (!this._latest.length) {
      if (this._rows || !this._body.querySelector("pre")) this._body.replaceChildren(nothing());
      this._rows = null;
      this._shown = [];
      return;
    }
    if (this._rows && ids(this._shown) === ids(this._latest)) return;
    if (!this._rows) this._makeTable();
    this._fill();
  }

  _makeTable() {
    const heads = COLUMNS.map(([label, kind, note]) =>
      el("th", { class: kind, scope: "col" }, label, note ? el("small", {}, ` ${note}`) : null),
    );
    this._rows = el("tbody");
    const table = el("table", { class: "few" }, el("thead", {}, el("tr", {}, ...heads)), this._rows);
    const all = el(
      "button",
      { type: "button", class: "quiet all", onclick: () => table.classList.remove("few") },
      "Show all",
    );
    this._body.replaceChildren(table, all);
  }

  _fill() {
    const before = new Map(
      [...this._rows.querySelectorAll("tr[data-request]")].map((row) => [row.dataset.request, row]),
    );
    const focused = document.activeElement?.closest?.("tr")?.dataset.request;
    const open = this._open;
    const rows = this._latest.flatMap((request) => {
      const row = before.get(request.request_id) ?? this._row(request);
      return open && open.id === request.request_id ? [row, open.details] : [row];
    });
    this._rows.replaceChildren(...rows);
    if (open && !this._latest.some((request) => request.request_id === open.id)) this._open = null;
    if (focused) this._rows.querySelector(`tr[data-request="${CSS.escape(focused)}"] button`)?.focus();
    this._shown = this._latest;
    setText(this._note, `newest first, ${plural(this._latest.length, "request")}`);
  }

  _row(request) {
    const cells = [this._opener(request), ...this._cells(request)];
    const row = el("tr", { "data-request": request.request_id }, ...cells);
    row.addEventListener("click", (event) => {
      if (!event.target.closest("button") && !getSelection().toString()) this._toggle(request, row);
    });
    return row;
  }

  _opener(request) {
    const time = clock(request.arrived_unix_s);
    const button = el("button", { type: "button", class: "opener", "aria-expanded": "false" }, time);
    button.setAttribute("aria-label", `${time}, request ${request.request_id}: waterfalls`);
    button.addEventListener("click", () => this._toggle(request, button.closest("tr")));
    return el("td", { class: "time" }, button);
  }

  _cells(request) {
    const { usage, outcome } = request;
    const kind = GOOD.has(outcome) ? "good" : outcome === "cancelled" ? "off" : "bad";
    return [
      el("td", { class: "request wide" }, el("code", {}, request.request_id)),
      el("td", { class: "outcome" }, el("span", { class: `badge ${kind}` }, outcome)),
      el("td", { class: "number" }, `${count(usage.prompt_tokens)}, ${count(usage.completion_tokens)}`),
      el("td", { class: "number" }, duration(request.ttft_s)),
      el("td", { class: "number wide" }, duration(request.itl_s)),
      el("td", { class: "went wide" }, ribbon(request.waterfalls.ttft)),
      el("td", { class: "ran wide" }, route(this._roster, request.placement)),
    ];
  }

  _toggle(request, row) {
    const wasOpen = this._open?.id === request.request_id;
    if (this._open) this._close(false);
    if (!wasOpen) this._openRow(request, row);
    else this._render();
  }

  _openRow(request, row) {
    const cell = el("td", {}, explanation(this._roster, request));
    const details = el("tr", { class: "opened" }, cell);
    row.after(details);
    span(details);
    row.querySelector("button").setAttribute("aria-expanded", "true");
    this._open = { id: request.request_id, row, details };
  }

  _close(takesFocus) {
    const { row, details } = this._open;
    this._open = null;
    details.remove();
    const button = row.querySelector("button");
    button.setAttribute("aria-expanded", "false");
    if (takesFocus) {
      this._render();
      button.focus();
    }
  }
}

/** Makes the one cell of a row as wide as the columns that are shown: narrow windows show fewer. */
function span(row) {
  const shown = [...row.previousElementSibling.cells].filter((cell) => getComputedStyle(cell).display !== "none");
  row.cells[0].colSpan = shown.length;
}

function ids(requests) {
  return requests.map((request) => request.request_id).join(" ");
}

function nothing() {
  const body = JSON.stringify({ prompt: "The capital of France is", max_tokens: 8 });
  const line = `curl ${location.origin}/v1/completions -H 'Content-Type: application/json' -d '${body}'`;
  const words = "No request in the last 15 minutes. Ask in the playground, or from a shell:";
  return el("div", { class: "empty" }, el("p", {}, words), el("pre", {}, el("code", {}, line)));
}
