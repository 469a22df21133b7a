// The picture as text: the busiest experts, and all of them while somebody has that table open.
import { byId, keep, make, setText, shown } from "./dom.js";

const BUSIEST = 12, ALL_AT_ONCE = 2048;
const NONE = "no group";
let last = null, built = "";

export const nameOf = (heat, names, row, expert) => names[heat.group[row][expert]] ?? NONE;

export function showTables(heat, names) {
  last = { heat, names };
  keep(byId("busiest"), busiest(heat), (each) => `${each.row}/${each.expert}`,
    line, (tr, { row, expert, rate }) => fill(tr, heat.layers[row], expert,
      nameOf(heat, names, row, expert), shown(rate, 1)));
  chooser(heat);
  showAll();
}

// The BUSIEST of the cells that have any rows, by insertion: 15,616 cells are not sorted for twelve.
function busiest(heat) {
  const found = [];
  heat.rows_per_s.forEach((rates, row) => rates.forEach((rate, expert) => {
    if (rate <= 0 || (found.length === BUSIEST && rate <= found[BUSIEST - 1].rate)) return;
    const at = found.findIndex((each) => each.rate < rate);
    found.splice(at < 0 ? found.length : at, 0, { rate, row, expert });
    if (found.length > BUSIEST) found.pop();
  }));
  return found;
}

const line = () => make("tr", "", make("td", ""), make("td", ""), make("td", ""), make("td", "n"));

function fill(tr, ...texts) { texts.forEach((text, at) => setText(tr.children[at], String(text))); }

function chooser(heat) {
  // A large model is shown by layer: all of 61 x 256 took 0.7 s a second to lay out, 256 lines take 0.03 s.
  const large = heat.layers.length * heat.experts > ALL_AT_ONCE, select = byId("all-layer");
  const options = [...(large ? [] : ["all"]), ...heat.layers.map(String)];
  if ([...select.options].map((each) => each.value).join() === options.join()) return;
  const name = (value) => (value === "all" ? "All layers" : `Layer ${value}`);
  select.replaceChildren(...options.map((value) => new Option(name(value), value)));
}

function showAll() {
  if (!last || !byId("all").open) return;
  const { heat, names } = last, body = byId("all-experts"), chosen = byId("all-layer").value;
  const rows = [...heat.layers.keys()].filter((row) => chosen === "all" || String(heat.layers[row]) === chosen);
  const shape = `${rows.map((row) => heat.layers[row])}x${heat.experts}`;
  if (built !== shape) {
    body.replaceChildren(...Array.from({ length: rows.length * heat.experts }, line));
    built = shape;
  }
  let at = body.firstChild;
  for (const row of rows) {
    for (let expert = 0; expert < heat.experts; expert += 1, at = at.nextSibling) {
      fill(at, heat.layers[row], expert, nameOf(heat, names, row, expert), shown(heat.rows_per_s[row][expert], 1));
    }
  }
}

byId("all").addEventListener("toggle", showAll);
byId("all-layer").addEventListener("change", showAll);
