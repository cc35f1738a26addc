"""The page at `/` in headless Chromium: each view does what it says, and nothing leaves the machine.

`make test-clients` runs these; they need the extra `clients` and a Chromium (Debian's `chromium`). They wait for what
the page shows, never for a time, and hold on a machine of any speed.
"""

import contextlib
import json
import re
import shutil
import signal
import time
import urllib.parse

import pytest
from helpers import build_config, served

from tale_jax.data.tales import grammar
from tale_jax.data.tokenizer import Tokenizer, tokenizer_file
from tale_jax.runs.train import train

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra clients")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "Once there was"


LONG = 4096  # tokens: the most that the server takes
KEY = "key-of-mine"
WRITING = re.compile(r"/v1/(chat/)?completions$")


@pytest.fixture(scope="module")
def server(chat_workdir, trained):
    with served(f"--workdir={chat_workdir}", f"--workdir={trained}", "--rows=8") as (process, url):
        yield process, url


@pytest.fixture(scope="module")
def url(server):
    return server[1]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory, cpu):
    """A server that asks for a key, of a model with room for a whole tale."""
    workdir = tmp_path_factory.mktemp("keyed") / "long"
    train(build_config(**{"model.seq_len": 512, "total_steps": 2, "evaluate.every_steps": 1}), workdir, cpu)
    keys = workdir.parent / "keys"
    keys.write_text(f"{KEY}\n")
    with served(f"--workdir={workdir}", "--rows=4", f"--api_key_file={keys}") as (_, url):
        yield url


@pytest.fixture(scope="module")
def eos_id(chat_workdir):
    return Tokenizer.load(tokenizer_file(chat_workdir)).eos_id


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("the browser tests need a Chromium on PATH; on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url, eos_id):
    """A page of its own; it fails the test when anything asks another machine, or an error goes to the console."""
    with opened(browser, url, eos_id) as page:
        yield page


@contextlib.contextmanager
def opened(browser, url, eos_id, **looks):
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | looks))
    page, wrong = context.new_page(), []
    context.on("request", lambda request: request.url.startswith((url, "data:")) or wrong.append(request.url))
    context.on("weberror", lambda error: wrong.append(str(error.error)))
    context.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    context.set_default_timeout(60_000)
    page.wrong = wrong
    end_marks(page, eos_id, -100)
    yield page
    context.close()
    assert not wrong


def end_marks(page, eos_id, bias):
    """From now on texts are asked for with this bias on their end mark. What a model of 20 steps writes differs from
    machine to machine; so a text is as long as `max_tokens` on each, or ends at once."""

    def more(route):
        body = json.loads(route.request.post_data) | {"logit_bias": {str(eos_id): bias}}
        route.continue_(post_data=json.dumps(body))

    page.context.unroute_all()
    page.context.route(WRITING, more)


def until(page, condition):
    """Waits for an expression to hold. The page forbids Playwright's own wait, which evaluates a string in it."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def at_rest(page):
    """Waits until the page waits for nothing: no answer, no text, and no moment before it asks."""
    until(page, "!('busy' in document.documentElement.dataset)")


def open_at(page, url, **state):
    values = {"prompt": PROMPT, "max_tokens": 24, **state}
    page.goto("about:blank")  # another state of the same page would not load it again
    page.goto(f"{url}/#{urllib.parse.urlencode(values)}")
    at_rest(page)


def write(page):
    page.click("#write")
    at_rest(page)


@contextlib.contextmanager
def suspended(process):
    """A server that does nothing meanwhile, so that no text of it ends."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def until_idle(page, url):
    """Waits until the server writes no text any more."""
    end = time.monotonic() + 60
    while any(map(float, re.findall(r"(?m)^tale_jax_rows_used\S* (\S+)$", page.request.get(f"{url}/metrics").text()))):
        assert time.monotonic() < end
        page.wait_for_timeout(20)


def texts(page, selector=".card .tokens"):
    return page.eval_on_selector_all(selector, "boxes => boxes.map((box) => box.textContent)")


def requests(page):
    """The requests for texts, from now on."""
    found = []
    page.on("request", lambda request: found.append(request) if WRITING.search(request.url) else None)
    return found


def copied_link(page):
    """What "Copy link" gives; where the browser gives no page the clipboard, it stands in the status line."""
    page.click("#link")
    page.wait_for_selector("#status:not(:empty)")
    shown = page.text_content("#status")
    return shown if shown.startswith("http") else page.evaluate("location.href")


# 1. Write.


def test_texts_are_written_side_by_side_and_again(page, url):
    open_at(page, url, n=3)
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    at_rest(page)
    first = texts(page)
    assert len(first) == 3 and len(set(first)) == 3 and all(text.startswith(PROMPT) for text in first)
    page.click("#again")
    at_rest(page)
    assert page.input_value("#seed") == "2" and not set(first) & set(texts(page))


def test_a_text_is_shown_as_it_comes_and_stop_ends_it(page, url, server):
    open_at(page, url, max_tokens=LONG, temperature=1.5)
    page.click("#write")
    page.wait_for_selector(".card .token:nth-child(8)")
    with suspended(server[0]):
        assert page.text_content("#status") == "writing…" and page.is_enabled("#stop")
        page.click("#stop")
        page.wait_for_selector(".verdict:has-text('stopped')")
        at_rest(page)
        assert page.is_disabled("#stop") and 8 <= page.locator(".card .token").count() < LONG
    until_idle(page, url)


def test_sliders_draw_the_distribution(page, url):
    open_at(page, url)
    numbers = "list => list.map((e) => e.textContent)"
    before = page.eval_on_selector_all("#next .numbers", numbers)
    page.focus("#s-top_k")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    at_rest(page)
    after = page.eval_on_selector_all("#next .numbers", numbers)
    kept = [float(re.search(r"→ ([\d.]+)", text)[1]) for text in after]
    assert sum(value > 0 for value in kept) == 3 and sum(kept) == pytest.approx(100, abs=0.3)
    assert [text.split(" →")[0] for text in before] == [text.split(" →")[0] for text in after]
    widths = page.eval_on_selector_all("#next .after", "bars => bars.map((bar) => parseFloat(bar.style.width))")
    assert widths[0] == pytest.approx(100) and widths[2] > 0 and not any(widths[3:])
    page.click("#next .bars li:first-child button")
    assert page.input_value("#prompt").startswith(PROMPT) and len(page.input_value("#prompt")) > len(PROMPT)


def test_each_slider_changes_what_is_sampled_from(page, url):
    open_at(page, url, temperature=1)
    shares = "list => list.map((e) => parseFloat(e.textContent.split('→')[1]))"
    for name, key, value in [("temperature", "Home", 0), ("top_p", "Home", 0.05), ("min_p", "End", 0.5)]:
        open_at(page, url, temperature=1)
        before = page.eval_on_selector_all("#next .numbers", shares)
        page.focus(f"#s-{name}")
        page.keyboard.press(key)
        at_rest(page)
        assert f"{name}={value}" in page.url, page.url
        after = page.eval_on_selector_all("#next .numbers", shares)
        assert after[0] > before[0] and sum(after) <= 100.5


def conversation(page):
    """What was said, as the link has it: half a character is a character there, and a dot between coloured tokens."""
    [talk] = urllib.parse.parse_qs(urllib.parse.urlsplit(page.url).fragment)["talk"]
    return [turn[1:] for turn in json.loads(talk)]


def test_chat(page, url):
    open_at(page, url, tab="chat")
    page.fill("#say", "Tell me of a fox.")
    page.keyboard.press("Enter")
    at_rest(page)
    [first] = texts(page, ".turn.assistant .tokens")
    assert page.locator(".turn").count() == 2 and first and page.is_disabled("#stop-answer")
    page.hover(".turn.assistant .token >> nth=3")
    page.wait_for_selector(".details .bars li.chosen")
    assert page.locator(".details .bars li").count() >= 20
    page.click("text=Another answer")
    at_rest(page)
    [second] = texts(page, ".turn.assistant .tokens")
    assert second != first and page.input_value("#seed") == "2"
    # A second turn sees the first: the conversation is what is asked with, as it stands.
    asked, second = requests(page), conversation(page)[1]
    page.fill("#say", "And then?")
    page.keyboard.press("Enter")
    at_rest(page)
    messages = json.loads(asked[-1].post_data)["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert [m["content"] for m in messages] == ["Tell me of a fox.", second, "And then?"]
    assert page.locator(".turn").count() == 4 and len(conversation(page)) == 4
    # Another tab and back, and the link in another window.
    answers = texts(page, ".turn.assistant .tokens")
    page.click("#tab-write")
    page.click("#tab-chat")
    at_rest(page)
    assert texts(page, ".turn.assistant .tokens") == answers
    other = page.context.new_page()
    other.goto(page.url)
    at_rest(other)
    assert texts(other, ".turn > div") == conversation(page)
    other.close()
    page.click("text=New conversation")
    assert page.locator(".turn").count() == 0 and "talk=" not in page.url
    page.select_option("#model", index=1)  # without a template
    page.wait_for_selector("#tab-write[aria-selected=true]")
    at_rest(page)
    assert page.locator("#tab-chat").count() == 0


def test_an_answer_is_stopped_and_given_up(page, url, server):
    open_at(page, url, tab="chat", max_tokens=LONG)
    for end, turns in (("#stop-answer", 2), ("text=New conversation", 0)):
        page.fill("#say", "Tell me.")
        page.keyboard.press("Enter")
        page.wait_for_selector(".turn:last-child .token:nth-child(8)")
        with suspended(server[0]):
            assert page.is_enabled("#stop-answer")
            page.click(end)
            at_rest(page)
            assert page.is_disabled("#stop-answer") and page.locator(".turn").count() == turns
        until_idle(page, url)
        page.click("text=New conversation")


# 2. Each token.


def test_tokens_are_coloured_by_their_surprise(page, url, eos_id):
    open_at(page, url)
    asked = requests(page)
    write(page)
    body = json.loads(asked[-1].post_data) | {"stream": False, "logit_bias": {str(eos_id): -100}}
    [choice] = page.request.post(f"{url}/v1/completions", data=body).json()["choices"]
    surprises = [-token["logprob"] for token in choice["token_details"]]
    heats = page.eval_on_selector_all(
        ".card .token", "list => list.map((e) => Number(e.style.getPropertyValue('--heat')))"
    )
    assert heats == pytest.approx([min(1, surprise / 6) for surprise in surprises])
    colors = page.eval_on_selector_all(".card .token", "list => list.map((e) => getComputedStyle(e).backgroundColor)")
    assert len(set(colors)) > 4
    labels = page.eval_on_selector_all(".card .token", "list => list.map((e) => e.ariaLabel)")
    assert all(f"{surprise:.2f} nats" in label for surprise, label in zip(surprises, labels, strict=True))


def test_a_token_shows_what_else_could_stand_there_and_branches(page, url):
    open_at(page, url, top_k=5)
    write(page)
    [whole] = texts(page)
    at = page.locator(".card .token.of-prompt").count() + 3
    page.focus(".card .token")
    for _ in range(at):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector(f".details h2:has-text('token {at + 1}:')")
    at_rest(page)
    assert page.locator(".details .bars li").count() == 20 and page.locator(".details .chosen").count() == 1
    numbers = page.eval_on_selector_all(".details .numbers", "list => list.map((e) => e.textContent)")
    before, after = zip(*([float(x) for x in re.findall(r"[\d.]+", text)] for text in numbers), strict=True)
    assert list(before) == sorted(before, reverse=True) and sum(x > 0 for x in after) <= 5
    assert sum(after) == pytest.approx(100, abs=0.5) and sum(before) <= 100.5
    other = page.locator(".details li:not(.chosen) button").first
    token = other.get_attribute("data-token")
    page.keyboard.press("Enter")  # to the alternatives
    other.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".tree ul ul button[aria-current]")
    at_rest(page)
    [branch] = texts(page)
    kept = "".join(page.locator(".card .token").nth(i).text_content() for i in range(at))
    assert branch != whole and branch.startswith(kept) and whole.startswith(kept)
    assert f"tree=0.{at}.{token}" in page.url
    page.click(".tree > ul > li > button")
    assert texts(page) == [whole]
    # A branch of the branch, and the link brings all of it back.
    page.click(".tree ul ul button")
    page.locator(".card .token").nth(at + 2).hover()
    page.wait_for_selector(f".details h2:has-text('token {at + 3}:')")
    at_rest(page)
    page.locator(".details li:not(.chosen) button").first.click()
    page.wait_for_selector(".tree ul ul ul button[aria-current]")
    at_rest(page)
    [twig] = texts(page)
    assert twig not in (branch, whole)
    link = copied_link(page)
    other_page = page.context.new_page()
    other_page.goto(link)
    at_rest(other_page)
    other_page.wait_for_selector(".tree ul ul ul button[aria-current]")
    assert texts(other_page) == [twig]
    other_page.click(".tree > ul > li > ul > li > button")
    assert texts(other_page) == [branch]


# 3. Inside.


def test_inside(page, url):
    seen = []
    page.on("response", lambda response: seen.append(response) if "/inspect/attention" in response.url else None)
    open_at(page, url)
    write(page)
    page.click("#tab-inside")
    at_rest(page)
    assert page.locator(".thumb").count() == 2
    page.click(".thumb >> nth=1")
    said = page.locator("section p[aria-live]")
    assert "looks at" in said.text_content()
    page.wait_for_selector(".layers tbody tr")  # of the last token, before any is chosen
    page.locator(".token").nth(4).click()
    until(page, "document.querySelector('p[aria-live]').textContent.includes('(4) looks at')")
    row = seen[-1].json()["heads"][1]["weights"][4]  # what it looks at is what the model's forward pass has
    best = max(range(5), key=row.__getitem__)
    assert f"({best}) {100 * row[best]:.0f} %" in said.text_content()
    assert page.locator(".lens tbody tr").count() == 3 and page.locator(".layers tbody tr").count() == 3
    page.select_option("#layer", "1")
    at_rest(page)
    assert "layer 1, head 1" in page.get_attribute(".map canvas", "aria-label")
    page.check("[aria-label='ablate layer 0']")
    page.check("[aria-label='ablate head 1 of layer 1']")
    page.click("#ablate")
    page.wait_for_selector(".card:has-text('Ablated')")
    plain, ablated = texts(page)
    assert plain != ablated and page.locator(".differs").count() > 0
    sums = re.findall(r"the text above: ([\d.]+) nats", page.locator("#panel").text_content())
    assert len(sums) == 2 and sums[0] != sums[1]
    assert "ablate_heads=1.1" in page.url and "ablate_layers=0" in page.url
    other = page.context.new_page()
    other.goto(copied_link(page))
    at_rest(other)
    assert "(4) looks at" in other.text_content("section p[aria-live]")
    assert "layer 1, head 1" in other.get_attribute(".map canvas", "aria-label")
    assert other.is_checked("[aria-label='ablate layer 0']")
    assert other.is_checked("[aria-label='ablate head 1 of layer 1']")


def test_the_lens_s_last_layer_is_what_the_model_says(page, url):
    """The top row is the forward pass itself, so its likeliest token is the likeliest one after the prompt."""
    open_at(page, url, tab="inside")
    last = page.locator(".layers tbody tr").first.locator("td").nth(1).text_content()
    first = page.locator("#next .bars li").first
    word, share = first.locator(".word").text_content(), first.locator(".numbers").text_content().split(" ")[0]
    assert last.startswith(word) and float(last.split()[-2]) == pytest.approx(float(share), abs=0.06)
    page.fill("#inside-text", "The fox had a hat.")
    at_rest(page)
    page.wait_for_selector(".layers tbody tr")
    assert "text=The" in page.url
    assert page.locator(".lens thead th").count() > 4


# 4. Through training.


def whole_characters(text):
    """Without what stands for bytes that are none: a dot in the place of a token, or a mark in a text."""
    return re.sub("[·\ufffd]", "", text)


def test_through_training(page, url):
    open_at(page, url, tab="training", temperature=1, max_tokens=60)
    page.wait_for_selector(".card .token")
    assert page.locator(".curve polyline").count() == 2 and page.locator(".curve .floor").count() == 1
    last, picture = texts(page), page.evaluate("document.querySelector('.map canvas').toDataURL()")
    page.focus("#trained")
    page.keyboard.press("Home")
    at_rest(page)
    assert "step 10" in page.get_attribute(".map canvas", "aria-label")
    assert texts(page) != last and page.evaluate("document.querySelector('.map canvas').toDataURL()") != picture
    assert "trained=10" in page.url and "step 10" in page.get_attribute("#trained", "aria-valuetext")
    here = page.get_attribute(".curve .here", "x1")
    first = texts(page)
    page.click("#every")
    at_rest(page)
    rows = texts(page, "td.long:nth-child(3)")
    assert list(map(whole_characters, rows)) == list(map(whole_characters, first + last))
    # The curve is a control as well: a click near its end is the last checkpoint.
    box = page.locator(".curve").bounding_box()
    page.click(".curve", position={"x": box["width"] - 12, "y": 40})
    at_rest(page)
    assert texts(page) == last and page.get_attribute(".curve .here", "x1") != here


def test_the_judge_stands_under_each_sample(browser, keyed, eos_id):
    """A whole tale that ends is accepted, with the entropy floor beside its nats; half of one is not."""
    tale = min((grammar.tell(index, "valid").text for index in range(100)), key=len)
    with opened(browser, keyed, eos_id) as page:
        end_marks(page, eos_id, 100)
        open_at(page, keyed)
        give_key(page, KEY)
        for tab in ("write", "training"):
            open_at(page, keyed, tab=tab, prompt=tale, run=str(tab == "write").lower())
            page.wait_for_selector(".verdict:has-text('accepted: a tale of the grammar')")
            floor = re.search(r"gives it [\d.]+ nats/token, entropy floor ([\d.]+)", page.text_content(".verdict"))
            assert floor and float(floor[1]) > 0
            open_at(page, keyed, tab=tab, prompt=tale[:40], run=str(tab == "write").lower())
            page.wait_for_selector(".verdict:has-text('not accepted: ')")


# 5. Side by side.


def test_two_checkpoints_and_two_models(page, url):
    open_at(page, url, tab="compare")
    page.wait_for_selector("#step2 option:nth-child(3)", state="attached")
    page.select_option("#step2", "10")
    page.click("#compare")
    at_rest(page)
    one, two = texts(page)
    assert one != two and one.startswith(PROMPT) and two.startswith(PROMPT)
    assert page.locator(".card .facts:has-text('nats/token')").count() == 2
    page.locator(".card >> nth=1").locator(".token >> nth=5").hover()
    page.wait_for_selector(".details .bars li")
    other = page.context.new_page()
    other.goto(copied_link(page))
    at_rest(other)
    assert other.input_value("#step2") == "10"
    page.select_option("#model2", index=0)  # chatty beside the same weights without a template: the same text
    page.select_option("#model", index=1)
    at_rest(page)
    page.click("#compare")
    at_rest(page)
    assert len(set(texts(page))) == 1 and page.locator(".card h3").count() == 2
    assert len(set(texts(page, ".card h3"))) == 2


# All of them.


def test_what_sample_py_prints_is_opened(page, url, tmp_path):
    open_at(page, url)
    file = tmp_path / "samples.json"
    samples = [{"text": " a fox.", "tokens": 3}, {"text": " a boy.", "tokens": 3}]
    file.write_text("some line\n" + json.dumps({"prompt": PROMPT, "samples": samples}) + "\n")
    page.set_input_files("#open", file)
    until(page, "document.querySelectorAll('.card .verdict:not(:empty)').length === 2")
    assert texts(page) == [f"{PROMPT} a fox.", f"{PROMPT} a boy."]
    file.write_text("{}")
    page.set_input_files("#open", file)
    page.wait_for_selector("#error:has-text('not what sample.py')")


def give_key(page, key):
    page.wait_for_selector("#key-form:visible")
    page.wrong.clear()  # the browser logs each answer that is no success
    page.fill("#key", key)
    page.keyboard.press("Enter")
    at_rest(page)


def test_a_key_is_asked_for(browser, keyed, eos_id):
    with opened(browser, keyed, eos_id) as page:
        open_at(page, keyed)
        give_key(page, "wrong")
        give_key(page, KEY)
        page.wait_for_selector("#next .bars li")
        write(page)
        assert texts(page)[0] and page.is_hidden("#key-form") and page.is_hidden("#error")
        assert KEY not in page.url


def test_tabs_by_keyboard(page, url):
    open_at(page, url)
    page.focus("#tab-write")
    for name in ("chat", "inside", "training", "compare", "write"):
        page.keyboard.press("ArrowRight")
        until(page, f"document.activeElement.id === 'tab-{name}'")
        at_rest(page)
        assert page.get_attribute(f"#tab-{name}", "aria-selected") == "true"
        assert page.get_attribute("#panel", "aria-labelledby") == f"tab-{name}"
        assert page.locator("[role=tab][tabindex='0']").count() == 1


def test_markup_is_shown_and_not_run(page, url):
    markup = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    open_at(page, url)
    page.fill("#prompt", markup)
    at_rest(page)
    write(page)
    assert texts(page)[0].startswith(markup) and page.title() != "run"
    page.click("#tab-chat")
    page.fill("#say", markup)
    page.keyboard.press("Enter")
    at_rest(page)
    assert texts(page, ".turn.user > div") == [markup] and page.title() != "run"
    assert page.locator("main img, main script").count() == 0


def test_a_mistake_is_shown(page, url):
    open_at(page, url)
    page.fill("#prompt", "many words " * 400)
    page.wait_for_selector("#error:has-text('must fit the context')")
    at_rest(page)
    page.wrong.clear()  # the browser logs each answer that is no success


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("tab", ["write", "chat", "inside", "training", "compare"])
def test_400_pixels_and_names_of_all_controls(browser, url, eos_id, tab, scheme):
    with opened(browser, url, eos_id, viewport={"width": 400, "height": 800}, color_scheme=scheme) as page:
        talk = json.dumps(["uTell me of a fox.", "aOnce " + "there was a fox who had a very long tale " * 4])
        open_at(page, url, tab=tab, run="true", n=2, talk=talk)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        nameless = page.evaluate("""[...document.querySelectorAll("button, input, select, textarea, [role=img]")]
            .filter((e) => !(e.ariaLabel || e.getAttribute("aria-labelledby") || e.labels?.length))
            .filter((e) => !e.textContent.trim())
            .map((e) => e.outerHTML)""")
        assert not nameless
        background, ink = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (background, ink)]
        assert (brightness[0] > brightness[1]) == (scheme == "light")
