/** The live page: asks the router how it goes, and shows it. */

import { Api, ApiError } from "./api.js";
import { setAttribute, setText } from "./dom.js";
import { count, duration, median, percent } from "./format.js";
import { clusterState } from "./health.js";
import { KeyDialog } from "./key.js";
import { Playground } from "./playground.js";
import { LIMIT, Requests } from "./requests.js";
import { Roster } from "./roster.js";
import { mountTheme } from "./theme.js";
import { Pool } from "./workers.js";

const CLUSTER_MS = 1000;
const REQUESTS_MS = 2000;
const DEPENDENCIES_MS = 5000;
const MOST_MS = 15_000;

const find = (id) => document.getElementById(id);

const roster = new Roster();
const api = new Api((hadKey) => keys.refused(hadKey));
const keys = new KeyDialog(
  {
    dialog: find("key-dialog"),
    form: find("key-form"),
    input: find("key-input"),
    problem: find("key-problem"),
    cancel: find("key-cancel"),
    button: find("key-button"),
  },
  (key) => {
    api.key = key;
    loops.forEach((loop) => loop.now());
  },
);
const pools = {
  prefill: new Pool("prefill", find("prefill-workers"), find("prefill-count")),
  decode: new Pool("decode", find("decode-workers"), find("decode-count")),
};
const requests = new Requests({
  body: find("requests-body"),
  more: find("requests-more"),
  note: find("requests-note"),
  roster,
});
const seen = { snapshot: null, dependencies: {}, isReached: true };

function showCluster() {
  const now = Date.now();
  for (const role of ["prefill", "decode"]) if (seen.snapshot) pools[role].show(roster.pool(role), now);
  const lost = roster.lost.map((entry) => entry.worker);
  const { name, why } = clusterState({ ...seen, lost });
  setAttribute(find("state"), "data-state", name);
  setText(find("state-name"), name[0].toUpperCase() + name.slice(1));
  setText(find("state-why"), why);
  document.body.classList.toggle("stale", !seen.isReached);
}

async function lookAtCluster() {
  try {
    seen.snapshot = await api.cluster();
    seen.isReached = true;
    const { model, routers, workers } = seen.snapshot;
    roster.update(workers, Date.now());
    setText(find("model"), model);
    setText(find("router"), routers.map((router) => router.id).join(", "));
    setText(find("stat-live"), count(routers.reduce((sum, router) => sum + router.live, 0)));
    setText(find("stat-queued"), count(workers.reduce((sum, worker) => sum + worker.load.queued_tokens, 0)));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    seen.isReached = error.status !== 0 && error.status < 500;
    throw error;
  } finally {
    showCluster();
  }
}

async function lookAtRequests() {
  try {
    const latest = await api.requests(LIMIT);
    requests.show(latest);
    const sum = (name) => latest.reduce((total, request) => total + request.usage[name], 0);
    setText(find("stat-ttft"), duration(median(latest.map((request) => request.ttft_s))));
    setText(find("stat-itl"), duration(median(latest.map((request) => request.itl_s))));
    setText(
      find("stat-hits"),
      percent(latest.length ? sum("cached_tokens") / Math.max(1, sum("prompt_tokens")) : null),
    );
  } catch (error) {
    if (error instanceof ApiError)
      requests.fail(error.status === 401 ? "An API key is needed to see requests." : `${error.message}.`);
    throw error;
  }
}

async function lookAtDependencies() {
  seen.dependencies = await api.dependencies();
}

/** Looks again and again, less often while it fails, not at all while nobody sees the page. */
class Loop {
  constructor(look, everyMs) {
    this._look = look;
    this._everyMs = everyMs;
    this._waitMs = everyMs;
    this._timer = 0;
    this._isRunning = false;
    this._isWanted = false;
    document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(this._timer) : this.now()));
    this.now();
  }

  async now() {
    clearTimeout(this._timer);
    this._isWanted = this._isRunning;
    if (this._isRunning) return;
    this._isRunning = true;
    try {
      await this._look();
      this._waitMs = this._everyMs;
    } catch (error) {
      if (!(error instanceof ApiError)) console.error(error);
      this._waitMs = Math.min(MOST_MS, this._waitMs * 2);
    } finally {
      this._isRunning = false;
    }
    if (!document.hidden) this._timer = setTimeout(() => this.now(), this._isWanted ? 0 : this._waitMs);
  }
}

mountTheme(find("theme-button"));
new Playground({
  api,
  roster,
  onEnd: () => loops.forEach((loop) => loop.now()),
  elements: {
    form: find("chat-form"),
    log: find("chat-log"),
    text: find("chat-text"),
    send: find("chat-send"),
    clear: find("chat-clear"),
    status: find("chat-status"),
    problem: find("chat-problem"),
    settings: find("chat-settings"),
    system: find("chat-system"),
    temperature: find("chat-temperature"),
    tokens: find("chat-tokens"),
  },
});
const loops = [
  new Loop(lookAtCluster, CLUSTER_MS),
  new Loop(lookAtRequests, REQUESTS_MS),
  new Loop(lookAtDependencies, DEPENDENCIES_MS),
];
