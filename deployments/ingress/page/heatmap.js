// Rows a second by layer and expert on a canvas: 61 x 256 cells a second are cheap there, and the cursor is ours.
import { byId, setText, shown } from "./dom.js";
import { addLights, clearLights as forget, lights, moving } from "./lights.js";
import { pixel } from "./scale.js";
import { nameOf, showTables } from "./table.js";

const FRAME_MS = 100, SMALL = 10;
const box = byId("heat"), canvas = box.querySelector("canvas"), pen = canvas.getContext("2d");
// One pixel a cell; drawing it larger is the browser's work.
const cells = document.createElement("canvas"), cellPen = cells.getContext("2d");
let heat = null, names = [], cursor = [0, 0], timer = 0, focused = false, wide = 0, high = 0, edge = "", lit = "";

export function showHeat(newest, groups) {
  heat = newest;
  names = groups.map((group) => group.name);
  paint();
  axes();
  showTables(heat, names);
  if (focused) read();
  draw();
}

export function lightUp(experts) { addLights(experts); draw(); }

export function clearLights() { forget(); draw(); }

function paint() {
  const most = Math.max(0, ...heat.rows_per_s.map((rates) => Math.max(...rates)));
  setText(byId("heat-max"), shown(most, 1));
  cells.width = Math.max(1, heat.experts);
  cells.height = Math.max(1, heat.layers.length);
  const image = cellPen.createImageData(cells.width, cells.height), pixels = new Uint32Array(image.data.buffer);
  // A cell of no group stays clear: the card is seen.
  heat.rows_per_s.forEach((rates, row) => rates.forEach((rate, expert) => {
    if (heat.group[row][expert] >= 0) pixels[row * heat.experts + expert] = pixel(rate / Math.max(1, most));
  }));
  cellPen.putImageData(image, 0, 0);
}

function axes() {
  const layers = heat.layers;
  setText(byId("axis-layers"), layers.length ? `Layers ${layers[0]} to ${layers.at(-1)}, top to bottom` : "");
  setText(byId("axis-experts"), heat.experts ? `Experts 0 to ${heat.experts - 1}, left to right` : "");
}

function draw() {
  clearTimeout(timer);
  if (!heat || !heat.layers.length || !box.clientWidth) return;
  const dense = window.devicePixelRatio || 1, style = getComputedStyle(document.documentElement);
  [edge, lit] = [style.getPropertyValue("--edge"), style.getPropertyValue("--lit")];
  wide = box.clientWidth;
  const layers = heat.layers.length;
  high = Math.round(layers * Math.max(4, Math.min(28, Math.max(wide / heat.experts, 200 / layers))));
  if (canvas.width !== Math.round(wide * dense) || canvas.height !== Math.round(high * dense)) {
    canvas.width = Math.round(wide * dense);
    canvas.height = Math.round(high * dense);
    canvas.style.height = `${high}px`;
  }
  pen.setTransform(dense, 0, 0, dense, 0, 0);
  pen.clearRect(0, 0, wide, high);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(cells, 0, 0, wide, high);
  borders();
  drawLights();
  if (focused) frame(cursor[0], cursor[1], 2, "#fff", 0);
  if (moving()) timer = setTimeout(draw, FRAME_MS);
}

// White beside black: one of the two is seen on any colour of the scale.
function borders() {
  const cellWide = wide / heat.experts, cellHigh = high / heat.layers.length, line = cellWide < 8 ? 1 : 2;
  const black = new Path2D(), white = new Path2D();
  heat.group.forEach((groups, row) => {
    for (let expert = 1; expert < groups.length; expert += 1) {
      if (groups[expert] === groups[expert - 1]) continue;
      black.rect(expert * cellWide, row * cellHigh, line, cellHigh);
      white.rect(expert * cellWide - line, row * cellHigh, line, cellHigh);
    }
  });
  pen.fillStyle = edge;
  pen.fill(black);
  pen.fillStyle = "#fff";
  pen.fill(white);
}

function drawLights() {
  const rowOf = new Map(heat.layers.map((layer, row) => [String(layer), row])), seen = lights();
  for (const { layer, expert, share } of seen) {
    const row = rowOf.get(layer);
    if (row === undefined || expert >= heat.experts) continue;
    // More than in proportion: half as often used is a third as strong, so the few stand out.
    pen.globalAlpha = Math.max(0.08, share ** 1.5);
    frame(row, expert, 0.5 + 3.5 * share ** 1.5, lit, 2);
  }
  pen.globalAlpha = 1;
  box.dataset.lit = seen.length;
  box.dataset.strongest = seen.slice(-3).reverse().map((each) => `${each.layer}/${each.expert}`).join(" ");
}

// A frame inside a cell, in `colour` with a dark edge within; as thick as fits.
function frame(row, expert, thick, colour, inset) {
  const cellWide = wide / heat.experts, cellHigh = high / heat.layers.length, small = Math.min(cellWide, cellHigh);
  if (small < SMALL) {
    // No room for a frame: the whole cell, larger than its neighbours by what it is thick.
    const more = thick / 2;
    pen.fillStyle = colour;
    pen.fillRect(expert * cellWide - more, row * cellHigh - more, cellWide + 2 * more, cellHigh + 2 * more);
    return;
  }
  const line = Math.min(thick, small / 3);
  for (const [width, style] of [[line + 2, edge], [line, colour]]) {
    pen.lineWidth = width;
    pen.strokeStyle = style;
    const away = inset + (line + 2) / 2;
    pen.strokeRect(expert * cellWide + away, row * cellHigh + away,
      Math.max(0.5, cellWide - 2 * away), Math.max(0.5, cellHigh - 2 * away));
  }
}

function read() {
  const [row, expert] = cursor;
  if (!heat || row >= heat.layers.length || expert >= heat.experts) return;
  byId("cursor").classList.remove("muted");
  setText(byId("cursor"), `Layer ${heat.layers[row]}, expert ${expert}, ${nameOf(heat, names, row, expert)}: ` +
    `${shown(heat.rows_per_s[row][expert], 1)} rows/s`);
}

const inside = (at, count) => Math.min(count - 1, Math.max(0, at));

box.addEventListener("keydown", (event) => {
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    Home: [0, -Infinity], End: [0, Infinity], PageUp: [-Infinity, 0], PageDown: [Infinity, 0] }[event.key];
  if (!move || !heat?.layers.length) return;
  event.preventDefault();
  cursor = [inside(cursor[0] + move[0], heat.layers.length), inside(cursor[1] + move[1], heat.experts)];
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
