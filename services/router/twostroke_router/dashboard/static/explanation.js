/** What a request's explanation says, for people: both waterfalls, where it ran and why. */

import { el } from "./dom.js";
import { bytes, count, duration, plural } from "./format.js";
import { waterfall } from "./waterfall.js";

/** A worker's name with its colour. */
export function chip(roster, id, role) {
  const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
  return el("span", { class: `chip ${roster.hue(id, role)}`, title: id }, swatch, el("span", { class: "name" }, id));
}

/** Where a request ran: one chip or two. */
export function route(roster, { prefill, decode }) {
  const parts = [];
  if (prefill) parts.push(chip(roster, prefill, "prefill"));
  if (prefill && decode) parts.push(el("span", { class: "arrow", "aria-label": "then" }, "→"));
  if (decode) parts.push(chip(roster, decode, "decode"));
  return el("span", { class: "route" }, ...(parts.length ? parts : ["nowhere"]));
}

/** The whole explanation. */
export function explanation(roster, request) {
  const { placement, waterfalls } = request;
  return el(
    "div",
    { class: "explanation" },
    el("div", { class: "waterfalls" }, ...bothWaterfalls(waterfalls)),
    el("p", { class: "reason" }, route(roster, placement), el("span", {}, placement.reason || "never placed")),
    el("dl", { class: "details" }, ...details(request)),
  );
}

/** The two figures of a request. */
export function bothWaterfalls({ ttft, second_token: second }) {
  return [
    waterfall("To the first token", ttft, "There was no first token."),
    waterfall("From the first to the second", second, "There was no second token."),
  ];
}

function details(request) {
  const { usage, placement, transfer } = request;
  const cached = `${count(usage.cached_tokens)} from cache (${count(placement.expected_hit_tokens)} expected)`;
  const rows = [
    ["Request", request.request_id, "id"],
    ["Prompt", `${plural(usage.prompt_tokens, "token")}, ${cached}`],
    ["Answer", `${plural(usage.completion_tokens, "token")} in ${duration(request.e2e_s)}`],
    ["Between tokens", `${duration(request.itl_s)} on average`],
    ["KV moved", moved(transfer)],
  ];
  if (request.retries) rows.push(["Placed again", plural(request.retries, "time")]);
  if (request.preemptions) rows.push(["Preempted", plural(request.preemptions, "time")]);
  if (request.trace_id) rows.push(["Trace", request.trace_id, "id"]);
  return rows.map(([name, value, kind]) => el("div", {}, el("dt", {}, name), el("dd", { class: kind ?? "" }, value)));
}

function moved({ kv_bytes, kv_segments, kv_resends, skipped_tokens }) {
  if (!kv_segments && !skipped_tokens) return "none";
  const parts = [`${bytes(kv_bytes)} in ${plural(kv_segments, "segment")}`];
  if (kv_resends) parts.push(`${count(kv_resends)} sent again`);
  if (skipped_tokens) parts.push(`${plural(skipped_tokens, "token")} already there`);
  return parts.join(", ");
}
