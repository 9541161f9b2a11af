// Plots in SVG: a measurement over time with the users behind it, and one measurement against another.

import { digits, drawn, element } from "./dom.js";
import { usersOf } from "./live.js";

const HEIGHT = 160;
const EDGE = { left: 40, right: 12, top: 10, bottom: 22 };

/** The least of 1, 2, 2.5 and 5 times a power of ten that is not below `value`. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  const factor = [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.9999);
  return factor * power;
}

/** Frame, title and scales that all plots share. */
class Plot {
  constructor(place, { title, unit, note, tone }) {
    this.title = title;
    this.unit = unit;
    this.value = element("output", { class: "value" }, "–");
    this.canvas = drawn("svg", { class: "canvas", role: "img", "aria-label": `${title}: no measurement yet` });
    this.figure = element(
      "figure",
      { class: `plot ${tone}` },
      element("figcaption", {}, element("h3", {}, title), element("p", { class: "now" }, this.value, ` ${unit}`), element("p", { class: "note" }, note)),
      this.canvas,
    );
    place.append(this.figure);
  }

  /** Clears the canvas at its present width, and sets the scales for values up to `x1` and `y1`. */
  frame(x0, x1, y1) {
    // Hidden views have no width; they are drawn once they are shown.
    this.width = this.canvas.clientWidth;
    this.canvas.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    const span = Math.max(x1 - x0, 1e-9);
    this.x = (value) => EDGE.left + ((value - x0) / span) * (this.width - EDGE.left - EDGE.right);
    this.y = (value) => HEIGHT - EDGE.bottom - (value / y1) * (HEIGHT - EDGE.top - EDGE.bottom);
    this.canvas.replaceChildren();
    for (const share of [0, 0.5, 1]) {
      const y = this.y(y1 * share);
      this.line("grid", EDGE.left, y, this.width - EDGE.right, y);
      this.text(EDGE.left - 6, y + 4, short(y1 * share), "end");
    }
    return this.width > EDGE.left + EDGE.right;
  }

  line(kind, x1, y1, x2, y2) {
    const line = drawn("line", { class: kind, x1, y1, x2, y2 });
    this.canvas.append(line);
    return line;
  }

  text(x, y, words, anchor = "middle", kind = "") {
    this.canvas.append(drawn("text", { x, y, "text-anchor": anchor, class: kind }, words));
  }

  path(kind, points, closed = false) {
    if (!points.length) return;
    const steps = points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`);
    this.canvas.append(drawn("path", { class: kind, d: steps.join("") + (closed ? "Z" : "") }));
  }
}

const short = (value) => (value >= 1000 ? `${value / 1000}k` : String(Number(value.toPrecision(3))));

/** A measurement over time. */
export class TimePlot extends Plot {
  /**
   * @param place element to draw in
   * @param options title, unit, note, tone, and `of`: a point's value, null where there is none
   * @param follow called with a time under the pointer, or null
   */
  constructor(place, options, follow) {
    super(place, options);
    this.of = options.of;
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const share = (event.clientX - box.left - EDGE.left) / (box.width - EDGE.left - EDGE.right);
      follow(this.from + Math.min(Math.max(share, 0), 1) * (this.to - this.from));
    };
    this.canvas.addEventListener("pointermove", at);
    this.canvas.addEventListener("pointerdown", at);
    this.canvas.addEventListener("pointerleave", () => follow(null));
  }

  /** Draws the points between two times, and the value at `marked`, or else the latest. */
  draw(points, from, to, marked) {
    [this.from, this.to] = [from, to];
    const known = points.filter((point) => this.of(point) !== null);
    const top = roundUp(Math.max(0, ...known.map(this.of)));
    if (!this.frame(from, to, top)) return;

    this.users(points);
    for (const run of runs(points, this.of)) {
      const line = run.map((point) => [this.x(point.time), this.y(this.of(point))]);
      this.path("area", [[line[0][0], this.y(0)], ...line, [line.at(-1)[0], this.y(0)]], true);
      this.path("line", line);
    }
    this.times(from, to);

    const shown = marked === null ? points.at(-1) : nearest(points, marked);
    this.mark(shown, marked);
    const value = shown ? this.of(shown) : null;
    this.value.textContent = digits(value);
    this.canvas.setAttribute("aria-label", `${this.title}: ${digits(value)} ${this.unit}, at most ${digits(top)} on the scale`);
  }

  /** Users in the background, as a share of the most that were there. */
  users(points) {
    const most = Math.max(1, ...points.map((point) => usersOf(point)));
    const height = this.y(0) - EDGE.top;
    const steps = points.flatMap((point, i) => {
      const y = this.y(0) - (usersOf(point) / most) * height;
      const next = points[i + 1] ?? point;
      return [[this.x(point.time), y], [this.x(next.time), y]];
    });
    if (!steps.length) return;
    this.path("users", [[steps[0][0], this.y(0)], ...steps, [steps.at(-1)[0], this.y(0)]], true);
    this.counts(points);
  }

  /** The number of users in the middle of each stretch that is wide enough for it. */
  counts(points) {
    let from = 0;
    for (let i = 1; i <= points.length; i++) {
      const users = usersOf(points[from]);
      if (i < points.length && usersOf(points[i]) === users) continue;
      const [left, right] = [this.x(points[from].time), this.x(points[Math.min(i, points.length - 1)].time)];
      if (users && right - left > 18) this.text((left + right) / 2, this.y(0) - 5, String(users), "middle", "count");
      from = i;
    }
  }

  times(from, to) {
    const every = [10, 15, 30, 60, 120].find((step) => (to - from) / step <= 5) ?? 300;
    for (let ago = 0; ago <= to - from; ago += every) {
      const words = ago === 0 ? "now" : ago % 60 === 0 ? `−${ago / 60} min` : `−${ago} s`;
      this.text(this.x(to - ago), HEIGHT - 5, words, ago === 0 ? "end" : "middle");
    }
  }

  mark(point, marked) {
    if (!point || this.of(point) === null) return;
    const [x, y] = [this.x(point.time), this.y(this.of(point))];
    if (marked !== null) this.line("cross", x, EDGE.top, x, this.y(0));
    this.canvas.append(drawn("circle", { class: "dot", cx: x, cy: y, r: 3.5 }));
  }
}

/** One measurement against another, a dot for each number of users. */
export class ScatterPlot extends Plot {
  constructor(place, options) {
    super(place, options);
    this.options = options;
  }

  /** @param rows [{users, x, y, seconds}] sorted by users */
  draw(rows) {
    const { xName, trail } = this.options;
    const right = roundUp(Math.max(1, ...rows.map((row) => row.x)) * 1.05);
    if (!this.frame(0, right, roundUp(Math.max(0, ...rows.map((row) => row.y)) * 1.1))) return;
    this.text(this.width - EDGE.right, HEIGHT - 5, xName, "end");
    for (const share of [0, 0.5]) this.text(this.x(right * share), HEIGHT - 5, short(right * share));
    if (trail) this.path("line thin", rows.map((row) => [this.x(row.x), this.y(row.y)]));
    for (const row of rows) {
      const dot = drawn("circle", { class: "dot", cx: this.x(row.x), cy: this.y(row.y), r: 4 });
      dot.append(drawn("title", {}, `${row.users} users: ${digits(row.y)}, over ${row.seconds} s`));
      this.canvas.append(dot);
      this.text(this.x(row.x), this.y(row.y) - 8, String(row.users));
    }
    const last = rows.at(-1);
    this.value.textContent = last ? `${digits(rows[0].y)} → ${digits(last.y)}` : "–";
    const said = rows.map((row) => `${digits(row.y)} at ${row.users} users`).join(", ");
    this.canvas.setAttribute("aria-label", `${this.title}: ${said || "no measurement yet"}`);
  }
}

/** Unbroken stretches of points with a value: a gap of three seconds or a missing value breaks the line. */
function runs(points, of) {
  const found = [];
  let before = null;
  for (const point of points) {
    const joined = before !== null && of(before) !== null && point.time - before.time < 3;
    if (of(point) !== null) {
      if (joined) found.at(-1).push(point);
      else found.push([point]);
    }
    before = point;
  }
  return found;
}

function nearest(points, time) {
  return points.reduce((best, point) => (!best || Math.abs(point.time - time) < Math.abs(best.time - time) ? point : best), null);
}
