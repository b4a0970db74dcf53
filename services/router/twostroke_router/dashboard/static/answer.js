/** One answer of the playground while it comes and after: its text coloured by worker, then where the time went. */

import { el, setText } from "./dom.js";
import { duration, plural } from "./format.js";
import { bothWaterfalls, chip } from "./explanation.js";

/**
 * Splits the text that came with the first tokens: the first token's, and that of the others.
 *
 * A token's own text is not always what is shown for it (half of a character, a leading space dropped); then all of it
 * counts as the first token's, which is what it begins with.
 */
export function splitFirst(text, tokens) {
  if (tokens.length < 2) return [text, ""];
  const first = tokens[0];
  return text.startsWith(first) && first ? [first, text.slice(first.length)] : [text, ""];
}

/** An answer in the conversation. */
export class Answer {
  constructor(roster) {
    this._roster = roster;
    this._first = el("span", { class: "piece first" });
    this._rest = el("span", { class: "piece" });
    this._text = el("p", { class: "text" }, this._first, this._rest);
    this._legend = el("p", { class: "legend" });
    this._facts = el("div");
    this._numTokens = 0;
    this.element = el(
      "article",
      { class: "turn answer", "aria-busy": "true" },
      el("h3", {}, "Answer"),
      this._text,
      this._legend,
      this._facts,
    );
  }

  /** What was said so far. */
  get text() {
    return this._first.textContent + this._rest.textContent;
  }

  get numTokens() {
    return this._numTokens;
  }

  /** Takes an event of the stream. */
  add(event) {
    if (event.twostroke) this._colour(event.twostroke.prefill_worker, event.twostroke.decode_worker);
    const choice = event.choices[0];
    if (!choice) return;
    const tokens = (choice.logprobs?.content ?? []).map((entry) => entry.token);
    let text = choice.delta.content ?? "";
    if (this._numTokens === 0) {
      const [first, rest] = splitFirst(text, tokens);
      this._first.textContent = first;
      text = rest;
    }
    if (text) this._rest.append(text);
    this._numTokens += tokens.length;
    this._rest.normalize();
  }

  /** The answer has ended: well, or in a way that a line says. */
  end(problem = "") {
    this.element.setAttribute("aria-busy", "false");
    if (problem) this._legend.before(el("p", { class: "problem" }, problem));
  }

  /** Shows what the router says of the request. */
  explain(request) {
    const { first_token_worker: first, token_worker: rest } = request;
    const { prefill, decode } = request.placement;
    this._colour(prefill, decode);
    const total = request.usage.completion_tokens;
    const parts = [];
    if (first && rest && first !== rest && total > 1) {
      parts.push(this._share(1, first, prefill), this._share(total - 1, rest, prefill));
    } else if (total && (first ?? rest)) parts.push(this._share(total, first ?? rest, prefill));
    this._legend.replaceChildren(...parts);
    const title = `First token after ${duration(request.ttft_s)}, then ${duration(request.itl_s)} a token`;
    const summary = el("summary", {}, title);
    this._facts.replaceWith(
      (this._facts = el(
        "details",
        { class: "timing", open: true },
        summary,
        ...bothWaterfalls(request.waterfalls),
        el("p", { class: "reason" }, request.placement.reason),
      )),
    );
  }

  /** Says why there is no explanation. */
  unexplained(message) {
    setText(this._legend, message);
  }

  /** Makes room for the next answer. */
  fold() {
    this._facts.open = false;
  }

  _share(tokens, worker, prefill) {
    const from = chip(this._roster, worker, worker === prefill ? "prefill" : "decode");
    return el("span", {}, `${plural(tokens, "token")} from `, from);
  }

  _colour(prefill, decode) {
    const rest = decode ? this._roster.hue(decode, "decode") : this._roster.hue(prefill, "prefill");
    this._rest.className = `piece ${rest}`;
    this._first.className = `piece first ${prefill ? this._roster.hue(prefill, "prefill") : rest}`;
    this._first.title = `first token: ${prefill ?? decode ?? "unknown"}`;
    this._rest.title = `from ${decode ?? prefill ?? "unknown"}`;
  }
}
