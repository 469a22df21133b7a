// The API key: kept in this tab's session only, sent as a bearer token, asked for when the server says 401.
import { byId } from "./dom.js";

const NAME = "expertscale-key";
let waiting = [];

export function headers() {
  const key = sessionStorage.getItem(NAME);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// Shows the field; done once a key was given.
export function ask() {
  byId("key-form").hidden = false;
  return new Promise((done) => waiting.push(done));
}

export const accepted = () => { byId("key-form").hidden = true; };

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(NAME, byId("key").value.replace(/[^\x21-\x7e]/g, ""));
  byId("key").value = "";
  const told = waiting;
  waiting = [];
  for (const done of told) done();
});
