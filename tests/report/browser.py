"""A headless Chromium that is offline, what a page in it must be, and the fixture of both."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")

# Addresses that leave nothing: they are in the file itself.
LOCAL = ("file:", "data:", "blob:", "about:", "chrome:")

# Spread of the pixels of every image and drawing of the page, 0..255, and their size; what cannot be decoded is 0 x 0.
_PICTURES = """
const done = arguments[arguments.length - 1];
const drawn = async (image) => {
  try { await image.decode(); } catch (error) { return [0, 0, 0]; }
  const canvas = new OffscreenCanvas(64, 64), context = canvas.getContext("2d");
  context.fillStyle = "white"; context.fillRect(0, 0, 64, 64); context.drawImage(image, 0, 0, 64, 64);
  const data = context.getImageData(0, 0, 64, 64).data, grey = [];
  for (let i = 0; i < data.length; i += 4) grey.push((data[i] + data[i + 1] + data[i + 2]) / 3);
  const mean = grey.reduce((a, b) => a + b) / grey.length;
  const spread = Math.sqrt(grey.reduce((a, b) => a + (b - mean) ** 2, 0) / grey.length);
  return [image.naturalWidth, image.naturalHeight, spread]; };
const vector = (svg) => { const image = new Image();
  image.src = "data:image/svg+xml;base64," +
    btoa(unescape(encodeURIComponent(new XMLSerializer().serializeToString(svg))));
  return image; };
const images = [...document.images, ...[...document.querySelectorAll("svg[viewBox]")].map(vector)];
Promise.all(images.map(drawn)).then((found) => done(found.map((figures, i) =>
  [(images[i].alt || images[i].src).slice(0, 80), ...figures])));
"""

# Clicks twice on every head of every table; returns how many heads there are, and where rows are not in order then.
# Equal values may stand in any order; what is empty stands last.
_SORT = """
const faults = [];
let columns = 0;
for (const table of document.querySelectorAll("table"))
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    const numeric = head.classList.contains("number");
    columns += 1;
    for (const expected of numeric ? ["descending", "ascending"] : ["ascending", "descending"]) {
      head.click();
      const values = [...table.tBodies[0].rows].map((row) => row.cells[i].dataset.value ?? row.cells[i].textContent);
      const filled = values.filter((value) => value !== "");
      const compare = (a, b) => (numeric && !isNaN(a) && !isNaN(b) ? Number(a) - Number(b) : a.localeCompare(b)) *
        (expected === "descending" ? -1 : 1);
      if (head.getAttribute("aria-sort") !== expected || values.slice(filled.length).some((value) => value !== "") ||
          !filled.every((value, k) => k === 0 || compare(filled[k - 1], value) <= 0))
        faults.push([table.id, head.textContent, expected, values.slice(0, 8)]);
    }
  });
return [columns, faults];
"""

_DEAD_LINKS = """
return [...document.querySelectorAll('a[href]')].map((link) => link.getAttribute("href"))
  .filter((href) => !href.startsWith("#") || !document.getElementById(decodeURIComponent(href.slice(1))));
"""


class Browser:
    """A browser and what it says of the page in it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        """Open a file and forget what was said of the page before."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(path.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def errors(self) -> list[str]:
        """Return what the console called severe."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """Return the addresses outside the file that the page, or the frame that is switched to, asked for.

        A request that fails is an error of the console as well.
        """
        asked = self.run("return performance.getEntriesByType('resource').map((each) => each.name.slice(0, 200))")
        return [address for address in asked if not address.startswith(LOCAL)]

    def pictures(self) -> list[tuple[str, int, int, float]]:
        """Return name, width, height and spread of grey values of every image and drawing of the page."""
        return [tuple(found) for found in self.driver.execute_async_script(_PICTURES)]

    def check_pictures(self, may_be_blank: tuple[str, ...] = ()) -> int:
        """Return how many pictures the page has, none of which is missing or blank.

        may_be_blank: how the names begin of those that have nothing to show.
        """
        found = self.pictures()
        shown = [(*each, each[0].startswith(may_be_blank)) for each in found]
        bad = [each for each in shown if not (each[1] > 0 and each[2] > 0 and (each[3] > 2 or each[4]))]
        assert not bad, f"blank or missing: {bad[:3]}"
        return len(found)

    def check_tables(self) -> int:
        """Return how many columns were sorted by a click on their head, and the other way round by another."""
        columns, faults = self.run(_SORT)
        assert faults == []
        return int(columns)

    def check_links(self) -> int:
        """Return how many links lead to a place in the page; no other is there, and one is followed."""
        assert self.run(_DEAD_LINKS) == []
        links = self.find("a[href]")
        for link in links[:1] + links[-1:]:
            target = link.get_attribute("href").split("#")[1]
            self.run("arguments[0].click()", link)
            assert self.run("return decodeURIComponent(location.hash.slice(1))") == target
            top = self.run("return document.querySelector(':target').getBoundingClientRect().top")
            assert -5 <= top <= self.run("return innerHeight")
        return len(links)

    def check_page(self, path: Path) -> None:
        """Open a page of ours and check that it needs nothing, shows everything, sorts and leads where it says."""
        self.open(path)
        self.check_shown()

    def check_shown(self, may_be_blank: tuple[str, ...] = ()) -> None:
        """Check the page, or the frame, that is shown as `check_page` does."""
        assert self.find("h1")[0].text
        self.check_pictures(may_be_blank)
        self.check_tables()
        self.check_links()
        assert self.errors() == []
        assert self.requests() == []


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser without a network."""
    for program in (CHROMIUM, DRIVER):
        if not program.is_file():
            pytest.skip(f"{program} is missing: install Debian's chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tempfile.mkdtemp(prefix="chromium-")
    switches = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking")
    # whatever is asked for by name is not found: the pages must not need it
    offline = ("host-resolver-rules=MAP * ~NOTFOUND", "proxy-server=direct://", "window-size=1500,1000")
    for switch in (*switches, *offline, f"user-data-dir={profile}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # given explicitly, selenium looks for no other driver, least of all on the network
    service = webdriver.ChromeService(str(DRIVER), env={**os.environ, "SE_OFFLINE": "true"})
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)
