"""The built documentation, read as a visitor would: JAXSOFTMAX_DOCS names its folder."""

import json
import os
import shutil
import threading
import time
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urldefrag, urljoin
from urllib.request import urlopen

import pytest

import jaxsoftmax as js

SITE = os.environ.get("JAXSOFTMAX_DOCS", "")
PAGES = sorted(path.name for path in Path(SITE).glob("*.html")) if SITE else []
WIDTHS, SCHEMES = (390, 1440), ("light", "dark")
SMALLEST = 12  # pixels, of any text
CONTRAST = 4.5  # of any text to what is behind it

pytestmark = pytest.mark.skipif(
    not PAGES, reason="JAXSOFTMAX_DOCS names no site; docs/conf.py builds one"
)


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A browser that leaves a page hangs up."""


class Markup(HTMLParser):
    """The links of a page, its ids, and those of what it documents."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.documented = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.documented += [attributes["id"]] if tag == "dt" and "id" in attributes else []


@pytest.fixture(scope="module")
def address():
    with Server(("127.0.0.1", 0), partial(Handler, directory=SITE)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium and its driver: Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # Chromium has none for root.
    options.add_argument("--disable-background-networking")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.set_script_timeout(30)
    yield browser
    browser.quit()


def requests(browser):
    """Where the browser has sent requests to since it was last asked."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


def show(browser, width, scheme):
    """Shows the page as on a screen that wide, to a reader who prefers that scheme."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


@pytest.fixture(scope="module", params=PAGES)
def page(request, browser, address):
    """Each page in turn, open and with all its scripts done."""
    requests(browser), browser.get_log("browser")
    browser.get(address + request.param)
    browser.execute_async_script(
        "const done = arguments[0];"
        "Promise.resolve(window.MathJax?.startup?.promise).then(() => setTimeout(done, 50))"
    )
    return request.param


def test_every_internal_link_answers(address):
    found, wrong = {}, []

    def ids(url):
        if url not in found:
            with urlopen(url) as answer:
                is_page = answer.headers.get_content_type() == "text/html"
                found[url] = Markup(answer.read().decode()).ids if is_page else []
        return found[url]

    for name in PAGES:
        for link in Markup((Path(SITE) / name).read_text(encoding="utf-8")).links:
            url, fragment = urldefrag(urljoin(address + name, link))
            if not url.startswith(address):
                continue
            try:
                if fragment and unquote(fragment) not in ids(url):
                    wrong.append(f"{name}: nothing is at {link}")
                ids(url)
            except HTTPError as error:
                wrong.append(f"{name}: {error.code} for {link}")
    assert len(found) > len(PAGES)
    assert wrong == []


def test_every_public_name_is_documented_once():
    pages = [Markup((Path(SITE) / name).read_text(encoding="utf-8")) for name in PAGES]
    documented = [name for each in pages for name in each.documented]
    public = [name for name, value in vars(js).items() if name[0] != "_" and callable(value)]
    assert {name: documented.count(f"jaxsoftmax.{name}") for name in public} == dict.fromkeys(public, 1)


def test_every_page_of_an_idea_has_computed_something():
    for name in ("derivation", "exactness", "head", "comparing", "scale-out", "training", "coming-from"):
        assert 'class="cell_output' in (Path(SITE) / f"{name}.html").read_text(encoding="utf-8"), name


def test_no_request_leaves_the_machine(page, browser, address):
    sent = requests(browser)
    assert address + page in sent
    assert [url for url in sent if not url.startswith(address)] == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_mathematics_is_rendered(page, browser):
    formulas, rendered, broken, plain, text = browser.execute_script("""
        const formulas = [...document.querySelectorAll(".math")];
        return [
            formulas.length,
            formulas.filter(each => each.querySelector("mjx-container svg")?.clientHeight > 0).length,
            [...document.querySelectorAll("svg [data-mml-node=merror], svg [fill=red]")].map(
                each => each.closest(".math").textContent),
            // What is indented in a docstring is a formula.
            [...document.querySelectorAll("dd blockquote")].map(each => each.textContent),
            document.querySelector("article").innerText,
        ]""")
    assert rendered == formulas
    assert formulas > {"index.html": 5, "derivation.html": 20, "exactness.html": 5}.get(page, -1)
    assert broken == plain == []
    assert "\\(" not in text
    assert "\\frac" not in text


@pytest.mark.usefixtures("page")
def test_pictures_are_there(browser):
    broken = browser.execute_script(
        "return [...document.images].filter(each => !each.naturalWidth).map(each => each.src)"
    )
    assert broken == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("page")
def test_it_is_readable(browser, width, scheme):
    show(browser, width, scheme)
    # What is shown of a text: its size, its colour, and the colours behind it down to an opaque one.
    wide, texts = browser.execute_async_script("""
        const done = arguments[0];
        const opacity = colour => Number(colour.match(/[\\d.]+/g)[3] ?? 1);
        function grounds(element) {
            const found = [];
            for (; element; element = element.parentElement) {
                const colour = getComputedStyle(element).backgroundColor;
                if (opacity(colour) > 0) found.push(colour);
                if (opacity(colour) === 1) break;
            }
            return found;
        }
        setTimeout(() => {
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            const texts = [];
            for (let node; (node = walker.nextNode()); ) {
                const element = node.parentElement;
                const box = element.getBoundingClientRect();
                if (!node.data.trim() || !element.checkVisibility({visibilityProperty: true})) continue;
                if (box.width < 2 || element.closest("script, style, noscript, svg, title")) continue;
                if (element.matches(".headerlink, mjx-assistive-mml *, .visually-hidden")) continue;
                const style = getComputedStyle(element);
                const size = parseFloat(style.fontSize);
                texts.push([node.data.trim(), size, style.color, grounds(element)]);
            }
            // Tables and code scroll on their own; what the article stands in must not.
            const root = document.documentElement;
            const wide = root.scrollWidth > innerWidth ? ["page"] : [];
            for (let each = document.querySelector("article"); each !== root; each = each.parentElement) {
                const scrolls = getComputedStyle(each).overflowX !== "visible";
                if (scrolls && each.scrollWidth > each.clientWidth) wide.push(each.className);
            }
            done([wide, texts]);
        }, 400)""")
    assert wide == []
    assert len(texts) > 10
    assert {(size, text[:20]) for text, size, _, _ in texts if size < SMALLEST} == set()
    faint = {
        (text, colour, *grounds)
        for text, _, colour, grounds in texts
        if contrast(colour, grounds) < CONTRAST
    }
    assert faint == set()
    # A scheme that did nothing would pass.
    lightness = max(luminance(blend([*grounds, "rgb(255, 255, 255)"])) for *_, grounds in texts)
    assert (lightness > 0.5) == (scheme == "light")


@pytest.mark.usefixtures("page")
def test_no_word_is_broken_on_a_telephone(browser):
    show(browser, 390, "light")
    broken = browser.execute_async_script("""
        const done = arguments[0];
        setTimeout(() => {
            const walker = document.createTreeWalker(
                document.querySelector("article"), NodeFilter.SHOW_TEXT);
            const broken = [], range = document.createRange();
            for (let node; (node = walker.nextNode()); ) {
                if (node.parentElement.closest("script, style, svg, mjx-assistive-mml")) continue;
                for (const word of node.data.matchAll(/[\\p{L}\\p{N}]+/gu)) {
                    range.setStart(node, word.index);
                    range.setEnd(node, word.index + word[0].length);
                    const tops = new Set([...range.getClientRects()].map(each => Math.round(each.top)));
                    if (tops.size > 1) broken.push(word[0]);
                }
            }
            done(broken);
        }, 200)""")
    assert broken == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_verdicts_are_seen(browser, address, width):
    show(browser, width, "light")
    browser.get(address + "comparing.html")
    seen = browser.execute_script("""
        const seen = [];
        for (const table of document.querySelectorAll(".cell_output pre")) {
            const at = table.textContent.indexOf("verdict");
            if (at < 0) continue;
            const node = document.createTreeWalker(table, NodeFilter.SHOW_TEXT).nextNode();
            const range = document.createRange();
            range.setStart(node, at);
            range.setEnd(node, at + 7);
            seen.push(range.getBoundingClientRect().right < table.getBoundingClientRect().right);
        }
        return seen""")
    assert len(seen) > 1
    assert all(seen)


def numbers(colour):
    *rgb, alpha = [*map(float, colour[colour.index("(") + 1 : -1].replace(",", " ").split()), 1.0][:4]
    return rgb, alpha


def blend(colours):
    """What is seen of colours, the front one first and the last opaque."""
    seen, _ = numbers(colours[-1])
    for colour in reversed(colours[:-1]):
        rgb, alpha = numbers(colour)
        seen = [alpha * front + (1 - alpha) * back for front, back in zip(rgb, seen, strict=True)]
    return seen


def luminance(rgb):
    """The relative luminance of the Web Content Accessibility Guidelines."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour, grounds):
    grounds = [*grounds, "rgb(255, 255, 255)"]
    dark, light = sorted([luminance(blend([colour, *grounds])), luminance(blend(grounds))])
    return (light + 0.05) / (dark + 0.05)


def test_search_finds_the_cost(browser, address):
    show(browser, 1440, "light")
    browser.get(address + "index.html")
    field = browser.find_element("css selector", "input[name=q]")
    field.send_keys("log_likelihood_cost\n")
    deadline = time.monotonic() + 10
    while "search.html" not in browser.current_url and time.monotonic() < deadline:
        time.sleep(0.1)
    found = browser.execute_async_script("""
        const done = arguments[0];
        const results = () => [...document.querySelectorAll("#search-results li a")];
        const target = "api-cost.html#jaxsoftmax.log_likelihood_cost";
        const start = Date.now();
        (function look() {
            const links = results().map(each => each.href);
            if (links.some(link => link.endsWith(target)) || Date.now() - start > 10000) done(links);
            else setTimeout(look, 100);
        })()""")
    assert address + "api-cost.html#jaxsoftmax.log_likelihood_cost" in found
