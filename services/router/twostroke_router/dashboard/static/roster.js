/** What this page remembers of workers: their colours, their last minute, and those that are gone. */

export const SAMPLES = 60;
/** For how long a lost worker is shown, in milliseconds. */
export const LOST_MS = 120_000;
const HUES = 4;

/** Every worker seen, by id. */
export class Roster {
  constructor() {
    this._seen = new Map();
    this._counts = { prefill: 0, decode: 0 };
  }

  /** Takes what /cluster said at a time in milliseconds. */
  update(workers, nowMs) {
    const present = new Set(workers.map((worker) => worker.id));
    for (const worker of workers) {
      const entry = this._entry(worker.id, worker.role);
      entry.samples.push(activity(entry, worker, nowMs));
      if (entry.samples.length > SAMPLES) entry.samples.shift();
      entry.worker = worker;
      entry.seenMs = nowMs;
      entry.lostMs = null;
    }
    for (const [id, entry] of this._seen) {
      if (present.has(id) || entry.worker === null) continue;
      entry.lostMs ??= nowMs;
      // Who drained has left as it should.
      if (entry.worker.state === "draining" || nowMs - entry.lostMs > LOST_MS) {
        entry.worker = null;
        entry.samples = [];
      }
    }
  }

  /** The entries of a pool, by worker id: those that are there and those lost a while ago. */
  pool(role) {
    const entries = [...this._seen.values()].filter((entry) => entry.role === role && entry.worker !== null);
    return entries.sort((a, b) => a.id.localeCompare(b.id, undefined, { numeric: true }));
  }

  /** Workers that were there a while ago. */
  get lost() {
    return [...this._seen.values()].filter((entry) => entry.lostMs !== null && entry.worker !== null);
  }

  /** The class that colours a worker, the same wherever it is shown. */
  hue(id, role) {
    return id ? this._entry(id, role).hue : "hue-none";
  }

  _entry(id, role) {
    let entry = this._seen.get(id);
    if (!entry) {
      const hue = `hue-${role}-${this._counts[role]++ % HUES}`;
      entry = { id, role, hue, worker: null, seenMs: 0, lostMs: null, samples: [] };
      this._seen.set(id, entry);
    }
    return entry;
  }
}

/** How busy a worker was since it was seen last: prompt tokens a second on prefill, running sequences on decode. */
function activity(entry, worker, nowMs) {
  if (worker.role === "decode") return worker.load.running;
  if (entry.worker === null || nowMs <= entry.seenMs) return 0;
  return Math.max(0, ((worker.prompt_tokens - entry.worker.prompt_tokens) * 1000) / (nowMs - entry.seenMs));
}
