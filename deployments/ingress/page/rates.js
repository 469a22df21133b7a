// The numbers on top, each with its last two minutes as a line by Plotly.
import { byId, make, setText, shown } from "./dom.js";

const KEPT = 120;
const RATES = [["tokens_per_s", "Tokens/s", "", 1], ["requests_running", "Running", "", 0],
  ["requests_waiting", "Waiting", "", 0], ["ttft_p95_ms", "First token p95", " ms", 0],
  ["tpot_p95_ms", "Each next token p95", " ms", 1]];
const tiles = new Map(RATES.map(([key, title]) => {
  const number = make("strong", "", "–"), chart = make("div", "chart");
  chart.setAttribute("aria-hidden", "true");
  byId("rates").append(make("div", "card tile", make("span", "muted", title), number, chart));
  return [key, { number, chart, times: [], values: [] }];
}));

export function showRates(timeS, rates) {
  for (const [key, , unit, digits] of RATES) {
    const tile = tiles.get(key);
    setText(tile.number, shown(rates[key], digits, rates[key] === null ? "" : unit));
    tile.times.push(new Date(timeS * 1000));
    tile.values.push(rates[key]);
    if (tile.times.length > KEPT) { tile.times.shift(); tile.values.shift(); }
    draw(tile);
  }
}

export function redraw() { for (const tile of tiles.values()) draw(tile); }

function draw({ chart, times, values }) {
  if (!window.Plotly || document.hidden) return;
  const accent = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
  // Copies: Plotly takes an array that it has seen before for unchanged.
  window.Plotly.react(chart, [{ x: [...times], y: [...values], mode: "lines", line: { color: accent, width: 2 } }], {
    height: 44, margin: { l: 0, r: 0, t: 2, b: 2 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false, xaxis: { visible: false }, yaxis: { visible: false, rangemode: "tozero" },
  }, { staticPlot: true, responsive: true });
}
