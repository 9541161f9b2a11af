// What the engine measures about itself, asked for again and again while the page is in sight.

import { read } from "./api.js";

const KEPT = 600; // seconds of history that the plots can show
const EVERY = 1000; // milliseconds between two questions

export const live = {
  points: [], // oldest first
  engine: null, // the latest account: model, policy, block, synthetic
};

/** Users at a point: synthetic ones count even in the moment between two of their requests. */
export const usersOf = (point) => Math.max(point.synthetic, point.running + point.waiting);

const listeners = new Set();
let since = 0;
let failed = null;

/** Calls `listener(error or null)` after every answer of the server, and after every failure. */
export function onLive(listener) {
  listeners.add(listener);
}

export function startLive() {
  // Asked again only after the answer, so that a slow server never has two questions of ours.
  const ask = async () => {
    if (!document.hidden) await once();
    setTimeout(ask, EVERY);
  };
  document.addEventListener("visibilitychange", () => document.hidden || once());
  ask();
}

async function once() {
  try {
    take(await read(`v1/speculation?since=${since}`));
    failed = null;
  } catch (error) {
    failed = error;
  }
  for (const listener of listeners) listener(failed);
}

function take(account) {
  live.engine = account;
  // A server that was started again counts from the beginning; the next question gets all that it has.
  if (account.recent.index + 1 < since) [live.points, since] = [[], 0];
  else live.points.push(...account.points);
  if (account.points.length) since = account.points.at(-1).index + 1;
  const oldest = (live.points.at(-1)?.time ?? 0) - KEPT;
  live.points = live.points.filter((point) => point.time >= oldest);
}
