// The experts that a prompt used. A cell's weight is how often it was used, halved every HALF_MS, and it is drawn by
// its share of the largest weight so far: what was used most stands out, and all of it fades when the answer ends.
// Example: used 3 times and once just now: 1 and 1/3; HALF_MS later 1/2 and 1/6.
const HALF_MS = 4000, SEEN_FROM = 0.04;
const still = matchMedia("(prefers-reduced-motion: reduce)");
let lit = new Map(), most = 0;

// Nothing fades for people who want no motion: the weights stay as counted until the next prompt.
const left = (light, now) => (still.matches ? light.weight : light.weight * 0.5 ** ((now - light.at) / HALF_MS));

// experts: layer -> ids, as a chunk of an answer says them.
export function addLights(experts, now = performance.now()) {
  for (const [layer, ids] of Object.entries(experts)) {
    for (const id of ids) {
      const name = `${layer}/${id}`, light = lit.get(name);
      const weight = (light ? left(light, now) : 0) + 1;
      lit.set(name, { layer, expert: Number(id), weight, at: now });
      most = Math.max(most, weight);
    }
  }
}

export function clearLights() { lit = new Map(); most = 0; }

// Those still seen, faintest first so that the strong ones lie on top: {layer, expert, share: 0 to 1}.
export function lights(now = performance.now()) {
  const seen = [];
  for (const [name, light] of lit) {
    const share = left(light, now) / most;
    if (share < SEEN_FROM) lit.delete(name); else seen.push({ layer: light.layer, expert: light.expert, share });
  }
  return seen.sort((a, b) => a.share - b.share);
}

export const moving = () => lit.size > 0 && !still.matches;
