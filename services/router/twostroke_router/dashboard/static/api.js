/** The router's API as this page uses it: the same endpoints as everybody's. */

const KEY = "twostroke-api-key";

/** An answer that is no success. `status` is 0 when the router was not reached. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Calls to the router that this page came from. */
export class Api {
  /** `onRefused` is called when the router wants a key, or another one. */
  constructor(onRefused) {
    this._onRefused = onRefused;
  }

  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  }

  set key(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  }

  cluster() {
    return this._json("cluster");
  }

  async requests(limit) {
    return (await this._json(`requests?limit=${limit}`)).requests;
  }

  request(id) {
    return this._json(`requests/${encodeURIComponent(id)}`);
  }

  /** Whether etcd and Redis answer this router, by name. */
  async dependencies() {
    const text = await (await this._fetch("metrics", { signal: AbortSignal.timeout(10_000) })).text();
    const found = text.matchAll(/^twostroke_dependency_up\{dependency="(\w+)"\} (\S+)$/gm);
    return Object.fromEntries(Array.from(found, ([, name, value]) => [name, Number(value) === 1]));
  }

  /** Streams a chat answer. Calls `onEvent` with each event; resolves to the request's id. */
  async chat(body, { signal, onEvent }) {
    const headers = { "Content-Type": "application/json", "X-Twostroke-Explain": "1" };
    const response = await this._fetch("v1/chat/completions", {
      method: "POST",
      headers,
      body: JSON.stringify({ ...body, stream: true }),
      signal,
    });
    const id = response.headers.get("x-request-id");
    onEvent({ id });
    for await (const event of serverEvents(response.body)) {
      if (event.error) throw new ApiError(200, event.error.message);
      onEvent({ event });
    }
    return id;
  }

  async _json(path) {
    return (await this._fetch(path, { signal: AbortSignal.timeout(10_000) })).json();
  }

  async _fetch(path, { headers = {}, ...options }) {
    const key = this.key;
    let response;
    try {
      response = await fetch(path, {
        ...options,
        headers: key ? { ...headers, Authorization: `Bearer ${key}` } : headers,
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "the router does not answer");
    }
    if (response.ok) return response;
    // Another key may have been given since: then this refusal says nothing.
    if (response.status === 401 && key === this.key) this._onRefused(key !== "");
    throw new ApiError(response.status, await messageOf(response), response.headers.get("retry-after"));
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the router answered ${response.status}`;
  }
}

/** The events of a stream of server-sent events, up to `[DONE]`; an ApiError if the stream ends without it. */
export async function* serverEvents(body) {
  let rest = "";
  for await (const text of textOf(body)) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
  throw new ApiError(0, "the answer broke off");
}

async function* textOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
