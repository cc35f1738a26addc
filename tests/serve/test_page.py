"""The page at `/` in headless Chromium: each view does what it says, and nothing leaves the machine.

`make test-clients` runs these; they need the extra `clients` and a Chromium (Debian's `chromium`).
"""

import json
import re
import shutil
import time

import pytest
from helpers import served

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra clients")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "Once there was"


@pytest.fixture(scope="module")
def url(chat_workdir, trained):
    with served(f"--workdir={chat_workdir}", f"--workdir={trained}", "--rows=8") as (_, url):
        yield url


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH; on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """A page of its own; it fails the test when anything asks another machine, or an error goes to the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, wrong = context.new_page(), []
    page.on("request", lambda request: request.url.startswith((url, "data:")) or wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(30_000)
    page.wrong = wrong
    yield page
    context.close()
    assert not wrong


def until(page, condition):
    """Waits for an expression to hold. The page forbids Playwright's own wait, which evaluates a string in it."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def open_at(page, url, **state):
    values = {"prompt": PROMPT, "max_tokens": 24, **state}
    page.goto(f"{url}/#" + "&".join(f"{name}={str(value).replace(' ', '+')}" for name, value in values.items()))
    page.wait_for_selector("#next .bars li", state="attached")


def write(page):
    page.click("#write")
    until(page, "document.querySelector('#stop').disabled && document.querySelector('.card .token')")
    until(page, "![...document.querySelectorAll('.facts')].some((p) => p.textContent.startsWith('writing'))")


def texts(page, selector=".card .tokens"):
    return page.eval_on_selector_all(selector, "boxes => boxes.map((box) => box.textContent)")


def test_texts_are_written_side_by_side_and_again(page, url):
    open_at(page, url, n=3)
    write(page)
    first = texts(page)
    assert len(first) == 3 and len(set(first)) == 3 and all(text.startswith(PROMPT) for text in first)
    page.click("#again")
    until(page, "document.querySelector('#stop').disabled")
    assert page.input_value("#seed") == "2" and not set(first) & set(texts(page))


def test_stop_ends_a_text(page, url):
    open_at(page, url, max_tokens=4000, temperature=1.5)
    page.click("#write")
    page.wait_for_selector(".card .token:nth-child(8)")
    page.click("#stop")
    until(page, "document.querySelector('#stop').disabled")
    assert 8 <= page.locator(".card .token").count() < 4000


def test_sliders_draw_the_distribution(page, url):
    open_at(page, url)
    numbers = "list => list.map((e) => e.textContent)"
    before = page.eval_on_selector_all("#next .numbers", numbers)
    page.focus("#s-top_k")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    until(page, "document.querySelectorAll('#next .numbers')[3].textContent.endsWith('→ 0.0 %')")
    after = page.eval_on_selector_all("#next .numbers", numbers)
    kept = [float(re.search(r"→ ([\d.]+)", text)[1]) for text in after]
    assert sum(value > 0 for value in kept) == 3 and sum(kept) == pytest.approx(100, abs=0.3)
    assert [text.split(" →")[0] for text in before] == [text.split(" →")[0] for text in after]
    page.click("#next .bars li:first-child button")
    assert page.input_value("#prompt").startswith(PROMPT) and len(page.input_value("#prompt")) > len(PROMPT)


def test_a_token_shows_what_else_could_stand_there_and_branches(page, url):
    open_at(page, url)
    write(page)
    [whole] = texts(page)
    at = page.locator(".card .token.of-prompt").count() + 3
    page.focus(".card .token")
    for _ in range(at):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector(f".details h2:has-text('token {at + 1}:')")
    assert page.locator(".details .bars li").count() == 20
    assert page.locator(".details .chosen").count() == 1
    other = page.locator(".details li:not(.chosen) button").first
    token = other.get_attribute("data-token")
    page.keyboard.press("Enter")  # to the alternatives
    other.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".tree ul ul button[aria-current]")
    until(page, "document.querySelector('#stop').disabled")
    [branch] = texts(page)
    kept = "".join(page.locator(".card .token").nth(i).text_content() for i in range(at))
    assert branch != whole and branch.startswith(kept) and whole.startswith(kept)
    assert f"tree=0.{at}.{token}" in page.url
    page.click(".tree > ul > li > button")
    assert texts(page) == [whole]
    # The link brings all of it back.
    page.click(".tree ul ul button")
    other_page = page.context.new_page()
    other_page.goto(page.url)
    other_page.wait_for_selector(".tree ul ul button[aria-current]")
    until(other_page, "document.querySelector('#stop').disabled")
    assert texts(other_page) == [branch]


def test_inside(page, url):
    open_at(page, url)
    write(page)
    page.click("#tab-inside")
    page.wait_for_selector(".map canvas")
    assert page.locator(".thumb").count() == 2
    page.click(".thumb >> nth=1")
    said = page.locator("section p[aria-live]")
    assert "looks at" in said.text_content()
    page.wait_for_selector(".layers tbody tr")  # of the last token, before any is chosen
    page.locator(".token").nth(4).click()
    until(page, "document.querySelector('p[aria-live]').textContent.includes('(4) looks at')")
    assert page.locator(".lens tbody tr").count() == 3 and page.locator(".layers tbody tr").count() == 3
    page.select_option("#layer", "1")
    until(page, "document.querySelector('.map canvas').ariaLabel.includes('layer 1, head 1')")
    page.check("[aria-label='ablate layer 0']")
    page.check("[aria-label='ablate head 1 of layer 1']")
    page.click("#ablate")
    page.wait_for_selector(".card:has-text('Ablated')")
    plain, ablated = texts(page)
    assert plain != ablated and page.locator(".differs").count() > 0
    sums = re.findall(r"the text above: ([\d.]+) nats", page.locator("#panel").text_content())
    assert len(sums) == 2 and sums[0] != sums[1]
    assert "ablate_heads=1.1" in page.url and "ablate_layers=0" in page.url


def test_through_training(page, url):
    open_at(page, url, tab="training", temperature=1, max_tokens=60)
    page.wait_for_selector(".card .token")
    assert page.locator(".curve polyline").count() == 2 and page.locator(".curve .floor").count() == 1
    last, picture = texts(page), page.evaluate("document.querySelector('.map canvas').toDataURL()")
    page.focus("#trained")
    page.keyboard.press("Home")
    page.wait_for_selector(".map canvas[aria-label*='step 10']")
    assert texts(page) != last and page.evaluate("document.querySelector('.map canvas').toDataURL()") != picture
    assert "trained=10" in page.url
    page.click("#every")
    until(page, "document.querySelectorAll('td.long').length === 4")


def test_two_models(page, url):
    open_at(page, url, tab="compare")
    page.wait_for_selector("#step2 option:nth-child(3)", state="attached")
    page.select_option("#step2", "10")
    page.click("#compare")
    until(page, "document.querySelectorAll('.card .facts').length === 2")
    until(page, "![...document.querySelectorAll('.facts')].some((p) => p.textContent.startsWith('writing'))")
    one, two = texts(page)
    assert one != two and one.startswith(PROMPT) and two.startswith(PROMPT)
    page.locator(".card >> nth=1").locator(".token >> nth=5").hover()
    page.wait_for_selector(".details .bars li")
    open_at(page, url, tab="compare", step2=10, seed=2)
    until(page, "document.querySelector('#seed').value === '2' && document.querySelector('#step2')?.value === '10'")


def test_chat(page, url):
    open_at(page, url, tab="chat")
    page.fill("#say", "Tell me of a fox.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.assistant .token")
    page.wait_for_selector("button:has-text('Stop answering'):disabled")
    first = texts(page, ".turn.assistant .tokens")
    page.click("text=Another answer")
    page.wait_for_selector("button:has-text('Stop answering'):disabled")
    page.wait_for_selector(".turn.assistant .token")
    assert len(texts(page, ".turn.assistant .tokens")) == 1 and first
    page.select_option("#model", index=1)  # without a template
    page.wait_for_selector("#tab-write[aria-selected=true]")
    assert page.locator("#tab-chat").count() == 0


def test_what_sample_py_prints_is_opened(page, url, tmp_path):
    open_at(page, url)
    file = tmp_path / "samples.json"
    samples = [{"text": " a fox.", "tokens": 3}, {"text": " a boy.", "tokens": 3}]
    file.write_text("some line\n" + json.dumps({"prompt": PROMPT, "samples": samples}) + "\n")
    page.set_input_files("#open", file)
    until(page, "document.querySelectorAll('.card').length === 2")
    assert texts(page) == [f"{PROMPT} a fox.", f"{PROMPT} a boy."]
    file.write_text("{}")
    page.set_input_files("#open", file)
    page.wait_for_selector("#error:has-text('not what sample.py')")


def test_markup_is_shown_and_not_run(page, url):
    markup = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    open_at(page, url)
    page.fill("#prompt", markup)
    write(page)
    assert texts(page)[0].startswith(markup) and page.title() != "run"
    assert page.locator("main img, main script").count() == 0


def test_a_mistake_is_shown(page, url):
    open_at(page, url)
    page.fill("#prompt", "many words " * 400)
    page.wait_for_selector("#error:has-text('must fit the context')")
    page.wrong.clear()  # the browser logs each answer that is no success


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("tab", ["write", "chat", "inside", "training", "compare"])
def test_400_pixels_and_names_of_all_controls(browser, url, tab, scheme):
    context = browser.new_context(viewport={"width": 400, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    open_at(page, url, tab=tab, run="true", n=2)
    page.wait_for_timeout(1500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    nameless = page.evaluate("""[...document.querySelectorAll("button, input, select, textarea, [role=img]")]
        .filter((e) => !(e.ariaLabel || e.getAttribute("aria-labelledby") || e.labels?.length || e.textContent.trim()))
        .map((e) => e.outerHTML)""")
    assert not nameless
    background, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (background, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    context.close()
