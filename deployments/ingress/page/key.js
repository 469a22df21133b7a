// The API key: kept in this tab's session only, sent as a bearer token, asked for when the server says 401.
import { byId, setText } from "./dom.js";

const NAME = "expertscale-key";
let waiting = [];

export function headers() {
  const key = sessionStorage.getItem(NAME);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// Shows the field; done once a key was given. why: a sentence under the field. signal: gives up waiting (AbortError).
export function ask(why, signal = null) {
  setText(byId("key-note"), `${why} It is kept in this tab only.`);
  byId("key-form").hidden = false;
  return new Promise((done, stop) => {
    const give = () => { waiting = waiting.filter((each) => each !== done); accepted(); stop(signal.reason); };
    signal?.addEventListener("abort", give, { once: true });
    waiting.push(done);
  });
}

export const focus = () => byId("key").focus();

// Hides the field, unless somebody else still waits for a key.
export const accepted = () => { if (!waiting.length) byId("key-form").hidden = true; };

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(NAME, byId("key").value.replace(/[^\x21-\x7e]/g, ""));
  byId("key").value = "";
  const told = waiting;
  waiting = [];
  for (const done of told) done();
});
