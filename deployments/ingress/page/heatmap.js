// Rows a second by layer and expert on a canvas: 61 x 256 cells a second are cheap there, and the cursor is ours.
import { byId, make, setText, shown } from "./dom.js";

// Cividis (Nuñez, Anderton, Renslow 2018): perceptually uniform, the same for colour-blind people.
const SCALE = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"]
  .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const FADE_MS = 12000, BUSIEST = 12;
const box = byId("heat"), canvas = box.querySelector("canvas"), still = matchMedia("(prefers-reduced-motion: reduce)");
let heat = null, names = [], cursor = [0, 0], lit = new Map(), timer = 0, focused = false;

function colour(share) {
  const at = Math.min(1, Math.max(0, share)) * (SCALE.length - 1), low = Math.min(SCALE.length - 2, Math.floor(at));
  return `rgb(${SCALE[low].map((from, i) => Math.round(from + (SCALE[low + 1][i] - from) * (at - low))).join(" ")})`;
}

export function showHeat(newest, groups) {
  heat = newest;
  names = groups.map((group) => group.name);
  const found = heat.layers.flatMap((layer, row) => heat.rows_per_s[row].map((rate, expert) => [rate, row, expert]));
  found.sort((a, b) => b[0] - a[0]);
  setText(byId("heat-max"), shown(found[0]?.[0] ?? 0, 1));
  byId("busiest").replaceChildren(...found.slice(0, BUSIEST).map(([rate, row, expert]) => make("tr", "",
    make("td", "", heat.layers[row]), make("td", "", expert), make("td", "", nameOf(row, expert)),
    make("td", "n", shown(rate, 1)))));
  if (focused) read();
  draw();
}

// experts: layer -> ids, as a chunk of an answer says them.
export function lightUp(experts) {
  for (const [layer, ids] of Object.entries(experts)) {
    for (const id of ids) lit.set(`${layer}/${id}`, performance.now());
  }
  draw();
}

export function clearLights() { lit.clear(); draw(); }

const nameOf = (row, expert) => names[heat.group[row][expert]] ?? "no group";

function draw() {
  clearTimeout(timer);
  if (!heat || !heat.layers.length) return;
  const wide = box.clientWidth, cellWide = wide / heat.experts;
  const cellHigh = Math.max(4, Math.min(28, Math.max(cellWide, 200 / heat.layers.length)));
  const dense = window.devicePixelRatio || 1, high = Math.round(cellHigh * heat.layers.length);
  if (canvas.width !== Math.round(wide * dense) || canvas.height !== Math.round(high * dense)) {
    canvas.width = Math.round(wide * dense);
    canvas.height = Math.round(high * dense);
    canvas.style.height = `${high}px`;
  }
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  pen.setTransform(dense, 0, 0, dense, 0, 0);
  const most = Math.max(1, ...heat.rows_per_s.map((rates) => Math.max(...rates)));
  heat.rows_per_s.forEach((rates, row) => rates.forEach((rate, expert) => {
    pen.fillStyle = heat.group[row][expert] < 0 ? style.getPropertyValue("--card") : colour(rate / most);
    pen.fillRect(expert * cellWide, row * cellHigh, cellWide + 0.5, cellHigh + 0.5);
  }));
  borders(pen, cellWide, cellHigh);
  lights(pen, cellWide, cellHigh, style.getPropertyValue("--lit"));
  if (focused) {
    pen.lineWidth = 2;
    pen.strokeStyle = "#fff";
    pen.strokeRect(cursor[1] * cellWide, cursor[0] * cellHigh, Math.max(4, cellWide), cellHigh);
  }
  if (lit.size && !still.matches) timer = setTimeout(draw, 100);
}

function borders(pen, cellWide, cellHigh) {
  const line = cellWide < 8 ? 1 : 2;
  pen.fillStyle = "#fff";
  heat.group.forEach((groups, row) => groups.forEach((group, expert) => {
    if (expert && groups[expert - 1] !== group) pen.fillRect(expert * cellWide - line / 2, row * cellHigh, line, cellHigh);
  }));
}

function lights(pen, cellWide, cellHigh, accent) {
  const rowOf = new Map(heat.layers.map((layer, row) => [String(layer), row])), now = performance.now();
  for (const [name, at] of lit) {
    const [layer, expert] = name.split("/"), left = still.matches ? 1 : 1 - (now - at) / FADE_MS;
    if (left <= 0) { lit.delete(name); continue; }
    if (!rowOf.has(layer)) continue;
    pen.globalAlpha = left;
    pen.strokeStyle = accent;
    pen.lineWidth = Math.min(3, Math.max(1, cellWide / 3));
    const inset = pen.lineWidth / 2 + 0.5;
    pen.strokeRect(expert * cellWide + inset, rowOf.get(layer) * cellHigh + inset,
      Math.max(0.5, cellWide - 2 * inset), Math.max(0.5, cellHigh - 2 * inset));
  }
  pen.globalAlpha = 1;
  box.dataset.lit = lit.size;
}

function read() {
  const [row, expert] = cursor;
  if (!heat || row >= heat.layers.length || expert >= heat.experts) return;
  setText(byId("cursor"), `Layer ${heat.layers[row]}, expert ${expert}, ${nameOf(row, expert)}: ` +
    `${shown(heat.rows_per_s[row][expert], 1)} rows/s`);
}

box.addEventListener("keydown", (event) => {
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!move || !heat) return;
  event.preventDefault();
  cursor = [Math.min(heat.layers.length - 1, Math.max(0, cursor[0] + move[0])),
    Math.min(heat.experts - 1, Math.max(0, cursor[1] + move[1]))];
  read();
  draw();
});
box.addEventListener("pointermove", (event) => {
  if (!heat?.layers.length) return;
  const area = canvas.getBoundingClientRect();
  const row = Math.floor(((event.clientY - area.top) / area.height) * heat.layers.length);
  const expert = Math.floor(((event.clientX - area.left) / area.width) * heat.experts);
  if (row < 0 || row >= heat.layers.length || expert < 0 || expert >= heat.experts) return;
  cursor = [row, expert];
  read();
});
box.addEventListener("focus", () => { focused = true; read(); draw(); });
box.addEventListener("blur", () => { focused = false; draw(); });
new ResizeObserver(draw).observe(box);
