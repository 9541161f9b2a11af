// The chat: a conversation whose answers stream in, each with its own account of rounds and speed.

import { Answer } from "./answer.js";
import { chat } from "./api.js";
import { announce, byId, complain, counted, digits, element, growing, seconds } from "./dom.js";
import { requestFields } from "./settings.js";

const QUESTIONS = [
  "Jack has 4 boxes with 4 cups each and 6 loose cups. How many cups is that?",
  "Henry is 8 years old. Leo is 6 years older than Henry. David is 3 times as old as Leo. How old is David?",
  "What does `collections.namedtuple` do?",
];

let turns = []; // messages of the conversation, as the server takes them
let running = null; // AbortController of the answer that is being made

const fit = growing(byId("question"));

export function startChat() {
  byId("suggestions").append(
    ...QUESTIONS.map((question) => element("button", { type: "button", onclick: () => ask(question) }, question)),
  );
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = byId("question").value.trim();
    if (question && !running) ask(question);
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", clear);
}

function clear() {
  running?.abort();
  turns = [];
  byId("conversation").replaceChildren(byId("welcome"));
  byId("welcome").hidden = false;
  byId("clear").hidden = true;
  complain(null);
  byId("question").focus();
}

async function ask(question) {
  let fields;
  try {
    fields = requestFields();
  } catch (error) {
    complain(error);
    return;
  }

  complain(null);
  byId("question").value = "";
  fit();
  byId("welcome").hidden = true;
  const turn = shownTurn(question);
  const messages = [...turns, { role: "user", content: question }];
  await answer({ ...fields, messages }, turn);
}

/** A question and the empty answer below it, appended to the conversation. */
function shownTurn(question) {
  const text = element("div", { class: "answer", role: "group", "aria-label": "Answer" });
  const ribbon = element("div", { class: "ribbon" });
  const facts = element("p", { class: "facts" }, "Waiting for the first token …");
  const place = element(
    "article",
    { class: "turn" },
    element("p", { class: "asked" }, element("span", { class: "visually-hidden" }, "You: "), question),
    text,
    ribbon,
    facts,
  );
  byId("conversation").append(place);
  place.scrollIntoView({ block: "nearest" });
  return { answer: new Answer(text, ribbon), facts, place };
}

async function answer(body, turn) {
  running = new AbortController();
  busy(true);
  const clock = { sent: performance.now(), first: null, last: null };
  let text = "";
  let reason = null;
  try {
    for await (const chunk of chat(body, running.signal)) {
      const choice = chunk.choices[0];
      if (!choice) continue; // the last chunk of a stream counts tokens and has no choice
      text += choice.delta?.content ?? "";
      if (choice.speculation) turn.answer.add(choice.speculation);
      else turn.answer.addPlain(choice.delta?.content ?? "");

      clock.last = performance.now();
      if (clock.first === null && (choice.delta?.content || choice.speculation?.tokens.length)) clock.first = clock.last;
      reason = choice.finish_reason ?? reason;
      turn.facts.replaceChildren(...facts(turn.answer.transcript, clock));
      follow(turn.place);
    }
    turns = [...body.messages, { role: "assistant", content: text }];
  } catch (error) {
    reason = error.name === "AbortError" ? "stopped" : "error";
    // What has been said stays part of the conversation, unless nothing has.
    if (text) turns = [...body.messages, { role: "assistant", content: text }];
    if (reason === "error") {
      complain(error);
      // To be sent again, unless the next question is being written already.
      if (!text && !byId("question").value) byId("question").value = body.messages.at(-1).content;
    }
  }
  close(turn, reason);
}

function close(turn, reason) {
  const transcript = turn.answer.transcript;
  const why = { length: "Cut at the limit of new tokens.", stopped: "Stopped.", error: "The answer broke off." }[reason];
  if (why) turn.facts.append(element("span", { class: "why" }, why));
  if (!transcript.tokens.length && !turn.answer.place.textContent) turn.facts.textContent = why ?? "The answer is empty.";
  turn.answer.end();
  running = null;
  busy(false);

  const length = transcript.acceptedLength;
  announce(`Answer complete: ${counted(transcript.tokens.length, "token")}, accepted length ${digits(length)}.`);
}

/** Tokens, accepted length and speed so far; the speed counts from the moment of sending. */
function facts(transcript, clock) {
  const elapsed = (clock.last - clock.sent) / 1000;
  const fact = (value, name, title = "") => element("span", { class: "fact", title }, element("b", {}, value), ` ${name}`);
  const made = [
    fact(digits(transcript.tokens.length / elapsed), "tokens/s", "from the moment of sending, queue and prompt included"),
    fact(digits(transcript.acceptedLength, 2), "accepted length", "tokens a round, the target's own included"),
    fact(String(transcript.tokens.length), "tokens"),
    fact(String(transcript.rounds), "rounds", "passes of the target after the prompt"),
  ];
  if (clock.first !== null) made.push(fact(seconds((clock.first - clock.sent) / 1000), "to the first token"));
  return made;
}

/** Keeps the end of a growing answer in sight, unless the reader has scrolled away. */
function follow(place) {
  const end = place.getBoundingClientRect().bottom;
  const composer = byId("ask").getBoundingClientRect().top;
  if (end > composer && end < composer + 160) window.scrollBy(0, end - composer + 16);
}

function busy(yes) {
  byId("conversation").setAttribute("aria-busy", String(yes));
  byId("stop").hidden = !yes;
  byId("send").hidden = yes;
  byId("clear").hidden = yes;
  for (const button of byId("suggestions").children) button.disabled = yes;
}
