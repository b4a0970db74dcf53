/** What state a cluster is in, in a word and a reason. */

import { plural } from "./format.js";

/**
 * The state of a cluster: `idle`, `serving`, `degraded` or `unreachable`, and why.
 *
 * `snapshot` is what /cluster said last, null before it said anything; `lost` are workers that were there a while ago;
 * `dependencies` says which of etcd and Redis answer the router; `isReached`, whether the router answered last.
 */
export function clusterState({ snapshot, lost, dependencies, isReached }) {
  if (!isReached) return { name: "unreachable", why: "the router does not answer; what you see is the last it said" };
  if (snapshot === null) return { name: "loading", why: "asking the router" };
  const reasons = [...troubles(snapshot.workers, lost), ...silent(dependencies)];
  if (reasons.length) return { name: "degraded", why: reasons.join("; ") };
  const live = snapshot.routers.reduce((sum, router) => sum + router.live, 0);
  return live ? { name: "serving", why: plural(live, "request") } : { name: "idle", why: "every worker is ready" };
}

function troubles(workers, lost) {
  const reasons = [];
  const ready = workers.filter((worker) => worker.state === "ready");
  if (!ready.some((worker) => worker.role === "decode"))
    reasons.push("no decode worker is ready, so nothing can be served");
  if (lost.length) reasons.push(`lost ${names(lost)}`);
  for (const state of ["connecting", "draining"]) {
    const some = workers.filter((worker) => worker.state === state);
    if (some.length) reasons.push(`${state}: ${names(some)}`);
  }
  const lostPrefill = lost.some((worker) => worker.role === "prefill");
  if (lostPrefill && !ready.some((worker) => worker.role === "prefill")) reasons.push("decode computes prompts too");
  return reasons;
}

const WITHOUT = {
  etcd: "etcd does not answer: new workers are not seen",
  redis: "Redis does not answer: cached prefixes are not found",
};

function silent(dependencies) {
  return Object.keys(WITHOUT)
    .filter((name) => dependencies[name] === false)
    .map((name) => WITHOUT[name]);
}

function names(workers) {
  const ids = workers.map((worker) => worker.id);
  return ids.length > 3 ? `${ids.slice(0, 3).join(", ")} and ${ids.length - 3} more` : ids.join(", ");
}
