// What the page asks its server, and how it reads the answers.

// A request that failed: what is wrong, and what to do about it.
export class ServerError extends Error {
  constructor(message, { remedy = "", status = 0, code = "" } = {}) {
    super(message);
    Object.assign(this, { remedy, status, code });
  }
}

const REMEDIES = {
  401: "Open this page with the address that the command printed; it contains the token.",
  403: "Open this page with the address that the command printed.",
  413: "Send a smaller file; `umbrella-jax serve --max-upload` raises the limit.",
  415: "Choose a NIfTI file (.nii or .nii.gz).",
  429: "The server is busy. Try again in a moment.",
};

async function errorOf(answer) {
  const body = await answer.json().catch(() => ({}));
  const message = body.error?.message ?? `The server answered ${answer.status} ${answer.statusText}`.trim();
  const wait = answer.headers.get("Retry-After");
  const remedy = answer.status === 429 && wait ? `The server is busy. Try again in ${wait} s.` : REMEDIES[answer.status];
  return new ServerError(message, { remedy, status: answer.status, code: body.error?.code });
}

async function request(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.", { remedy: "Check that `umbrella-jax serve` is still running." });
  }
  if (!answer.ok) throw await errorOf(answer);
  return answer;
}

export async function getJson(path) {
  return (await request(path)).json();
}

// The scans that the server has, and whether it lists only some of them.
export async function listScans() {
  const answer = await request("/api/scans");
  return { known: await answer.json(), isCut: answer.headers.get("Umbrella-List-Is-Cut") === "true" };
}

export async function getBytes(path) {
  return (await request(path)).arrayBuffer();
}

export async function uploadScan(file) {
  const form = new FormData();
  form.append("file", file);
  return (await request("/api/scans", { method: "POST", body: form })).json();
}

export async function deleteScan(id) {
  await request(`/api/scans/${encodeURIComponent(id)}`, { method: "DELETE" });
}

// Yield the JSON of each server-sent event until `[DONE]`. A caller that leaves the loop ends the request.
export async function* streamEvents(path, body, signal) {
  const answer = await request(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const broken = () => new ServerError("The answer broke off.", { remedy: "Check that `umbrella-jax serve` is still running, and ask again." });
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : broken(); });
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data:"))?.slice("data:".length).trim();
        if (data === "[DONE]") return;
        const content = data ? JSON.parse(data) : {};
        if (content.error) throw new ServerError(content.error.message);
        yield content;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  throw broken();
}
