// The race: one question plainly and with drafts, in turns, so that each run has the engine to itself.

import { Answer } from "./answer.js";
import { chat } from "./api.js";
import { announce, byId, complain, counted, digits, element, growing, seconds } from "./dom.js";
import { live } from "./live.js";
import { median, shared } from "./rounds.js";
import { requestFields } from "./settings.js";

let running = null;

export function startRace() {
  growing(byId("race-question"));
  byId("race-question").value = "Henry has 48 shirts and sells half of them. Then Henry loses 3 and buys 14 more. How many shirts does Henry have?";
  byId("race-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = byId("race-question").value.trim();
    if (question && !running) race(question);
  });
  byId("race-stop").addEventListener("click", () => running?.abort());
}

async function race(question) {
  let body;
  try {
    body = { ...requestFields(), messages: [{ role: "user", content: question }] };
  } catch (error) {
    complain(error);
    return;
  }
  // Above temperature 0 only runs of one seed can be compared token for token.
  if (body.temperature > 0 && body.seed === undefined) body.seed = 0;

  complain(null);
  byId("verdict").hidden = true;
  const began = live.points.at(-1)?.time ?? 0;
  const lanes = [
    new Lane("lane-plain", { ...body, policy: "plain" }),
    new Lane("lane-drafts", body),
  ];
  running = new AbortController();
  busy(true);
  try {
    const runs = Number(byId("race-runs").value);
    for (let run = 0; run < runs; run++) {
      // Every other pair runs in the other order, so that a machine that slows down favours neither.
      for (const lane of run % 2 ? [...lanes].reverse() : lanes) await lane.run(running.signal);
    }
    judge(lanes, body, othersSince(began));
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
    else announce("The race was stopped.");
  }
  for (const lane of lanes) lane.answer?.end();
  running = null;
  busy(false);
}

/** One side of the race; times are seconds from sending to the last chunk. */
class Lane {
  constructor(id, body) {
    this.place = byId(id);
    this.body = body;
    this.times = [];
    this.answers = [];
    this.clock("–");
    this.bar(0);
    this.place.querySelector(".facts").replaceChildren();
    this.place.querySelector(".answer").replaceChildren();
  }

  async run(signal) {
    this.answer = new Answer(this.place.querySelector(".answer"), null);
    const sent = performance.now();
    const tick = setInterval(() => this.clock(seconds((performance.now() - sent) / 1000)), 100);
    this.place.classList.add("running");
    try {
      for await (const chunk of chat(this.body, signal)) {
        const choice = chunk.choices[0];
        if (choice?.speculation) this.answer.add(choice.speculation);
      }
      this.times.push((performance.now() - sent) / 1000);
      this.answers.push(this.answer);
    } finally {
      clearInterval(tick);
      this.place.classList.remove("running");
      this.answer.end();
    }
    this.show();
  }

  get time() {
    return median(this.times);
  }

  show() {
    const { tokens, rounds, acceptedLength } = this.answer.transcript;
    const facts = [
      ["tokens/s", digits(tokens.length / this.time)],
      ["target passes", String(rounds)],
      ["accepted length", digits(acceptedLength, 2)],
    ];
    this.clock(seconds(this.time));
    this.place
      .querySelector(".facts")
      .replaceChildren(...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }

  clock(text) {
    this.place.querySelector(".clock").textContent = text;
  }

  bar(share) {
    this.place.querySelector(".bar i").style.width = `${share * 100}%`;
  }
}

function judge([plain, drafts], body, others) {
  const slowest = Math.max(plain.time, drafts.time);
  for (const lane of [plain, drafts]) lane.bar(lane.time / slowest);

  const ratio = plain.time / drafts.time;
  const passes = plain.answer.transcript.rounds / Math.max(1, drafts.answer.transcript.rounds);
  const saved = passes > 1 ? `, with ${digits(passes, 2)} times fewer passes of the target` : "; no pass of the target was saved";
  byId("ratio").textContent = `${digits(ratio, 2)} ×`;
  byId("ratio-note").textContent = `the plain speed${saved}`;

  const [first, second] = [plain.answer.transcript.tokens, drafts.answer.transcript.tokens];
  const same = shared(first, second);
  plain.answer.markShared(same);
  drafts.answer.markShared(same);
  byId("identity").textContent = identity(same, first, second, body.temperature);
  byId("identity").dataset.same = String(same === first.length && same === second.length);

  const runs = plain.times.length;
  const notes = [`${counted(runs, "run")} of each${runs > 1 ? ", medians" : ""}; times from sending to the last token.`];
  if (others > 0) {
    notes.push(`${counted(others, "other request")} ran meanwhile, so these are not the times of an idle server.`);
  }
  byId("race-note").textContent = notes.join(" ");
  byId("verdict").hidden = false;
  announce(`${byId("ratio").textContent} ${byId("ratio-note").textContent}. ${byId("identity").textContent}`);
}

/** Requests that ran beside those of the race at any moment since `began`, by the server's clock. */
function othersSince(began) {
  return Math.max(0, ...live.points.filter((point) => point.time > began).map((point) => point.running - 1));
}

function identity(same, first, second, temperature) {
  if (same === first.length && same === second.length) return `Identical: all ${counted(same, "token")}.`;
  const part = `The answers part after ${counted(same, "token")}`;
  if (temperature > 0) return `${part}: above temperature 0 both follow the target's law, and may draw other samples of it.`;
  return `${part}. At temperature 0 only a near tie, decided by rounding, explains that.`;
}

function busy(yes) {
  byId("race-stop").hidden = !yes;
  byId("race-start").hidden = yes;
}
