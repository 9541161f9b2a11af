"""Headless Chromium for the tests of the server's page and for its pictures."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MISSING = "Chromium or its driver is missing: apt-get install chromium chromium-driver"
NAMES = (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))


def installed() -> tuple[str, str] | None:
    """(browser, driver), or None where one of them is missing."""
    found = [next(filter(None, map(shutil.which, names)), None) for names in NAMES]
    return (found[0], found[1]) if found[0] and found[1] else None


@dataclass
class Browser:
    """A page in a browser, driven as a reader drives it."""

    driver: Any  # selenium's WebDriver

    def size(self, width: int, height: int, scale: float = 1.0, phone: bool = False) -> None:
        """Set the window's size in CSS pixels."""
        screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def prefer(self, **features: str) -> None:
        """Set what the system prefers, such as color_scheme="dark"."""
        wanted = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        """The text as it stands in the document, also where it is not in sight."""
        return self.find(selector).get_property("textContent")

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def type(self, selector: str, words: str, clear: bool = True) -> None:
        field = self.find(selector)
        if clear:
            field.clear()
        field.send_keys(words)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script's `return`."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, ready: Callable[["Browser"], Any], what: str, seconds: float = 20.0) -> Any:
        """The first true value of `ready`; fails with what was waited for."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: ready(self), what)

    def complaints(self) -> list[str]:
        """Errors of the console since the last call: failed requests, exceptions, breaches of the content policy."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser without a profile, closed at the end."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    found = installed()
    if found is None:
        raise FileNotFoundError(MISSING)
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    words = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--lang=en"]
    # Chromium's sandbox refuses to work for root, which containers are.
    words += ["--no-sandbox"] if os.geteuid() == 0 else []
    for word in words:
        options.add_argument(word)

    # Both paths are given, so that selenium looks for nothing on the network.
    driver = webdriver.Chrome(options=options, service=Service(found[1]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
