// The load: synthetic users, and plots of what the engine does with them.

import { post } from "./api.js";
import { announce, byId, complain, counted, digits, element } from "./dom.js";
import { live, onLive, usersOf } from "./live.js";
import { ScatterPlot, TimePlot } from "./plot.js";

const SHOWN = 300; // seconds in the plots
const SMOOTHED = 5; // seconds that each drawn value is the mean of: dispatches report many rounds at once

const MEASURES = [
  { title: "Total speed", unit: "tokens/s", note: "of all users together", tone: "total", field: "tokens_per_second" },
  { title: "Speed of a user", unit: "tokens/s", note: "of each, in the mean", tone: "user", field: "tokens_per_second_per_user" },
  { title: "Verify budget", unit: "tokens", note: "verified per request and round; 1 is no draft", tone: "budget", field: "verified_per_round" },
  { title: "Load factor", unit: "×", note: "seconds of a round, by those that were predicted", tone: "factor", field: "load" },
];

let plots = [];
let budget = null; // budget against users
let frontier = null; // total speed against a user's
let marked = null; // time under the pointer
let asked = 0; // synthetic users that this page has asked for

export function startLoad() {
  const place = byId("plots");
  const follow = (time) => {
    marked = time;
    draw();
  };
  plots = MEASURES.map((measure) => new TimePlot(place, { ...measure, of: (point) => point[measure.field] }, follow));
  budget = new ScatterPlot(place, {
    title: "Budget by users",
    unit: "",
    note: "the verify budget in the mean of the time shown",
    tone: "budget",
    xName: "users →",
    trail: true,
  });
  frontier = new ScatterPlot(place, {
    title: "Trade-off",
    unit: "",
    note: "total speed against a user's, by the number of users",
    tone: "total",
    xName: "tokens/s of a user →",
    trail: true,
  });
  startUsers();
  onLive(allow);
  onLive(draw);
  new ResizeObserver(draw).observe(place);
}

function startUsers() {
  const slider = byId("users");
  let waiting = null;
  slider.addEventListener("input", () => {
    byId("users-count").textContent = slider.value;
    // A slider that is dragged says many numbers; only the one that it rests on is sent.
    clearTimeout(waiting);
    waiting = setTimeout(() => send(Number(slider.value)), 250);
  });
  byId("users-stop").addEventListener("click", () => {
    clearTimeout(waiting);
    slider.value = 0;
    byId("users-count").textContent = "0";
    send(0);
  });
  byId("users-form").addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("pagehide", () => {
    if (asked > 0) post("v1/synthetic", { users: 0 }, { keepalive: true }).catch(() => {});
  });
}

/** The slider follows what the server allows. */
function allow() {
  const synthetic = live.engine?.synthetic;
  if (!synthetic) return;
  byId("users").max = synthetic.most;
  byId("users").disabled = byId("users-stop").disabled = !synthetic.allowed;
  if (!synthetic.allowed) byId("users-note").textContent = "This server was started without synthetic users; the plots show its own.";
}

async function send(users) {
  try {
    await post("v1/synthetic", { users });
    asked = users;
    complain(null);
    announce(`${counted(users, "synthetic user")}.`);
  } catch (error) {
    complain(error);
    byId("users").value = asked;
    byId("users-count").textContent = String(asked);
  }
}

function draw() {
  if (byId("load").hidden || !live.points.length) return;
  const to = live.points.at(-1).time;
  // From the first user on, since there is nothing to see before.
  const busy = live.points.find((point) => point.time >= to - SHOWN && usersOf(point)) ?? live.points.at(-1);
  const from = Math.max(live.points[0].time, busy.time - 2);
  const points = smoothed(live.points.filter((point) => point.time >= from));
  for (const plot of plots) plot.draw(points, Math.min(from, to - 20), to, marked);
  budget.draw(byUsers(points, usersOf, (point) => point.verified_per_round));
  frontier.draw(byUsers(points, (point) => point.tokens_per_second_per_user, (point) => point.tokens_per_second));
  if (byId("load-table").open) tabulate(points.filter((point) => point.time > to - 60));
}

/** The points with every measure replaced by its mean over the last `SMOOTHED` seconds. */
function smoothed(points) {
  const fields = [...MEASURES.map((measure) => measure.field), "accepted_length"];
  return points.map((point, i) => {
    const recent = [];
    // Without users there is nothing to have a speed, and no zero that belongs into the mean.
    for (let j = i; j >= 0 && usersOf(points[j]) && points[j].time > point.time - SMOOTHED; j--) recent.push(points[j]);
    return { ...point, ...Object.fromEntries(fields.map((field) => [field, meanOf(recent.map((one) => one[field]))])) };
  });
}

/** Mean of the values that are there; null where none is. */
function meanOf(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

/** Means by the number of users. The time after that number changed says nothing of it, and is left out. */
function byUsers(points, x, y) {
  const groups = new Map();
  let since = 0; // when the present number of users began
  points.forEach((point, i) => {
    const users = usersOf(point);
    if (i === 0 || usersOf(points[i - 1]) !== users) since = point.time;
    if (!users || point.time < since + SMOOTHED || x(point) === null || y(point) === null) return;
    groups.set(users, [...(groups.get(users) ?? []), point]);
  });
  return [...groups]
    .sort(([a], [b]) => a - b)
    .map(([users, group]) => ({ users, x: meanOf(group.map(x)), y: meanOf(group.map(y)), seconds: lasting(group) }));
}

/** Whole seconds that a group of points stands for; they come at even steps. */
function lasting(group) {
  const step = live.points.length > 1 ? live.points.at(-1).time - live.points.at(-2).time : 1;
  return Math.round(group.length * step);
}

function tabulate(points) {
  const names = ["seconds ago", "users", "waiting", "tokens/s", "tokens/s of a user", "verified a round", "accepted length", "load factor"];
  const to = points.at(-1).time;
  const rows = [...points].reverse().map((point) => {
    const cells = [usersOf(point), point.waiting, ...[point.tokens_per_second, point.tokens_per_second_per_user, point.verified_per_round, point.accepted_length, point.load].map((value) => digits(value))];
    return element("tr", {}, element("th", { scope: "row" }, (to - point.time).toFixed(0)), ...cells.map((cell) => element("td", {}, String(cell))));
  });
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  byId("load-table")
    .querySelector(".scroll")
    .replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
}
