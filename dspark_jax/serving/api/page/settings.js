// The settings that chat and race share, as fields of a request.

import { byId } from "./dom.js";

/**
 * What every request of this page carries.
 * @throws {Error} whose message says which field holds no number that can be used
 */
export function requestFields() {
  const body = {
    temperature: number("temperature", "The temperature", 0, 2),
    max_tokens: whole("max-tokens", "The most new tokens", 1),
    speculation: true,
    stream_options: { include_usage: true },
  };
  if (byId("seed").value.trim()) body.seed = whole("seed", "The seed", 0);
  // Sent only when asked for: templates without the switch have nothing to set.
  if (byId("thinking").checked) body.chat_template_kwargs = { enable_thinking: true };
  return body;
}

function number(id, name, least, most = Infinity) {
  const field = byId(id);
  const value = field.valueAsNumber;
  if (Number.isFinite(value) && value >= least && value <= most) {
    field.removeAttribute("aria-invalid");
    return value;
  }
  field.setAttribute("aria-invalid", "true");
  const bounds = most === Infinity ? `of at least ${least}` : `between ${least} and ${most}`;
  throw new Error(`${name} must be a number ${bounds}.`);
}

function whole(id, name, least) {
  const value = number(id, name, least);
  if (Number.isSafeInteger(value)) return value;
  byId(id).setAttribute("aria-invalid", "true");
  throw new Error(`${name} must be a whole number.`);
}

byId("settings").addEventListener("submit", (event) => event.preventDefault());
