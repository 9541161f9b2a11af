// Puts the page together: views, theme, key, and the line that says what the engine is doing.

import { hideCard, legend } from "./answer.js";
import { key } from "./api.js";
import { startChat } from "./chat.js";
import { byId, counted, digits } from "./dom.js";
import { live, onLive, startLive } from "./live.js";
import { startLoad } from "./load.js";
import { startRace } from "./race.js";

const VIEWS = ["chat", "race", "load"];

function show(view) {
  for (const name of VIEWS) {
    const chosen = name === view;
    byId(name).hidden = !chosen;
    byId(`tab-${name}`).setAttribute("aria-selected", String(chosen));
    byId(`tab-${name}`).tabIndex = chosen ? 0 : -1;
  }
  byId("side").hidden = view === "load"; // neither settings nor colours have a meaning there
  hideCard();
}

function startViews() {
  // With a slash, which no element's id has, so that the browser scrolls nowhere.
  const chosen = () => VIEWS.find((name) => location.hash === `#/${name}`) ?? "chat";
  for (const [index, name] of VIEWS.entries()) {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => {
      history.replaceState(null, "", `#/${name}`);
      show(name);
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = byId(`tab-${VIEWS[(index + step + VIEWS.length) % VIEWS.length]}`);
      next.focus();
      next.click();
    });
  }
  window.addEventListener("hashchange", () => show(chosen()));
  show(chosen());
}

function startTheme() {
  const choice = byId("theme");
  choice.value = document.documentElement.dataset.theme;
  choice.addEventListener("change", () => {
    document.documentElement.dataset.theme = choice.value;
    try {
      localStorage.setItem("dspark-theme", choice.value);
    } catch {
      // Storage may be forbidden; the choice then lasts as long as the page.
    }
  });
}

function startKey() {
  byId("key").value = key.get();
  byId("key").addEventListener("change", () => key.set(byId("key").value.trim()));
}

/** Colour alone does not reach everyone. */
function startNumbers() {
  byId("numbered").addEventListener("change", () => document.body.classList.toggle("numbered", byId("numbered").checked));
}

let block = null; // of the legend that is shown

function describe(error) {
  const line = byId("engine");
  line.classList.toggle("lost", Boolean(error));
  if (error) {
    byId("engine-why").textContent = error.message;
    if (!live.engine) byId("engine-model").textContent = "Not connected";
    return;
  }

  const { model, policy } = live.engine;
  const now = live.points.at(-1);
  byId("engine-model").textContent = model;
  byId("engine-policy").textContent = policy.name;
  byId("engine-policy").hidden = false;
  byId("engine-why").textContent = policy.why.replace(`${policy.name}: `, "");
  const figures = now ? [`${counted(now.running, "request")} running`, `${digits(now.tokens_per_second)} tokens/s`] : [];
  if (now?.waiting) figures.splice(1, 0, `${now.waiting} waiting`);
  byId("engine-figures").textContent = figures.join(" · ");

  if (live.engine.block !== block) {
    block = live.engine.block;
    legend(byId("legend"), block);
  }
}

startViews();
startTheme();
startKey();
startNumbers();
// Beside the view where there is room; above it, closed, where there is not.
const roomy = window.matchMedia("(min-width: 60rem)");
const unfold = () => ["settings-box", "legend-box"].forEach((box) => (byId(box).open = roomy.matches));
roomy.addEventListener("change", unfold);
unfold();
startChat();
startRace();
startLoad();
onLive(describe);
startLive();
