"""The page of `serve` in Chromium: drop scans, ask, read the answer as it comes, lay over why, and see errors."""

import gzip
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copy
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.helpers.devtools import DISPLAY_RULES, Browser, Tab
from tests.helpers.served import Served
from umbrella_jax.serve import engine
from umbrella_jax.serve.guard import Access

NAME = "<img src=x onerror=alert(1)>.nii.gz"
"""Of an upload: must never become an element."""


@pytest.fixture
def tab(chromium: Browser, served: Served) -> Iterator[Tab]:
    with chromium.open(served.url) as own:
        own.wait("document.querySelector('#facts dd')")
        yield own
    for scan in served.scans.listed():
        served.scans.remove(scan.id)


def drop(tab: Tab, *files: Path) -> None:
    """Drop files, and wait until each is in a panel."""
    count = tab.evaluate("document.querySelectorAll('.open-scan').length") + len(files)
    tab.drop_files("#drop", *files)
    tab.wait(f"[...document.querySelectorAll('.panel-readout')].filter((e) => e.textContent).length === {count}")


def ask(tab: Tab, question: str) -> None:
    """Ask, and wait for the whole answer."""
    count = tab.evaluate("document.querySelectorAll('.exchange').length") + 1
    tab.type("#question", question)
    tab.click("#send")
    tab.wait(f"document.querySelectorAll('.exchange .actions:not([hidden])').length === {count}")


def names(tab: Tab, selector: str) -> list[str]:
    """Return the texts of all elements that match."""
    texts: list[str] = tab.evaluate(f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)")
    return texts


def pixels(tab: Tab, stage: int, out: Path) -> np.ndarray:
    """Return what a panel shows, int [height, width, 3]."""
    box = tab.evaluate(
        f"""((e) => {{ e.scrollIntoView({{block: "center", behavior: "instant"}});
          const {{x, y, width, height}} = e.getBoundingClientRect(); return [x, y, x + width, y + height]; }})
        (document.querySelectorAll(".panel-stage")[{stage}])"""
    )
    return np.asarray(Image.open(tab.screenshot(out)).convert("RGB").crop(box), int)


def test_scans_are_asked_about_and_the_answer_is_laid_over_them(tab: Tab, served: Served, tmp_path: Path) -> None:
    run = served.scan.with_name("run-0.nii")
    drop(tab, copy(served.scan, tmp_path / NAME), run)
    assert tab.text("#gaps strong") == "measured accuracies"
    assert tab.text(".open-scan .name") == NAME
    assert tab.evaluate("document.querySelectorAll('main img').length") == 0

    # the guess is shown, and is never taken without a yes
    tab.type("#question", "Which sex?")
    tab.click("#send")
    assert "Choose the modality" in tab.text(".modality .alert")
    assert "only modality" in tab.text(".guess")
    tab.click(".guess button")
    tab.click(".open-scan:nth-of-type(2) .guess button")
    tab.click(".check:nth-of-type(2) input")  # the run is left out

    # the answer appears in pieces, with the likelihoods of answers to compare
    tab.evaluate("document.querySelector('.ask details').open = true")
    tab.type("#longest", "6")
    tab.type("#answers", "left.\nright.")
    tab.evaluate(
        """new MutationObserver((records) => (window.pieces ??= []).push(...records.map((r) => r.oldValue)))
        .observe(document.querySelector('#turns'), {subtree: true, characterData: true, characterDataOldValue: true})"""
    )
    ask(tab, "Which sex?")
    whole = served.ask(extra_body={"umbrella": {"answers": ["left.", "right."]}})
    assert tab.text(".answer-text").startswith(whole.choices[0].message.content)
    assert len(tab.evaluate("[...new Set(window.pieces)]")) > 1
    rows = "[...document.querySelectorAll('.likelihoods tbody tr')]"
    widths = dict(
        tab.evaluate(f"{rows}.map((row) => [row.cells[0].textContent, row.querySelector('.bar').style.width])")
    )
    shares = {answer: float(width.removesuffix("%")) / 100 for answer, width in widths.items()}
    assert shares == pytest.approx(
        {own["answer"]: own["probability"] for own in whole.umbrella["likelihoods"]}, abs=1e-4
    )

    # the answer without the scan, beside it
    tab.click(".actions button")
    tab.wait("document.querySelector('.likelihoods thead tr').cells.length === 4")
    blank = served.ask(extra_body={"umbrella": {"control": "blank"}})
    assert tab.text(".without-box .answer-text").startswith(blank.choices[0].message.content)

    # why, over the scan, and as a file in its space
    plain = pixels(tab, 0, tmp_path / "plain.png")
    tab.click(".actions .row button")
    tab.wait("document.querySelector('.maps li')")
    tab.wait("document.querySelector('.panel-bar:not([hidden])')")
    laid_over = pixels(tab, 0, tmp_path / "laid_over.png")
    red = [int((own[..., 0] - own[..., 2] > 60).sum()) for own in (plain, laid_over)]
    assert red[0] == 0
    assert red[1] > 100
    path = tab.evaluate("new URL(document.querySelector('.maps a').href).pathname")
    made, scan = nib.Nifti1Image.from_bytes(gzip.decompress(served.fetch(path))), nib.load(served.scan)
    assert made.shape == scan.shape
    np.testing.assert_array_equal(made.affine, scan.affine)

    # what the model sees, in its own number of voxels
    tab.click(".views button:nth-child(2)")
    tab.wait("document.querySelector('.panel .slider output').textContent.endsWith(' of 6')")
    assert tab.evaluate("document.querySelector('.panel-bar').hidden")

    # frames of the run, by the slider and by keyboard
    before, readout = (
        pixels(tab, 1, tmp_path / "frame.png"),
        "document.querySelectorAll('.panel-readout')[1].textContent",
    )
    first = tab.evaluate(readout)
    tab.choose('.panel input[aria-label="frame"]', "2")
    assert tab.evaluate(readout) != first
    assert (pixels(tab, 1, tmp_path / "frame.png") != before).any()
    tab.evaluate("document.querySelectorAll('.panel canvas')[1].focus()")
    tab.press("]")
    assert tab.evaluate("document.querySelector('.panel input[aria-label=frame]').value") == "3"
    tab.press("PageDown")
    coronal = "document.querySelectorAll('.panel')[1].querySelectorAll('.slider output')[1].textContent"
    assert tab.evaluate(coronal) == "2 of 4"

    # a second turn, to which the run belongs
    tab.click(".check input")
    ask(tab, "And this one?")
    assert "Scan 2" in tab.text(".exchange:nth-child(2) .question")
    assert "Scan 1, Scan 2" in tab.text("#shown")

    for width, scheme in ((1280, "light"), (1280, "dark"), (400, "dark"), (400, "light")):
        tab.resize(width, 900)
        tab.prefer(scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    assert tab.accessibility() == []
    tab.resize(1280, 900)
    tab.prefer("dark")
    assert tab.accessibility(DISPLAY_RULES) == []
    assert tab.errors == []
    assert tab.outside == []
    assert {url.removeprefix(served.url).split("?")[0] for url in tab.requests} >= {
        "/",
        "/static/serve.js",
        "/v1/explain",
    }


def test_errors_appear_where_they_happen_with_the_remedy(tab: Tab, served: Served, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no scan")
    tab.drop_files("#drop", tmp_path / "notes.txt")
    tab.wait("document.querySelector('#upload-errors .alert')")
    assert "notes.txt: " in tab.text("#upload-errors")
    assert "Choose a NIfTI file" in tab.text("#upload-errors")

    drop(tab, served.scan)
    assert tab.text("#upload-errors") == ""
    tab.click(".guess button")
    for scan in served.scans.listed():
        served.scans.remove(scan.id)
    tab.type("#question", "Which sex?")
    tab.click("#send")
    tab.wait("document.querySelector('.exchange .alert')")
    assert "upload it again" in tab.text(".exchange .alert")
    assert tab.refused[0][1] == 415
    assert all("Failed to load resource" in error for error in tab.errors), tab.errors


@pytest.fixture
def slow(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each token of an answer, and each pass of an explanation, take long enough to press a button."""

    def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*arguments: Any) -> Any:
            time.sleep(0.2)
            return function(*arguments)

        return wait

    monkeypatch.setattr(served.engine, "_advance", slowed(served.engine._advance))
    monkeypatch.setattr(engine, "ExplainProgress", slowed(engine.ExplainProgress))


def test_work_ends_where_it_is_stopped_or_left(tab: Tab, served: Served, slow: None) -> None:
    drop(tab, served.scan, served.scan.with_name("3.nii.gz"))
    for number in (1, 2):
        tab.click(f".open-scan:nth-of-type({number}) .guess button")

    def start(count: int = 1) -> None:
        tab.click("#send")
        tab.wait(
            f"document.querySelectorAll('.exchange').length === {count} && "
            "document.querySelector('.exchange:last-child .answer-text').textContent"
        )

    # stopped: on the server too, and the conversation is as before
    tab.type("#question", "Which sex?")
    tab.evaluate("for (let i = 0; i < 3; i++) document.querySelector('#send').click()")  # an impatient person
    start()
    tab.click(".answer > button")
    tab.wait("document.querySelector('.cut')?.textContent.startsWith('Stopped')")
    until_idle(served)
    assert tab.evaluate("document.querySelector('#send').disabled") is False
    assert tab.evaluate("document.querySelector('#question').value") == "Which sex?"
    assert len(names(tab, ".check")) == 2

    # left: the answer belongs to no other conversation
    start(2)
    tab.click("#restart")
    until_idle(served)
    assert names(tab, ".exchange") == []
    start()
    tab.wait("document.querySelector('.actions:not([hidden])')")
    assert tab.evaluate("document.activeElement.id") == "question"
    assert tab.text("#shown").startswith("In the conversation already: Scan 1, Scan 2.")
    both = served.ask("Which sex?", served.image(), served.image(served.scan.with_name("3.nii.gz")), max_tokens=8)
    assert both.choices[0].message.content in tab.text(".answer-text")

    # an explanation that is cancelled, and one whose conversation ends
    for selector in (".why button", "#restart"):
        tab.click(".actions .row button")
        tab.wait("document.querySelector('.why progress').value > 0")
        tab.click(selector)
        tab.wait("!document.querySelector('.why:not([hidden])')")
        until_idle(served)
    assert tab.evaluate("document.querySelector('.panel-bar').hidden")
    assert tab.evaluate("document.querySelector('#question').value") == "Which sex?"  # offered for the scans open now

    # a scan that is closed while the answer comes stays in the conversation
    start()
    tab.click(".open-scan .card-head button:last-child")
    tab.wait("document.querySelector('.actions:not([hidden])')")
    assert "Scan 1 (closed), Scan 2" in tab.text("#shown")
    ask(tab, "And now?")
    tab.evaluate("URL.createObjectURL = (blob) => { window.saved = blob.text(); return '#'; }")
    tab.click("#save")
    saved = json.loads(tab.wait("window.saved"))
    assert [own["question"] for own in saved["answers"]] == ["Which sex?", "And now?"]
    assert [scan["name"] for scan in saved["answers"][0]["scans"]] == ["0.nii.gz", "3.nii.gz"]
    assert saved["answers"][1]["answer"] in tab.text(".exchange:nth-child(2) .answer-text")
    assert tab.errors == []


def until_idle(served: Served) -> None:
    """Wait until the server works on nothing."""
    end = time.monotonic() + 10
    while served.engine.waiting or served.engine.answering or served.engine._explained:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_numbers_are_shown_as_their_distribution(tab: Tab, served: Served) -> None:
    tab.drop_files("#drop", served.scan)
    tab.wait("document.querySelector('.guess button')")
    tab.click(".guess button")
    tab.choose("#task", "age")
    assert tab.text("#task-note") == "A number from 20 to 89 years."
    ask(tab, "How old?")
    numbers = served.ask("How old?", extra_body={"umbrella": {"task": "age"}}).umbrella["numbers"]
    summary = tab.text(".numbers figcaption b")
    low, high = numbers["interval_95"]
    expected = f"Expected {numbers['expectation']:.4g} years · median {numbers['median']:g}"
    assert summary == f"{expected} · 95 % between {low:g} and {high:g}"
    tab.click(".actions button")
    tab.wait("document.querySelector('.without-line')")
    blank = served.ask("How old?", extra_body={"umbrella": {"task": "age", "control": "blank"}}).umbrella["numbers"]
    without = f"Without the scan: expected {blank['expectation']:.4g} years · median {blank['median']:g} · 95 % between"
    assert names(tab, ".numbers figcaption b")[1].startswith(without)

    # round numbers at both axes, where they belong; medians and intervals at their places
    assert names(tab, ".numbers .tick") == ["20", "40", "60", "80"]
    shares = [float(text.removesuffix(" %")) for text in names(tab, ".numbers .share-tick")]
    assert shares == pytest.approx([shares[1] * i for i in range(len(shares))])
    assert f"{shares[1]:g}".strip("0.") in ("1", "2", "5")
    left, right = tab.evaluate("[...document.querySelectorAll('.numbers .tick')].map((e) => e.x.baseVal[0].value)")[::3]
    places = tab.evaluate(
        "['with', 'without'].map((kind) => [...document.querySelectorAll(`.numbers :is(line, circle).${kind}`)]"
        ".flatMap((e) => e.r ? [e.cx.baseVal.value] : [e.x1.baseVal.value, e.x2.baseVal.value]))"
    )
    for own, drawn in zip((numbers, blank), places, strict=True):
        years = [20 + (x - left) / (right - left) * 60 for x in drawn]
        assert years == pytest.approx([*own["interval_95"], own["median"]], abs=0.01)
    bars = tab.evaluate("[...document.querySelectorAll('.numbers rect.with')].map((e) => e.height.baseVal.value)")
    pairs = np.add.reduceat(numbers["probabilities"], range(0, 70, 2))
    assert np.array(bars) / sum(bars) == pytest.approx(pairs, abs=1e-3)
    assert tab.accessibility() == []


def test_a_browser_without_webgl_can_ask_all_the_same(tab: Tab, served: Served) -> None:
    # and a list of scans that arrives late, after an upload that it does not contain
    source = """HTMLCanvasElement.prototype.getContext = () => null;
      const plain = fetch;
      window.fetch = async (path, options) => {
        const answer = await plain(path, options);
        if (path === "/api/scans" && !options.method) await new Promise((late) => setTimeout(late, 1000));
        window.hasList ||= path === "/api/scans" && !options.method;
        return answer;
      };"""
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=source)
    tab.go(served.url)
    tab.wait("document.querySelector('#facts dd')")
    tab.drop_files("#drop", served.scan)
    tab.wait("window.hasList && document.querySelector('.open-scan .alert')")
    assert "no WebGL 2" in tab.wait("document.querySelector('.open-scan > [role=alert]')?.textContent")
    tab.click(".guess button")
    ask(tab, "Which sex?")
    tab.click(".actions .row button")
    tab.wait("document.querySelector('.maps a')")
    assert tab.text(".maps button") == "Show on Scan 1"


def test_a_server_with_a_token_asks_for_it(tab: Tab, served: Served) -> None:
    with served.listening(Access("127.0.0.1", "correct-horse-battery")) as url:
        tab.go(url)
        assert "a token is needed" in tab.text("[role=alert]")
        assert tab.accessibility() == []
        tab.type("input", "wrong")
        tab.press("Enter")
        tab.wait("document.querySelector('[role=alert]')?.textContent.startsWith('this is not the server')")
        tab.type("input", "correct-horse-battery")
        tab.press("Enter")
        tab.wait("document.querySelector('#facts dd')")
        assert tab.evaluate("location.href") == f"{url}/"
        tab.go(url)
        tab.wait("document.querySelector('#facts dd')")
