// Server-sent events read with fetch, because an EventSource cannot send a key; and the picture's own stream.
import { headers, ask, accepted } from "./key.js";

const FIRST_MS = 1000, LONGEST_MS = 5000, SILENCE_MS = 10000;

// The data of each event of a response, as text. heard: called whenever bytes come.
export async function* events(response, heard = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      const parts = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// What the server says about its refusal: where it has no admin keys at all, no key will do.
async function sentence(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return "";
  }
}

// Never returns. show: one event. state: (word, Unix ms since when).
export async function follow(show, state) {
  let pause = FIRST_MS, since = null;
  for (;;) {
    const abort = new AbortController();
    let timer = 0;
    const heard = () => { clearTimeout(timer); timer = setTimeout(() => abort.abort(), SILENCE_MS); };
    try {
      heard();
      const response = await fetch("/dashboard/events", { headers: headers(), signal: abort.signal, cache: "no-store" });
      if (response.status === 401) {
        clearTimeout(timer);
        state("key needed", null);
        await ask(`The picture needs an admin key. ${await sentence(response)}`);
        continue;
      }
      if (!response.ok) throw new Error(`status ${response.status}`);
      accepted();
      for await (const data of events(response, heard)) {
        show(JSON.parse(data));
        since = null;
        pause = FIRST_MS;
        state("live", null);
      }
    } catch (error) {
      // Whatever it was, the cure is to ask again.
    }
    clearTimeout(timer);
    since ??= Date.now();
    state("reconnecting", since);
    await new Promise((done) => setTimeout(done, pause));
    pause = Math.min(LONGEST_MS, pause * 1.5);
  }
}
