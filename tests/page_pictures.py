"""Takes the pictures of the server's page in docs/pictures from a running server.

    python -m tests.page_pictures --server http://127.0.0.1:8000 --output docs/pictures --users 1 2 4 8 16 --seconds 25

Chat, race and load, each light, dark and on a phone; the load is walked through the numbers of users before its
pictures are taken. Takes them with the Chromium of this machine and keeps each below 200 kB.
"""

import argparse
import io
import time
from pathlib import Path

from tests.browser import Browser, chromium

QUESTION = (
    "Henry has 48 shirts and sells half of them. Then Henry loses 3 and buys 14 more. How many shirts does Henry have?"
)
WIDE, PHONE = (1240, 940), (400, 860)
# Opens the card of the last round with the most accepted drafts among those in which one was rejected.
TELLING = """
    const rounds = [...document.querySelectorAll(".answer .round")];
    const drafts = (round) => round.querySelectorAll("[data-position]").length;
    const tells = (round) => drafts(round) + 9 * Boolean(round.querySelector(".corrected"));
    window.scrollTo(0, 0); // typing has scrolled to the field
    rounds.reduce((best, round) => (tells(round) >= tells(best) ? round : best)).focus({ preventScroll: true });
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--views", nargs="+", choices=list(VIEWS), default=list(VIEWS))
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--users", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=25.0, help="with each number of users")
    settings = parser.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)

    with chromium() as browser:
        browser.size(*WIDE, scale=2)
        for view in settings.views:
            browser.driver.get(f"{settings.server}/#/{view}")
            browser.wait(lambda page: page.find("#engine-policy").is_displayed(), "the page has not met its engine")
            VIEWS[view](browser, settings)
            take_all(browser, settings.output, view)
            if view == "load":
                browser.run("document.getElementById('users-stop').click()")
                time.sleep(2.0)


def chat(browser: Browser, settings: argparse.Namespace) -> None:
    """One answer, with the card of its most telling round open."""
    browser.type("#question", settings.question + "\n")
    browser.wait(lambda page: page.all(".answer .round") and not page.find("#stop").is_displayed(), "no answer", 120)
    browser.run(TELLING)


def race(browser: Browser, settings: argparse.Namespace) -> None:
    browser.type("#race-question", settings.question + "\n")
    browser.wait(lambda page: page.find("#verdict").is_displayed(), "the race has not ended", 300)


def load(browser: Browser, settings: argparse.Namespace) -> None:
    """Users come step by step, and one step leads back down."""
    for users in [*settings.users, settings.users[0]]:
        browser.run(
            "const slider = document.getElementById('users'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'));",
            users,
        )
        time.sleep(settings.seconds)


VIEWS = {"load": load, "chat": chat, "race": race}  # the load first: its plots show five minutes


def take_all(browser: Browser, folder: Path, view: str) -> None:
    """The view as it stands: light and dark in a window, and light on a phone."""
    for name, scheme, size in (("light", "light", WIDE), ("dark", "dark", WIDE), ("phone", "light", PHONE)):
        browser.prefer(color_scheme=scheme)
        browser.size(*size, scale=2, phone=name == "phone")
        time.sleep(0.8)
        browser.run("dispatchEvent(new Event('resize'))")  # a card that is open follows what the new width has moved
        (folder / f"page-{view}-{name}.png").write_bytes(small(browser.driver.get_screenshot_as_png()))
    browser.size(*WIDE, scale=2)


def small(png: bytes) -> bytes:
    """A picture with its 256 most frequent colours, half its size: areas keep their colours exactly."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    colours, place, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    palette = colours[np.argsort(-counts)[:256]]

    # Edges of letters, the rest, take the nearest of them. [colours, 256]
    distance = ((colours[:, None].astype(np.int32) - palette[None]) ** 2).sum(-1)
    picture = Image.fromarray(distance.argmin(1)[place].reshape(pixels.shape[:2]).astype(np.uint8), "P")
    picture.putpalette(palette.tobytes())

    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    main()
