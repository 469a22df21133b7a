// Makes elements. All data becomes text: nothing that comes from the server is ever read as markup.

export const byId = (id) => document.getElementById(id);

export function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

// A number as people read it; what nobody knows is a dash, never zero.
export function shown(value, digits = 0, unit = "") {
  if (value === null || value === undefined) return "–";
  return value.toLocaleString("en", { maximumFractionDigits: digits }) + unit;
}

export const clock = (unixS) => new Date(unixS * 1000).toLocaleTimeString("en-GB");

export function setText(element, text) {
  // Unchanged text is not written again: screen readers would repeat it.
  if (element.textContent !== text) element.textContent = text;
}
