/** A waterfall: the stages of a time as bars on one axis, one after another. */

import { el } from "./dom.js";
import { duration, mark } from "./format.js";

/** What each stage is, in words: label, explanation, and whose work it is (for its colour). */
export const STAGES = {
  admission: ["Admission", "waiting to be let in by the router", "router"],
  placement: ["Placement", "choosing workers, or waiting for one that can take the request", "router"],
  reserve: ["Reserve", "the decode worker promises room for the KV", "router"],
  prefill_queue: ["Prefill queue", "in the prefill worker, before its first step", "wait"],
  prefill_compute: ["Prefill compute", "computing the prompt and the first token", "prefill"],
  return: ["Return", "from the engine's first token to the message that carries it", "router"],
  transfer: ["Transfer", "KV still on its way after the first token: what was not hidden behind compute", "transfer"],
  decode_admission: ["Decode admission", "from the KV's arrival to the first step of decode", "wait"],
  first_step: ["First step", "the first step of decode", "decode"],
  unattributed: ["Unattributed", "what no stage measured: the network, event loops", "rest"],
};

const FALLBACK = (stage) => [stage.replaceAll("_", " "), "", "rest"];

/** Round marks from zero to a total, three to six of them. */
export function marks(total) {
  if (!(total > 0)) return [0];
  const rough = total / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  return Array.from({ length: Math.floor(total / step + 1e-9) + 1 }, (_, index) => index * step);
}

/** Where each stage begins and how long it is, as shares of the total. */
export function layout({ total_s: total, stages }) {
  let begin = 0;
  return stages.map(({ stage, seconds }) => {
    const bar = { stage, seconds, begin: total > 0 ? begin / total : 0, share: total > 0 ? seconds / total : 0 };
    begin += seconds;
    return bar;
  });
}

/** The figure of one waterfall. */
export function waterfall(title, data, absent) {
  const heading = el("figcaption", {}, el("span", {}, title), el("strong", {}, data ? duration(data.total_s) : ""));
  if (!data) return el("figure", { class: "waterfall" }, heading, el("p", { class: "absent" }, absent));
  const rows = layout(data).map(row);
  return el("figure", { class: "waterfall" }, heading, el("ol", {}, ...rows), axis(data.total_s));
}

function row({ stage, seconds, begin, share }) {
  const [label, explanation, whose] = STAGES[stage] ?? FALLBACK(stage);
  const bar = el("span", { class: `span ${whose}` });
  bar.style.left = `min(${begin * 100}%, 100% - 2px)`;
  bar.style.width = `${share * 100}%`;
  const track = el("span", { class: "track", "aria-hidden": "true" }, seconds > 0 ? bar : null);
  const name = el("span", { class: "stage", title: explanation }, label);
  return el(
    "li",
    { class: seconds > 0 ? "" : "none", "data-stage": stage },
    name,
    track,
    el("span", { class: "time" }, duration(seconds)),
  );
}

function axis(total) {
  const ticks = marks(total).map((seconds) => {
    const tick = el("span", {}, mark(seconds));
    tick.style.left = `${(seconds / total) * 100}%`;
    return tick;
  });
  return el("div", { class: "axis", "aria-hidden": "true" }, el("div", { class: "ticks" }, ...ticks));
}

/** The first waterfall in one thin line, for a table. */
export function ribbon(data) {
  const line = el("span", { class: "ribbon", "aria-hidden": "true" });
  for (const { stage, share } of data ? layout(data) : []) {
    const part = el("span", { class: (STAGES[stage] ?? FALLBACK(stage))[2] });
    part.style.flexGrow = String(share);
    line.append(part);
  }
  return line;
}
