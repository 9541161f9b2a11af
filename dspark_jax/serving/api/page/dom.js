// Small helpers for building the page. Text is always set as text, never parsed as HTML.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; children may be strings. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** An SVG element with attributes. */
export function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A number in few digits: 1.28, 12.8, 128. */
export function digits(value, least = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const places = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return value.toFixed(Math.max(least, places));
}

export const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

export const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** Says a sentence to screen readers without moving anything on the page. */
export function announce(sentence) {
  byId("status").textContent = sentence;
}

/** Shows a failure as a sentence; nothing hides it. */
export function complain(error) {
  const alert = byId("alert");
  alert.textContent = error ? error.message : "";
  alert.hidden = !error;
  if (error?.status === 401) byId("connection").open = true;
}

/** A text field that grows with its text and submits its form on Enter; Shift+Enter makes a line. */
export function growing(area) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight + 2, 220)}px`;
  };
  area.addEventListener("input", fit);
  new ResizeObserver(fit).observe(area); // its text wraps otherwise at another width
  area.addEventListener("keydown", (event) => {
    // An input method's Enter picks a candidate and must not send.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    area.form.requestSubmit();
  });
  return fit;
}
