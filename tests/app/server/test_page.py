"""The page: what is drawn, and a real browser that uploads, asks, seeks, and speaks with a live session."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from media_making import Audio, Video, grey, ramp, steady, tone, write_media
from serving import Served, serve

from mirasol.app.page.asking import MOST_CHUNKS, answer_on_page
from mirasol.app.page.drawing import draw_answer, draw_candidates, draw_trouble
from mirasol.app.page.examples import EXAMPLES, render_example
from mirasol.app.server.settings import ServerSettings
from mirasol.evaluation.answer import RankedCandidate

CHROMIUM = Path("/usr/bin/chromium")
SOUNDS = {"bell.wav": "pcm_s16le", "bell.ogg": "libopus", "bell.mp3": "libmp3lame"}
HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return render_example(EXAMPLES[0], tmp_path_factory.mktemp("example"))


async def collect(service, folder, paths, question, candidates) -> list[tuple[str, str, str]]:
    return [each async for each in answer_on_page(service, folder, paths, question, candidates)]


def ask(served: Served, folder: Path, path: Path | list[Path], question: str, candidates: str = "") -> list:
    paths = [str(each) for each in (path if isinstance(path, list) else [path])]
    work = collect(served.service, folder, paths, question, candidates)
    return asyncio.run_coroutine_threadsafe(work, served.loop).result(60)


def test_what_was_typed_is_escaped():
    ranked = [RankedCandidate(HOSTILE, 1.0, 0.5)]
    for drawn in (draw_answer(HOSTILE, 0.5, HOSTILE), draw_trouble(HOSTILE), draw_candidates(ranked)):
        assert "<script" not in drawn


def test_an_answer_is_streamed_and_is_that_of_the_api(served, example, answer_alone):
    shown = ask(served, example.path.parent, example.path, example.question, "\n".join(example.candidates))
    alone = answer_alone(example.path, example.question)
    answers = [re.search(r'class="answer">([^<]*)<', answer)[1] for answer, _, _ in shown]
    assert answers[-1] == alone.text and answers[0] == "…"
    answer, bars, timeline = shown[-1]
    assert f"{alone.probability:.0%}" in answer
    assert set(re.findall(r"<li><span>([^<]*)</span>", bars)) == set(example.candidates)
    chunks = int(re.search(r"--chunks: (\d+)", timeline)[1])
    assert timeline.count("data-seek=") == 5 * chunks and 1 <= chunks <= MOST_CHUNKS
    assert "url(data:image/png" in timeline and "http" not in timeline


UNTIDY = {
    "sound alone": ("clip.mp4", [Audio([(0.0, tone(3.2))])]),
    "a recording of sound": ("clip.ogg", [Audio([(0.0, tone(1.3))], codec="libopus")]),
    "pictures alone": ("clip.mp4", [Video(ramp(40), steady(40, 12.5))]),
    "silence": ("clip.mkv", [Video(ramp(30), steady(30, 10)), Audio([(0.0, tone(3.0, gain=0.0))])]),
    "sound later": ("clip.mp4", [Video(ramp(20), steady(20, 10)), Audio([(2.0, tone(2.0))])]),
    "upright": ("clip.webm", [Video([grey(90, 32, 128)] * 20, steady(20, 25), codec="libvpx")]),
    "a single picture": ("clip.mp4", [Video([grey(200)], [0.0])]),
    "a minute and more": ("clip.mp4", [Video([grey(90)] * 75, steady(75, 1.0))]),
}


@pytest.mark.parametrize("kind", UNTIDY)
def test_untidy_clips_have_a_timeline_too(served, tmp_path, kind):
    """What is missing is said in its cell; every number is one."""
    name, tracks = UNTIDY[kind]
    path = write_media(tmp_path / name, *tracks)
    *_, (answer, bars, timeline) = ask(served, tmp_path, path, "what is it?", "a bell\na drum")
    assert 'class="answer"' in answer and "alert" not in answer and "<meter" in bars
    drawn = re.sub(r"url\([^)]*\)", "", timeline)
    chunks = int(re.search(r"--chunks: (\d+)", drawn)[1])
    assert drawn.count("data-seek=") == 5 * chunks and float(re.search(r'data-seconds="([^"]*)"', drawn)[1]) > 0
    assert not re.search(r"\bnan\b|\binf\b|-0\.0+\b", drawn)
    without_video = all(isinstance(track, Audio) for track in tracks)
    without_audio = not any(isinstance(track, Audio) for track in tracks)
    assert (drawn.count(">no picture<") == chunks) == without_video
    assert (drawn.count(">no sound<") == chunks) == without_audio
    assert drawn.count(">–<") == drawn.count(">no picture<") + drawn.count(">no sound<")


@pytest.mark.parametrize("name", ["no clip", "two", "no question", "elsewhere", "broken", "one candidate"])
def test_trouble_is_told_in_words(served, example, tmp_path, name):
    folder, path, question, candidates = example.path.parent, example.path, example.question, ""
    if name == "no clip":
        path = []
    elif name == "two":
        path = [example.path, example.path]
    elif name == "no question":
        question = "  "
    elif name == "elsewhere":
        path = Path("/etc/hostname")
    elif name == "broken":
        folder, path = tmp_path, tmp_path / "broken.mp4"
        path.write_bytes(example.path.read_bytes()[:300])
    else:
        candidates = "circle"
    [*_, (answer, bars, timeline)] = ask(served, folder, path, question, candidates)
    assert 'role="alert"' in answer and bars == timeline == ""
    assert str(tmp_path) not in answer


@pytest.fixture(scope="module")
def paged(answerer) -> Iterator[Served]:
    pytest.importorskip("gradio", reason="the page needs gradio")
    from mirasol.app.page.blocks import mount_page

    with serve(ServerSettings(name="tiny"), answerer, mount_page) as server:
        yield server


def test_the_api_stays_beside_the_page(paged):
    assert paged.client.get("/").status_code == 200
    unknown = paged.client.get("/v1/nothing")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "not_found"
    assert paged.client.get("/gradio_api/file=/etc/hostname").status_code in (403, 404)
    assert paged.client.get("/", headers={"host": "evil.example"}).status_code == 400


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="a browser is driven with playwright")
    if not CHROMIUM.exists():
        pytest.skip("no chromium is installed")
    fake = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-sandbox"]
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=fake)
        yield launched
        launched.close()


@pytest.fixture
def page(browser, paged) -> Iterator:
    """The opened page; in the end, no error was in its console and no request went elsewhere."""
    opened = browser.new_page()
    trouble: list[str] = []
    opened.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("request", lambda request: trouble.append(request.url) if is_elsewhere(request.url, paged) else None)
    opened.set_default_timeout(90_000)
    opened.goto(paged.url)
    yield opened
    opened.close()
    assert trouble == []


def is_elsewhere(url: str, paged: Served) -> bool:
    return not url.startswith((paged.url, paged.url.replace("http", "ws"), "data:", "blob:"))


@pytest.mark.slow
def test_upload_ask_and_seek_in_a_browser(page, example, answer_alone):
    page.locator("#player input[type=file]").set_input_files(str(example.path))
    page.locator("#player video").wait_for()
    page.get_by_label("Question").fill(example.question)
    page.get_by_label("Candidates").fill("\n".join(example.candidates))
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#timeline .cell").first.wait_for()
    alone = answer_alone(example.path, example.question)
    assert page.locator("#answer .answer").inner_text() == alone.text
    assert page.locator("#candidates li").count() == len(example.candidates)
    cell = page.locator("#timeline .cell").nth(2)
    cell.focus()
    page.keyboard.press("Enter")
    sought = float(cell.get_attribute("data-seek"))
    page.wait_for_function(f"Math.abs(document.querySelector('#player video').currentTime - {sought}) < 0.05")
    assert sought > 0
    assert page.locator(".playhead").is_visible()


CONTROLS = "button, input, textarea, select, a[href], [role=tab], [role=combobox]"
NAME = (
    "e => e.getAttribute('aria-label') || [...(e.labels || [])].map(l => l.innerText).join() || e.innerText || e.title"
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "codec"), SOUNDS.items())
def test_a_sound_alone_in_a_browser(page, tmp_path, answer_alone, name, codec):
    path, question = write_media(tmp_path / name, Audio([(0.0, tone(2.6))], codec=codec)), "which sound is heard?"
    page.get_by_text("Or a sound without pictures").click()
    page.locator("#sound input[type=file]").set_input_files(str(path))
    page.locator("#sound audio").wait_for(state="attached")
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#timeline .cell").first.wait_for()
    assert page.locator("#answer .answer").inner_text() == answer_alone(path, question).text
    assert page.get_by_text("no picture").count() >= 5
    cell = page.locator("#timeline .cell.sound").nth(3)
    cell.click()
    sought = float(cell.get_attribute("data-seek"))
    page.wait_for_function(f"Math.abs(document.querySelector('#sound audio').currentTime - {sought}) < 0.1")


@pytest.mark.slow
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_it_fits_a_phone_and_names_all_that_can_be_pressed(browser, paged, example, colours):
    """Nothing is wider than the screen, text stands out from its ground, and the keyboard reaches the button."""
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme=colours
    )
    opened = context.new_page()
    opened.set_default_timeout(90_000)
    opened.goto(paged.url)
    opened.locator("#player input[type=file]").set_input_files(str(example.path))
    opened.locator("#player video").wait_for()
    opened.get_by_label("Question").fill(example.question)
    opened.get_by_label("Candidates").focus()
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "ask"
    opened.keyboard.press("Enter")
    opened.locator("#timeline .cell").first.wait_for()
    for tab in ("A clip", "Live"):
        opened.get_by_role("tab", name=tab).click()
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
        controls = [each for each in opened.query_selector_all(CONTROLS) if each.is_visible()]
        assert len(controls) > 3 and all(control.evaluate(NAME) for control in controls)
    assert (find_brightness(opened, "backgroundColor") < 60) == (colours == "dark")
    assert abs(find_brightness(opened, "color") - find_brightness(opened, "backgroundColor")) > 150
    context.close()


def find_brightness(page, what: str) -> float:
    """Of the page's text or ground, 0 to 255."""
    colour = page.evaluate(f"getComputedStyle(document.body).{what}")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.slow
def test_trouble_is_shown_in_a_browser(page):
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("alert").filter(has_text="no clip").wait_for()


@pytest.mark.slow
def test_the_page_asks_for_the_key(browser, answerer):
    """By the browser's own dialog; what is live has the key too."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    from mirasol.app.page.blocks import mount_page

    key = "a key of many letters"
    with serve(ServerSettings(name="tiny", api_key=key), answerer, mount_page) as served:
        assert served.client.get("/", headers={"authorization": ""}).status_code == 401
        context = browser.new_context(http_credentials={"username": "me", "password": key})
        opened = context.new_page()
        opened.set_default_timeout(90_000)
        assert opened.goto(served.url).status == 200
        opened.get_by_role("tab", name="Live").click()
        opened.get_by_role("button", name="Start camera").click()
        opened.wait_for_function("Number(document.getElementById('live-chunks').textContent) >= 1")
        context.close()


@pytest.mark.slow
def test_live_in_a_browser(page):
    page.get_by_role("tab", name="Live").click()
    page.get_by_role("button", name="Start camera").click()
    page.wait_for_function("Number(document.getElementById('live-chunks').textContent) >= 2")
    page.get_by_label("question about what is seen").fill("which shape is seen last?")
    page.locator("#live-ask").click()
    page.wait_for_function("document.getElementById('live-answer').textContent.includes('%')")
    assert page.locator("#live-memory").inner_text().endswith("MiB")
    page.locator("#live-stop").click()
    assert page.locator("#live-status").inner_text() == "stopped"
