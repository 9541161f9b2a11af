// Shows an answer whose tokens are coloured by how they came, with a card for each round and a ribbon of all rounds.

import { byId, counted, drawn, element } from "./dom.js";
import { Transcript } from "./rounds.js";

export const SHADES = 8; // colours in answers.css; positions beyond share the last
const CELL = { width: 7, height: 6, gap: 1 };

const shade = (position) => `p${Math.min(position, SHADES)}`;

/** Text in which blanks at the ends and line breaks can be seen. */
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, (blanks) => "·".repeat(blanks.length)) || "∅";

/** One answer on the page, and its ribbon if it has one. */
export class Answer {
  constructor(place, ribbon) {
    this.place = place;
    this.ribbon = ribbon;
    this.transcript = new Transcript();
    this.groups = []; // elements of the text, one a group
    this.columns = []; // of the ribbon, one a group
    place.replaceChildren();
    place.setAttribute("aria-busy", "true");
    ribbon?.replaceChildren();
    this.listen(place);
    if (ribbon) this.listen(ribbon);
  }

  /** Takes the account of one chunk: its tokens, and the rounds that made them. */
  add(account) {
    this.append(this.transcript.add(account));
  }

  append(fresh) {
    const text = document.createDocumentFragment();
    for (const group of fresh) {
      const index = this.groups.length;
      const shown = groupText(group, index);
      // One stop of the Tab key for the whole answer; the arrow keys walk from round to round.
      shown.tabIndex = index === 0 ? 0 : -1;
      this.groups.push(shown);
      text.append(shown);
    }
    this.place.append(text);
    if (this.ribbon) this.draw(fresh);
  }

  draw(fresh) {
    const columns = fresh.map((group, i) => column(group, this.columns.length + i));
    this.columns.push(...columns);
    this.ribbon.append(...columns);
    this.ribbon.scrollLeft = this.ribbon.scrollWidth;
  }

  /** Text that came without an account of its tokens. */
  addPlain(text) {
    this.place.append(text);
  }

  end() {
    this.append(this.transcript.finish());
    this.place.removeAttribute("aria-busy");
  }

  /** Marks the first `count` tokens as those that another answer has too. */
  markShared(count) {
    for (const [index, token] of [...this.place.querySelectorAll(".token")].entries()) {
      token.classList.toggle("same", index < count);
      token.classList.toggle("other", index >= count);
    }
  }

  listen(place) {
    if (place.listening) place.listening.abort(); // an earlier answer in the same place
    place.listening = new AbortController();
    const on = (kind, action) => place.addEventListener(kind, action, { signal: place.listening.signal });
    const of = (event) => event.target.closest?.("[data-group]");

    on("pointerover", (event) => of(event) && this.show(Number(of(event).dataset.group)));
    on("pointerleave", () => hideCard());
    on("click", (event) => of(event) && this.show(Number(of(event).dataset.group)));
    on("focusin", (event) => of(event) && this.show(Number(of(event).dataset.group)));
    on("focusout", () => hideCard());
    on("keydown", (event) => this.walk(event));
  }

  walk(event) {
    const from = this.groups.indexOf(document.activeElement);
    const last = this.groups.length - 1;
    const to = { ArrowRight: from + 1, ArrowDown: from + 1, ArrowLeft: from - 1, ArrowUp: from - 1, Home: 0, End: last }[event.key];
    if (from < 0 || to === undefined) return;
    event.preventDefault();
    const next = this.groups[Math.min(Math.max(to, 0), last)];
    this.groups[from].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  show(index) {
    const group = this.transcript.groups[index];
    if (!group) return;
    hideCard();
    fillCard(group);
    for (const part of [this.groups[index], this.columns[index]]) part?.classList.add("shown");
    this.groups[index].setAttribute("aria-describedby", "card");
    placeCard(this.groups[index]);
  }
}

function groupText(group, index) {
  const rejected = group.drafted.some((draft) => draft.verified && !draft.accepted);
  const tokens = group.tokens.map((token) => {
    const drafted = token.from === "draft";
    const shown = element("span", { class: `token ${drafted ? shade(token.position) : "own"}` }, token.text);
    if (drafted) shown.dataset.position = token.position;
    return shown;
  });
  // The target's own token stands where the first rejected draft would have stood.
  if (rejected && tokens.length) tokens.at(-1).classList.add("corrected");
  return element("span", { class: "round", data: { group: index } }, ...tokens);
}

/** A round as a column: the target's own token at the bottom, the drafts above it by position. */
function column(group, index) {
  const cells = [["own", 0], ...group.drafted.map((draft, i) => [outcome(draft, i + 1), i + 1])];
  const step = CELL.height + CELL.gap;
  const height = Math.max(cells.length * step, step);
  const svg = drawn("svg", { width: CELL.width, height, class: "column", "data-group": index, "aria-hidden": "true" });
  for (const [kind, position] of cells) {
    const y = height - (position + 1) * step;
    svg.append(drawn("rect", { class: kind, x: 0.5, y: y + 0.5, width: CELL.width - 1, height: CELL.height - 1, rx: 1 }));
  }
  return svg;
}

function outcome(draft, position) {
  if (draft.accepted) return shade(position);
  return draft.verified ? "rejected" : "unverified";
}

// The card of a round

function fillCard(group) {
  const card = byId("card");
  const own = group.tokens.filter((token) => token.from !== "draft").map((token) => token.text);
  const verified = group.drafted.filter((draft) => draft.verified).length;
  const accepted = group.drafted.filter((draft) => draft.accepted).length;

  let summary = `${group.drafted.length} drafted, ${verified} verified, ${accepted} accepted`;
  if (group.round === null) summary = "The first token comes from reading the prompt.";
  else if (!group.drafted.length) summary = "Nothing was drafted in this round.";
  card.replaceChildren(
    element("strong", {}, group.round === null ? "Before the first round" : `Round ${group.round}`),
    element("p", {}, summary),
  );

  const rows = group.drafted.map((draft, i) => draftRow(draft, i + 1));
  if (own.length) {
    const place = element("td", { class: "place" }, "");
    const text = element("td", {}, element("code", { class: "token own" }, visible(own.join(""))));
    rows.push(element("tr", {}, place, text, element("td", { colSpan: 3, class: "outcome" }, "the target's own")));
  }
  if (rows.length) card.append(element("table", {}, element("tbody", {}, ...rows)));
}

function draftRow(draft, position) {
  const kind = outcome(draft, position);
  const said = draft.accepted ? "accepted" : kind;
  // Drafters without a confidence head say null.
  const sure = typeof draft.confidence === "number" ? Math.round(draft.confidence * 100) : null;
  const meter = element("meter", { min: 0, max: 100, value: sure ?? 0, "aria-label": "confidence" });
  return element(
    "tr",
    { class: said },
    element("td", { class: "place" }, String(position)),
    element("td", {}, element("code", { class: `token ${kind}` }, visible(draft.text))),
    element("td", {}, ...(sure === null ? [] : [meter])),
    element("td", { class: "sure" }, sure === null ? "" : `${sure} %`),
    element("td", { class: "outcome" }, said === "unverified" ? "not verified" : said),
  );
}

let about = null; // the round that the card is about

function placeCard(beside) {
  const card = byId("card");
  card.hidden = false;
  about = beside;
  const edge = 8;
  const box = beside.getClientRects()[0] ?? beside.getBoundingClientRect();
  const left = Math.min(box.left, window.innerWidth - card.offsetWidth - edge);
  const below = box.bottom + edge;
  // Above where there is no room below, and never over the text that it is about.
  const above = box.top - card.offsetHeight - edge;
  const top = below + card.offsetHeight > window.innerHeight && above > 0 ? above : below;
  card.style.left = `${Math.max(edge, left)}px`;
  card.style.top = `${top}px`;
}

export function hideCard() {
  byId("card").hidden = true;
  for (const part of document.querySelectorAll(".shown")) {
    part.classList.remove("shown");
    part.removeAttribute("aria-describedby");
  }
}

/** The legend for blocks of `block` drafts. */
export function legend(place, block) {
  const last = Math.min(block, SHADES);
  const scale = Array.from({ length: last }, (_, i) => {
    return element("span", { class: `token ${shade(i + 1)}` }, i + 1 === SHADES && block > SHADES ? `${SHADES}+` : String(i + 1));
  });
  const row = (sample, words) => element("li", {}, element("span", { class: "sample" }, ...sample), words);
  const own = row([element("span", { class: "token own" }, "word")], "the target's own");
  if (!block) {
    place.replaceChildren(own);
    return;
  }
  place.replaceChildren(
    own,
    row(scale, `drafted at this position of the block (of ${counted(block, "draft")}) and accepted`),
    row([element("span", { class: "token own corrected" }, "word")], "the target's own, where a draft was rejected"),
    row([element("span", { class: "token rejected" }, "word")], "a rejected draft, in a round's card"),
    row([element("span", { class: "token own same" }, "word")], "identical in both answers of a race"),
  );
}

document.addEventListener("keydown", (event) => event.key === "Escape" && hideCard());
// The card of a round that has the focus moves with it; one that was pointed at goes.
const scrolled = () => (about && about === document.activeElement && !byId("card").hidden ? placeCard(about) : hideCard());
document.addEventListener("scroll", scrolled, { capture: true, passive: true });
window.addEventListener("resize", scrolled);
document.addEventListener("pointerdown", (event) => event.target.closest?.("[data-group]") || hideCard());
