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

// An id as it fits a table: what follows the last "#", of a long hexadecimal one the first 8 digits. The whole of it
// is for setName.
export function short(id) {
  const own = id.slice(id.lastIndexOf("#") + 1) || id;
  return /^[0-9a-f]{12,}$/i.test(own) ? own.slice(0, 8) : own;
}

// The whole text of a cell that shows less: on hovering, and for screen readers.
export function setName(element, text) {
  if (element.title === text) return;
  element.title = text;
  element.setAttribute("aria-label", text);
}

const kept = new WeakMap();

// Makes the children of `parent` those of `items`, in order, each known by its key: what stays is filled anew and not
// touched otherwise, so that focus, selection and scroll position stay.
export function keep(parent, items, keyOf, build, fill) {
  const before = kept.get(parent) ?? new Map(), now = new Map();
  for (const item of items) {
    const key = keyOf(item);
    if (!now.has(key)) now.set(key, [before.get(key)?.[0] ?? build(item), item]);
  }
  for (const [key, [child]] of before) if (!now.has(key)) child.remove();
  let at = parent.firstChild;
  for (const [child, item] of now.values()) {
    fill(child, item);
    if (child === at) at = at.nextSibling; else parent.insertBefore(child, at);
  }
  kept.set(parent, now);
}
