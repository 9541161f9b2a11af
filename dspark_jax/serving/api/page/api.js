// Talks to the server that this page came from. Every failure is an Error whose message is a sentence for the reader.

/** A refusal or failure of the server; `status` is 0 where it was not reached. */
export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The API key, kept in this tab's session alone. */
export const key = {
  get: () => stored(() => sessionStorage.getItem("dspark-key")) || "",
  set: (value) => stored(() => sessionStorage.setItem("dspark-key", value)),
};

function stored(action) {
  try {
    return action();
  } catch {
    return null; // storage may be forbidden; the key is then asked for again
  }
}

// Relative to the page, so that the server may live below a path of a proxy.
const place = (path) => new URL(path, document.baseURI);

async function send(path, { body, signal, keepalive } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;

  let response;
  try {
    response = await fetch(place(path), {
      method: body === undefined ? "GET" : "POST",
      body: body === undefined ? undefined : JSON.stringify(body),
      headers,
      signal,
      keepalive,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer. Is it still running?", 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let said = "";
  try {
    said = (await response.json()).error?.message || "";
  } catch {
    // A proxy's own error page is not JSON, and says nothing that helps here.
  }

  if (response.status === 401) {
    return new Refusal("The server wants an API key, or another one than it was given: enter it at the top of the page.", 401);
  }
  if (response.status === 429) {
    const wait = Number(response.headers.get("Retry-After"));
    const when = wait > 0 ? `in ${wait} s` : "in a moment";
    return new Refusal(`The server is full: its queue holds no more requests. Try again ${when}.`, 429);
  }
  return new Refusal(said || `The server answered with status ${response.status} and no explanation.`, response.status);
}

/** A GET answered with JSON. */
export async function read(path) {
  return (await send(path)).json();
}

/** A POST answered with JSON; `keepalive` lets it outlive the page. */
export async function post(path, body, { keepalive } = {}) {
  return (await send(path, { body, keepalive })).json();
}

/** The chunks of a streamed chat completion, parsed, as they come. */
export async function* chat(body, signal) {
  const response = await send("v1/chat/completions", { body: { ...body, stream: true }, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.message || "The answer broke off in the server.", 500);
    yield chunk;
  }
  throw new Refusal("The connection was lost before the answer was complete.", 0);
}

/** The data of server-sent events: lines may be cut anywhere between two reads, characters too. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += decoder.decode(value, { stream: true });
      const lines = held.split(/\r?\n/);
      held = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The connection was lost before the answer was complete.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
