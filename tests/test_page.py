"""The page in a browser: chat, race and load against a server with the embedded pair; its colours and files."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.serving.settings import EngineConfig
from tests.api_tiny import Running, serve
from tests.browser import MISSING, Browser, chromium, installed

PAGE = Path(__file__).parents[1] / "dspark_jax" / "serving" / "api" / "page"
KEY = "a-key-of-the-tests"
ENGINE = EngineConfig(
    4, 160, "fixed", rounds_per_dispatch=4, buckets=(32,), smallest_prompt_bucket=64, prefill_chunk=64, queue=4
)
WIDE = (1240, 900)
QUESTION = "Jack has 4 boxes with 4 cups each and 6 loose cups. How many cups is that?"
COLOUR = re.compile(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    target = load_target("embedded")
    running = serve((target, load_drafter("embedded", target)), ENGINE, api_key=KEY)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if installed() is None:
        # A change must not pass without this file having run.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    with chromium() as browser:
        browser.size(*WIDE)
        yield browser


@pytest.fixture
def page(browser: Browser, running: Running) -> Iterator[Browser]:
    """The page with the server's key entered, connected to its engine."""
    browser.driver.get(running.url)
    browser.run("sessionStorage.setItem('dspark-key', arguments[0])", KEY)
    browser.driver.refresh()
    browser.complaints()
    browser.wait(lambda page: page.find("#engine-policy").is_displayed(), "the page has not met its engine")
    yield browser
    assert browser.complaints() == []


def answer_of(running: Running, **fields: object) -> dict:
    """The server's own answer to the question, at temperature 0."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 48, **fields}
    headers = {"Authorization": f"Bearer {KEY}"}
    reply = httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
    return reply.raise_for_status().json()["choices"][0]


def ask(page: Browser, question: str = QUESTION, tokens: str = "48") -> None:
    page.type("#max-tokens", tokens)
    page.type("#question", question + "\n")
    ended = "return document.querySelector('#conversation').getAttribute('aria-busy') === 'false'"
    page.wait(lambda page: page.run(ended), "the answer has not ended", 60)


@pytest.mark.subprocesses
def test_a_chat_shows_where_each_token_came_from(page: Browser, running: Running) -> None:
    ask(page)
    expected = answer_of(running, speculation=True)
    told = expected["speculation"]

    # The text is the server's, token by token, each in the colour of its origin.
    assert page.text(".answer") == expected["message"]["content"]
    positions = page.run("return [...document.querySelectorAll('.answer .token')].map(t => t.dataset.position ?? null)")
    assert positions == [None if t["position"] is None else str(t["position"]) for t in told["tokens"]]
    assert any(positions) and len(page.all(".ribbon .column")) == len(told["rounds"]) + 1

    committed = sum(played["accepted_length"] for played in told["rounds"])
    assert f"{committed / len(told['rounds']):.2f} accepted length" in page.text(".turn .facts")
    assert f"{len(told['tokens'])} tokens" in page.text(".turn .facts") and "tokens/s" in page.text(".turn .facts")


@pytest.mark.subprocesses
def test_rejected_drafts_show_on_focus_and_by_the_arrow_keys(page: Browser, running: Running) -> None:
    ask(page)
    rounds = answer_of(running, speculation=True)["speculation"]["rounds"]
    number, played = next(
        (n, r) for n, r in enumerate(rounds, 1) if not all(d["accepted"] for d in r["drafted"] if d["verified"])
    )

    # The answer is one stop of the Tab key; the first group is the token that came from the prompt.
    page.run("document.querySelector('.answer .round').focus()")
    for _ in range(number):
        page.driver.switch_to.active_element.send_keys("\ue014")  # right
    assert page.text("#card strong") == f"Round {number}"
    assert [cell.text for cell in page.all("#card .sure")] == [
        f"{d['confidence']:.0%}".replace("%", " %") for d in played["drafted"]
    ]
    said = [cell.text for cell in page.all("#card .outcome")]
    assert said == ["accepted" if d["accepted"] else "rejected" for d in played["drafted"]] + ["the target's own"]

    page.driver.switch_to.active_element.send_keys("\ue00c")  # escape
    assert not page.find("#card").is_displayed()


@pytest.mark.subprocesses
def test_tokens_find_their_rounds_when_text_was_held_back(page: Browser) -> None:
    """Rounds come ahead of tokens whose text may become a stop string; a stop cuts the last round short; a request that
    was resumed has a token of a prompt's pass in the middle."""
    found = page.driver.execute_async_script("""
        const done = arguments[0];
        const own = { position: null }, draft = (position) => ({ position });
        const round = (accepted, length) => ({
            accepted_length: length, drafted: [0, 1, 2].map((k) => ({ accepted: k < accepted, verified: true })),
        });
        import("/rounds.js").then(({ Transcript }) => {
            const transcript = new Transcript();
            const chunks = [
                { tokens: [own], rounds: [round(2, 3)] },
                { tokens: [draft(1), draft(2)], rounds: [] },
                { tokens: [own, own], rounds: [round(1, 2), round(3, 4)] },
                { tokens: [draft(1), own, draft(1)], rounds: [] },
            ];
            const complete = chunks.map((chunk) => transcript.add(chunk).map((g) => [g.round, g.tokens.length]));
            done([...complete, transcript.finish().map((g) => [g.round, g.tokens.length])]);
        });
    """)
    # By chunk, the groups that it completes: [round, tokens].
    assert found == [[[None, 1]], [], [[1, 3], [None, 1]], [[2, 2]], [[3, 1]]]


@pytest.mark.subprocesses
def test_what_is_said_is_never_html(page: Browser) -> None:
    words = "<img src=x onerror=alert(1)><b>bold</b>"
    ask(page, words, "4")
    assert words in page.text(".asked") and page.all("#conversation img, #conversation b:not(.fact b)") == []


@pytest.mark.subprocesses
def test_a_race_marks_what_is_identical(page: Browser, running: Running) -> None:
    page.click("#tab-race")
    page.type("#max-tokens", "48")
    page.run("document.getElementById('race-runs').value = '1'")
    page.type("#race-question", QUESTION + "\n")
    page.wait(lambda page: page.find("#verdict").is_displayed(), "the race has not ended", 60)

    tokens = len(answer_of(running, speculation=True)["speculation"]["tokens"])
    assert page.text("#identity") == f"Identical: all {tokens} tokens."
    assert re.fullmatch(r"\d+\.?\d* ×", page.text("#ratio")) and "fewer passes" in page.text("#ratio-note")
    for lane in ("#lane-plain", "#lane-drafts"):
        assert len(page.all(f"{lane} .token.same")) == tokens and page.all(f"{lane} .token.other") == []
        assert re.fullmatch(r"\d+ ms|\d+\.\d\d s", page.text(f"{lane} .clock"))

    # Plain decoding passes once a token, and drafts nothing, though the policy is `fixed`.
    assert page.all("#lane-plain .token[data-position]") == [] and page.all("#lane-drafts .token[data-position]")
    assert page.text("#race-note") == "1 run of each; times from sending to the last token."


@pytest.mark.subprocesses
def test_synthetic_users_come_and_go_in_the_plots(page: Browser, running: Running) -> None:
    page.click("#tab-load")
    assert page.find("#users").get_attribute("max") == str(ENGINE.slots + (ENGINE.queue or 0) // 2)
    page.find("#users").send_keys("\ue014" * 3)
    page.wait(lambda page: running.service.synthetic == 3, "no users have come")

    # While they decode, every plot has a line and a value, and the text beside it for those who see neither.
    plots = "return [...document.querySelectorAll('.plot:has(path.line:not(.thin)) .value')].map(v => v.textContent)"
    page.wait(lambda page: page.run(plots) and "–" not in page.run(plots), "plots are empty", 60)
    assert re.match(r"Verify budget: \d", page.find(".plot.budget .canvas").get_attribute("aria-label"))
    page.click("#load-table summary")
    page.wait(lambda page: page.all("#load-table tbody tr"), "the table is empty")

    page.click("#users-stop")
    page.wait(lambda page: running.service.synthetic == 0 and running.engine.idle, "the users have not left")


@pytest.mark.subprocesses
def test_failures_are_sentences(browser: Browser, running: Running) -> None:
    browser.driver.get(running.url)
    browser.run("sessionStorage.clear()")
    browser.driver.refresh()
    browser.wait(lambda page: "API key" in page.text("#engine-why"), "the missing key is not said")
    browser.type("#question", "Hello?\n")
    browser.wait(lambda page: "wants an API key" in page.text("#alert"), "the refusal is not said")

    # The key field opens by itself; what is typed there lasts as long as the tab.
    browser.type("#key", KEY + "\t")
    browser.wait(lambda page: page.find("#engine-policy").is_displayed(), "the key has not been taken")
    assert browser.run("return localStorage.length") == 0

    for tokens, words in (("0", "The most new tokens must be a number of at least 1."), ("9999", "max_tokens is 9999")):
        browser.type("#max-tokens", tokens)
        browser.type("#question", "Hello?\n")
        browser.wait(lambda page, words=words: words in page.text("#alert"), f"not said: {words}")
    browser.complaints()  # of the refused requests


@pytest.mark.subprocesses
def test_it_fits_a_phone_and_follows_the_theme(page: Browser) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    page.prefer(color_scheme="dark")
    dark = page.run(ground)
    page.prefer(color_scheme="light")
    light = page.run(ground)
    page.click("#theme option[value=dark]")
    assert light != dark == page.run(ground)

    page.size(360, 740, phone=True)
    for view in ("chat", "race", "load"):
        page.click(f"#tab-{view}")
        assert page.run("return document.documentElement.scrollWidth") <= 360
    page.size(*WIDE)
    page.run("localStorage.clear()")


@pytest.mark.subprocesses
def test_its_files_are_never_older_than_the_server(running: Running) -> None:
    first = httpx.get(f"{running.url}/main.js")
    assert first.headers["cache-control"] == "no-cache" and first.headers["content-type"].startswith("text/javascript")
    again = httpx.get(f"{running.url}/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and again.headers["cache-control"] == "no-cache"


def test_colours_can_be_read() -> None:
    """WCAG AA: 4.5 to 1 for text, on every ground that it stands on, light and dark; 3 to 1 for borders of controls."""
    colours = {
        name: (light, dark)
        for file in ("style.css", "answers.css")
        for name, light, dark in COLOUR.findall((PAGE / file).read_text(encoding="utf-8"))
    }
    grounds = ("ground", "surface", "sunken")
    pairs = [
        (text, ground)
        for text in ("ink", "muted", "warn", "accent", "good", "blue", "violet", "amber")
        for ground in grounds
    ]
    pairs += [("ink", f"p{position}") for position in range(1, 9)]
    pairs += [("ink", "warn-ground"), ("warn", "warn-ground"), ("on-accent", "accent")]
    low = [(*pair, theme) for pair in pairs for theme in (0, 1) if contrast(*(colours[c][theme] for c in pair)) < 4.5]
    low += [
        ("edge", g, theme)
        for g in grounds[:2]
        for theme in (0, 1)
        if contrast(colours["edge"][theme], colours[g][theme]) < 3
    ]
    assert not low


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, 1 to 21."""
    luminances = []
    for colour in (first, second):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        luminances.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_the_page_is_whole_and_its_own() -> None:
    """No outside address, no text parsed as HTML, and every file that a file names exists."""
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text and not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        ), file
        for named in re.findall(r'(?:src|href)="([\w./-]+)"|from "\./([\w.]+)"', text):
            assert (PAGE / "".join(named)).is_file(), named
