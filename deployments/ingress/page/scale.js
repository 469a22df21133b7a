// The heat scale: Cividis (Nuñez, Anderton, Renslow 2018), perceptually uniform and the same for colour-blind people.
const STOPS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"]
  .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const STEPS = 256;

// One pixel a step as canvas image data has it (red in the lowest byte), made once: a frame only looks up.
const PIXELS = Uint32Array.from({ length: STEPS }, (_, step) => {
  const at = (step / (STEPS - 1)) * (STOPS.length - 1), low = Math.min(STOPS.length - 2, Math.floor(at));
  const [red, green, blue] = STOPS[low].map((from, i) => Math.round(from + (STOPS[low + 1][i] - from) * (at - low)));
  return (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
});

// share: 0 to 1 of the most; what is outside is cut.
export const pixel = (share) => PIXELS[Math.round(Math.min(1, Math.max(0, share)) * (STEPS - 1))];
