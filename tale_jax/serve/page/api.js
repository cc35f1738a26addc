// The server's endpoints: JSON in, JSON or a stream of JSON out.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// What the page waits for: while there is any, `data-busy` of the document says so, and the cursor.
let waits = 0;

export function hold() {
  waits += 1;
  document.documentElement.dataset.busy = "";
}

export function release() {
  waits -= 1;
  if (!waits) delete document.documentElement.dataset.busy;
}

async function held(act) {
  hold();
  try {
    return await act();
  } finally {
    release();
  }
}

export function setKey(key) {
  sessionStorage.setItem("key", key);
}

function headers() {
  const key = sessionStorage.getItem("key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error?.message ?? `the server answered ${response.status}`);
}

export async function get(path, query = {}) {
  const names = new URLSearchParams(query).toString();
  const ask = () => fetch(names ? `${path}?${names}` : path, { headers: headers() });
  return held(async () => (await checked(await ask())).json());
}

export async function post(path, body, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  return held(async () => (await checked(await fetch(path, options))).json());
}

// The chunks of a text as it is written.
export async function* stream(path, body, signal) {
  const content = JSON.stringify({ ...body, stream: true });
  hold();
  try {
    const response = await checked(await fetch(path, { method: "POST", headers: headers(), body: content, signal }));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiError(0, "the stream was cut off");
      rest += value;
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(500, chunk.error.message);
        yield chunk;
      }
    }
  } finally {
    release();
  }
}
