/** The playground: a conversation with the served model. */

import { ApiError } from "./api.js";
import { Answer } from "./answer.js";
import { el, setText } from "./dom.js";
import { plural } from "./format.js";

/** When to ask for the explanation of a request that has just ended: it is written a moment later. */
const EXPLAINED_AFTER_MS = [50, 150, 400, 1000, 2500];
const NEAR_PX = 80;

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** The panel with the conversation. `onEnd` is called at the end of each answer, good or bad. */
export class Playground {
  constructor({ api, roster, elements, onEnd }) {
    this._api = api;
    this._roster = roster;
    this._elements = elements;
    this._onEnd = onEnd;
    this._turns = [];
    this._answer = null;
    this._stop = null;
    this._welcome();
    const { form, text, clear, settings } = elements;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this._stop) this._stop.abort();
      else this._send();
    });
    text.addEventListener("keydown", (event) => this._onKey(event));
    form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      if (this._stop) this._stop.abort();
      else if (settings.open && settings.contains(document.activeElement)) {
        settings.open = false;
        settings.querySelector("summary").focus();
      }
    });
    clear.addEventListener("click", () => this._clear());
  }

  _onKey(event) {
    // While an input method composes, Enter chooses a character.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this._stop) this._send();
  }

  _welcome() {
    const words =
      "Ask something. The answer is coloured by the worker that made each token, and shows where its time went.";
    this._elements.log.replaceChildren(el("p", { class: "empty" }, words));
  }

  _clear() {
    this._stop?.abort();
    this._turns = [];
    this._answer = null;
    this._welcome();
    this._problem("");
    setText(this._elements.status, "nothing asked yet");
    this._elements.text.focus();
  }

  async _send() {
    const question = this._elements.text.value.trim();
    const options = this._options();
    if (!question || !options) return;
    this._begin(question);
    const answer = this._answer;
    const stop = (this._stop = new AbortController());
    let id = null;
    try {
      const { system, ...sampling } = options;
      const messages = [...(system ? [{ role: "system", content: system }] : []), ...this._turns];
      const take = ({ id: given, event }) => {
        id = given ?? id;
        if (event) this._follow(() => answer.add(event));
      };
      await this._api.chat({ messages, logprobs: true, ...sampling }, { signal: stop.signal, onEvent: take });
      this._over(answer, "done");
    } catch (error) {
      this._failed(answer, error, question);
    } finally {
      this._stop = null;
      setText(this._elements.send, "Send");
      this._onEnd();
    }
    if (id && this._answer === answer) await this._explain(answer, id);
  }

  _begin(question) {
    const { log, text, send, status } = this._elements;
    if (!this._turns.length) log.replaceChildren();
    this._answer?.fold();
    this._answer = new Answer(this._roster);
    this._turns.push({ role: "user", content: question });
    log.append(
      el("article", { class: "turn question" }, el("h3", {}, "You"), el("p", { class: "text" }, question)),
      this._answer.element,
    );
    log.scrollTop = log.scrollHeight;
    text.value = "";
    this._problem("");
    setText(send, "Stop");
    setText(status, "answering");
  }

  /** An answer has ended; with no text, it is as if nothing had been asked. */
  _over(answer, word) {
    answer.end();
    if (answer.text) this._turns.push({ role: "assistant", content: answer.text });
    else this._turns.pop();
    setText(this._elements.status, `${word}, ${plural(answer.numTokens, "token")}`);
  }

  _failed(answer, error, question) {
    if (error.name === "AbortError") {
      if (this._answer === answer) this._over(answer, "stopped");
      return;
    }
    const after = error instanceof ApiError && error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    const message = error instanceof ApiError ? error.message : "the answer broke off";
    answer.end(answer.text ? `Broken off: ${message}.` : "");
    this._turns.pop();
    if (!answer.text) {
      // Nothing was said: as if it had not been asked, with the question ready to be sent again.
      answer.element.previousElementSibling?.remove();
      answer.element.remove();
      this._answer = null;
      if (!this._turns.length) this._welcome();
      this._elements.text.value ||= question;
    }
    this._problem(`${message}.${after}`);
    setText(this._elements.status, "failed");
  }

  async _explain(answer, id) {
    for (const ms of EXPLAINED_AFTER_MS) {
      await pause(ms);
      try {
        const request = await this._api.request(id);
        this._follow(() => answer.explain(request));
        return;
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 404) break;
      }
    }
    answer.unexplained("No explanation of this answer is to be had.");
  }

  /** Changes the log, and stays at its end if that is where the reader is. */
  _follow(change) {
    const { log } = this._elements;
    const isNear = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
    change();
    if (isNear) log.scrollTop = log.scrollHeight;
  }

  /** What the settings say, or null, having said what is wrong with them. */
  _options() {
    const { system, temperature, tokens, settings } = this._elements;
    for (const [input, message] of [
      [temperature, "temperature: a number from 0 to 2"],
      [tokens, "most tokens: a whole number from 1"],
    ]) {
      if (input.checkValidity()) continue;
      settings.open = true;
      input.focus();
      this._problem(message);
      return null;
    }
    return { system: system.value.trim(), temperature: Number(temperature.value), max_tokens: Number(tokens.value) };
  }

  _problem(message) {
    setText(this._elements.problem, message);
  }
}
