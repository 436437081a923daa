"""The page in a real browser, on the server of these tests: questions, stages, budgets, and every error."""

import pathlib
import re
import runpy
import shutil
import threading

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from served import GRID, KEY, WAITING

from pdrop_jax.generation.sampling import Sampling

DOCS = pathlib.Path(__file__).parents[2] / "docs"
CHROMIUM = shutil.which("chromium")
QUESTION = "What is in row 3, column 2?"
MOST = 30_000  # milliseconds that anything may take


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=MOST)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page with the server's key; nothing on it may fail, or come from another server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(MOST)
    failures, elsewhere = [], []
    page.on("pageerror", lambda error: failures.append(error))
    page.on(
        "request", lambda request: None if request.url.startswith((url, "data:")) else elsewhere.append(request.url)
    )
    page.goto(url)
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#model")).to_have_text("tiny, 3 layers")
    yield page
    context.close()
    assert failures == elsewhere == []


def ask(page, question=QUESTION):
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")


def notice(page):
    return page.get_by_role("alert")


def patches(page, stage):
    """Share of a stage's picture that has another colour than in the first stage."""
    return page.evaluate(
        """stage => {
            const [first, here] = [0, stage].map(n => document.querySelectorAll("#strip canvas")[n]).map(
                canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
            let other = 0;
            for (let n = 0; n < here.length; n += 4) other += first[n] !== here[n] || first[n + 1] !== here[n + 1];
            return other / (here.length / 4);
        }""",
        stage,
    )


def test_a_question_about_an_uploaded_picture(page, generate, service):
    """Upload, ask with the keyboard, the answer streamed, and a picture for each stage with dropped patches dimmed."""
    page.get_by_label("Choose a picture").set_input_files(GRID)
    expect(page.locator("#name")).to_have_text("grid.png")
    ask(page)
    expected = generate(QUESTION, [GRID], budget="own")
    expect(page.locator("#answer")).to_have_text(expected.texts[0])
    expect(page.locator("#answer")).to_have_attribute("aria-live", "polite")
    expect(page.locator("#facts")).to_have_text(re.compile(r"^First token after [\d.]+ m?s, the whole answer after"))
    kept = [144, *(len(at[0]) for at in expected.kept[0])]
    captions = [f"Layer {layer} {n} of 144 image tokens" for layer, n in enumerate(kept)]
    expect(page.locator("#strip .caption")).to_have_text(captions)
    expect(page.locator("#strip canvas").nth(1)).to_have_attribute("aria-label", re.compile(f"{kept[1]} of 144"))
    shares = [patches(page, stage) for stage in range(3)]
    assert shares[0] == 0
    for share, n in zip(shares, kept, strict=True):
        assert share == pytest.approx(1 - n / 144, abs=0.03)  # the veil has the colour of a few pixels
    page.get_by_text("Scores", exact=True).click()
    expect(page.locator("#strip canvas").first).to_have_attribute("aria-label", re.compile("^Scores of the 144"))
    expect(page.locator("#legend")).to_be_visible()


def test_the_slider_asks_again_and_two_schedules_stand_side_by_side(page, generate, service):
    page.get_by_role("button", name="Use the sample picture").click()
    expect(page.get_by_label("Question")).to_have_value(QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    dense, own = (generate(QUESTION, [GRID], budget=budget).texts[0] for budget in ("dense", "own"))
    expect(page.locator("#pair .text")).to_have_text([dense, own])
    expect(page.locator("#pair h3")).to_have_text(["dense", "own"])
    left, right = (page.locator("#pair dl").nth(n).locator("dd").all_inner_texts() for n in range(2))
    assert float(left[0]) == 144
    assert float(right[0].split()[0]) == pytest.approx((144 + 72 + 28) / 3, abs=0.05)
    slots = {budget: engine.memory // engine.slots for budget, engine in service.engines.items()}
    assert [float(x[3].split()[0]) for x in (left, right)] == [round(slots[b] / 2**20, 2) for b in ("dense", "own")]
    change = round(100 * (slots["own"] / slots["dense"] - 1))
    assert right[3].endswith(f"{-change} %")
    slider = page.get_by_role("slider", name="Image tokens")
    expect(slider).to_have_attribute("aria-valuetext", "own: 57 % on average")
    expect(page.locator("#strip li")).to_have_count(3)
    slider.press("ArrowLeft")
    expect(slider).to_have_attribute("aria-valuetext", "dense: 100 % on average")
    expect(page.locator("#strip li")).to_have_count(1)
    expect(page.locator("#answer")).to_have_text(dense)
    expect(page.locator("#pair h3")).to_have_text(["own", "dense"])


def test_what_is_no_picture_or_too_large_is_refused_in_a_sentence(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "large.png").write_bytes(bytes(2**25 + 1))
    Image.effect_noise((2200, 2200), 90).save(tmp_path / "noise.png")  # larger than this server's requests
    chosen = page.get_by_label("Choose a picture")
    for name, words in {
        "notes.txt": "notes.txt is not a picture: choose a JPEG, PNG, WebP or GIF file.",
        "broken.png": "broken.png cannot be read as a picture: choose a JPEG, PNG, WebP or GIF file.",
        "large.png": "large.png has 33 MiB, but this server takes pictures of up to 32 MiB: choose a smaller one.",
    }.items():
        chosen.set_input_files(tmp_path / name)
        expect(notice(page)).to_have_text(words)
    ask(page)
    expect(notice(page)).to_have_text("There is no picture yet: drop one in, or use the sample.")
    chosen.set_input_files(tmp_path / "noise.png")
    expect(notice(page)).to_be_hidden()
    ask(page)
    expect(notice(page)).to_have_text("The picture is larger than this server takes: choose a smaller one.")


def test_a_server_that_is_full_or_gone_or_wants_another_key(page, service, monkeypatch):
    page.get_by_role("button", name="Use the sample picture").click()
    engine, begun, go = service.engines["own"], threading.Event(), threading.Event()

    def hold(piece):
        begun.set()
        assert go.wait(60)

    held = [engine.submit(QUESTION, sampling=Sampling(2), stream=hold)]
    assert begun.wait(60)
    held += [engine.submit(QUESTION, sampling=Sampling(2)) for _ in range(WAITING)]
    ask(page)
    expect(notice(page)).to_have_text(
        "The server is full, because as many questions wait as it takes: ask again in a few seconds."
    )
    go.set()
    for handle in held:
        handle.result(60)
    ask(page, "Q" * 300)
    expect(notice(page)).to_have_text(
        re.compile(r"^The prompt has \d+ text tokens, but the buckets hold at most 64: .*\.$")
    )
    monkeypatch.setattr(service, "state", "warming up")
    ask(page)
    expect(notice(page)).to_have_text("The server is starting or stopping: ask again in a moment.")
    monkeypatch.undo()
    page.get_by_label("API key").fill("another")
    ask(page)
    expect(notice(page)).to_have_text("This server wants an API key: enter it above, and ask again.")
    page.context.set_offline(True)
    ask(page)
    expect(notice(page)).to_have_text(
        "The server cannot be reached, or the connection broke off: check that it is running, and ask again."
    )


def test_the_page_waits_for_a_server_that_compiles(browser, url, service, monkeypatch):
    monkeypatch.setattr(service, "state", "warming up")
    page = browser.new_page()
    page.goto(url)
    expect(page.locator("#state")).to_have_text("The server is compiling its programs …")
    monkeypatch.undo()
    expect(page.get_by_label("API key")).to_be_visible()
    expect(page.locator("#state")).to_be_empty()
    page.close()


def test_it_fits_a_phone(page, tmp_path):
    page.set_viewport_size({"width": 375, "height": 812})
    runpy.run_path(str(DOCS / "screenshot.py"))["take"](page, tmp_path / "phone.png")
    assert Image.open(tmp_path / "phone.png").width == 375
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, input:not([type=radio], [type=file]), select")]
            .filter(x => x.offsetParent && x.getBoundingClientRect().height < 32).map(x => x.id)"""
    )
    assert small == []
