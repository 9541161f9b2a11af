// Joins the tokens of a streamed answer to the rounds that made them, and counts both. Knows nothing of the page.
//
// A round drafts a block, verifies its first so many tokens, accepts a prefix of those, and ends with one token of the
// target's own. The first token of an answer comes from reading the prompt and belongs to no round.

/** A round with the tokens that it committed; `round` is null for tokens that the prompt's pass made. */
const grouped = (round, drafted, tokens) => ({ round, drafted, tokens });

export class Transcript {
  constructor() {
    this.tokens = [];
    this.groups = []; // of grouped(), in the order of the text
    this.rounds = 0;
    this.committed = 0; // tokens that rounds committed
    this.ahead = []; // rounds whose tokens have not all come: text that may become a stop string is held back
  }

  /** Tokens committed per round, the target's own included; null before the first round. */
  get acceptedLength() {
    return this.rounds ? this.committed / this.rounds : null;
  }

  /**
   * Adds the account that one chunk of a stream brings.
   * @param {{tokens: object[], rounds: object[]}} account
   * @returns the groups that are complete now
   */
  add({ tokens = [], rounds = [] }) {
    const before = this.groups.length;
    for (const round of rounds) {
      this.rounds += 1;
      this.committed += round.accepted_length;
      const accepted = round.drafted.filter((draft) => draft.accepted).length;
      this.ahead.push({ ...grouped(this.rounds, round.drafted, []), accepted, length: round.accepted_length });
    }
    for (const token of tokens) this.place(token);
    return this.groups.slice(before);
  }

  /** Ends the answer: a stop may have cut its last round short. */
  finish() {
    const cut = this.ahead.find((round) => round.tokens.length);
    this.ahead = [];
    if (!cut) return [];
    this.groups.push(grouped(cut.round, cut.drafted, cut.tokens));
    return this.groups.slice(-1);
  }

  place(token) {
    const first = this.tokens.length === 0;
    this.tokens.push(token);
    const next = this.ahead[0];
    // A token says itself where it came from. One that does not fit the next round was made by a prompt's pass: the
    // first one always, and one more if the engine had to resume the request.
    const place = next && next.tokens.length < next.accepted ? next.tokens.length + 1 : null;
    if (first || !next || place !== (token.position ?? null)) {
      this.groups.push(grouped(null, [], [token]));
      return;
    }
    next.tokens.push(token);
    if (next.tokens.length === next.length) {
      this.ahead.shift();
      this.groups.push(grouped(next.round, next.drafted, next.tokens));
    }
  }
}

/** How many tokens two answers share from their beginning. */
export function shared(first, second) {
  const length = Math.min(first.length, second.length);
  for (let i = 0; i < length; i++) {
    if (first[i].id !== second[i].id) return i;
  }
  return length;
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
