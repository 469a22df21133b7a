// The prompt box: streams an answer and lights up the experts it used.
import { byId, setText } from "./dom.js";
import { accepted, ask, focus, headers } from "./key.js";
import { events } from "./stream.js";
import { clearLights, lightUp } from "./heatmap.js";

const MAX_TOKENS = 96;
let abort = null, model = "";

export function useModel(name) { model = name; }

const post = (path, body) => fetch(path, {
  method: "POST", signal: abort.signal,
  headers: { ...headers(), "Content-Type": "application/json", "x-expertscale-experts": "true" },
  body: JSON.stringify({ model, stream: true, max_tokens: MAX_TOKENS, ...body }),
});

async function refusal(response) {
  const body = await response.json().catch(() => null);
  return body?.error ?? { message: `The server answered ${response.status}.` };
}

// A model without a chat template is asked to go on with the text itself.
async function start(text) {
  const chat = await post("/v1/chat/completions", { messages: [{ role: "user", content: text }] });
  if (chat.status !== 400) return chat;
  const why = await refusal(chat);
  if (why.code !== "no_chat_template") throw new Error(why.message);
  return post("/v1/completions", { prompt: text });
}

async function run(text) {
  let response = await start(text);
  for (let tries = 0; response.status === 401; tries += 1) {
    setText(byId("prompt-state"), tries ? "That key was refused. Another one is needed." : "A key is needed.");
    const given = ask(tries ? "The prompt's key was refused." : "The prompt needs a key.", abort.signal);
    focus();
    await given;
    setText(byId("prompt-state"), "Answering");
    response = await start(text);
  }
  accepted();
  if (!response.ok) throw new Error((await refusal(response)).message);
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.experts) lightUp(chunk.experts);
    const choice = chunk.choices?.[0];
    byId("answer").append(choice?.delta?.content ?? choice?.text ?? "");
  }
}

byId("prompt-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (abort) return;
  abort = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  byId("answer").replaceChildren();
  clearLights();
  setText(byId("prompt-state"), "Answering");
  try {
    await run(byId("prompt").value);
    setText(byId("prompt-state"), "Done");
  } catch (error) {
    setText(byId("prompt-state"), error.name === "AbortError" ? "Stopped" : error.message);
  }
  abort = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
});
byId("stop").addEventListener("click", () => abort?.abort());
