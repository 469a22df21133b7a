// Puts the parts together: one stream in, everything on the page out.
import { byId, clock, setText } from "./dom.js";
import { follow } from "./stream.js";
import { showHeat } from "./heatmap.js";
import { redraw, showRates } from "./rates.js";
import { showDecisions, showGroups, showHealth } from "./groups.js";
import { useModel } from "./prompt.js";

function show(event) {
  showHealth(event.health);
  showRates(event.time, event.rates);
  if (!event.cluster) return;
  setText(byId("model"), event.cluster.model);
  useModel(event.cluster.model);
  showHeat(event.heat, event.cluster.groups);
  showGroups(event.cluster.groups);
  showDecisions(event.cluster.decisions);
}

function state(word, sinceMs) {
  setText(byId("connection"), sinceMs === null ? word : `${word} since ${clock(sinceMs / 1000)}`);
  byId("connection").className = word === "live" ? "pill ok" : "pill bad";
  document.body.classList.toggle("stale", word !== "live");
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  setText(byId("theme"), name === "dark" ? "Light" : "Dark");
  byId("theme").setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
  redraw();
}

theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
byId("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
follow(show, state);
