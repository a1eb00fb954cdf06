"""A run's page: every number in it is that of the run's files, it holds all it shows, and it is legible."""

import html
import json
import math
import re
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers import small_run
from tests.helpers.devtools import Browser, check_page
from tests.helpers.page import Page, read_picture
from tests.helpers.small_run import World, conversation, read_lines, umbrella, write_json
from umbrella_jax.html import page as html_page
from umbrella_jax.html import slices
from umbrella_jax.report import facts, figures
from umbrella_jax.scoring.bootstrap import Figure
from umbrella_jax.scoring.number_calibration import CalibratedLevel

STEP = 3
ODD = "<script>alert(1)</script>&'\""
Rows = list[dict[str, Any]]


def evaluation() -> list[dict[str, Any]]:
    """A classification, a comparison and a regression, of 12 subjects, about the world's scans."""
    conversations = []
    for i in range(12):
        subject, label, other = f"S{i:02}", "left" if i % 3 else "right", "left" if i % 2 else "right"
        meta = {"subject_id": subject, "subject_label": label}

        def ask(task: str, turns: list[Any], meta: dict[str, Any], name: str = subject) -> dict[str, Any]:
            return conversation(f"{name}_{task}", "T1", turns, metadata=meta | {"task": task})

        scan, last = f"sMRI:{i % 4}.nii.gz", ("assistant", [f"{label}."])
        conversations.append(ask("side", [("user", [scan, "Which side?"]), last], meta, ODD if i == 4 else subject))
        reference = [("user", [f"sMRI:{(i + 1) % 4}.nii.gz", "A reference."]), ("assistant", [f"{other}."])]
        pair = meta | {"reference_label": other, "comparison_type": "same" if other == label else "different"}
        conversations.append(ask("pair", [*reference, ("user", [scan, "And this one?"]), last], pair))
        turns = [("user", [f"fMRI:run-{i % 4}.nii", "How old?"]), ("assistant", [f"{20 + i * i / 4:g} years"])]
        conversations.append(ask("age", turns, {"subject_id": subject, "subject_label": 20 + i * i / 4}))
    return conversations


def answered(rows: Rows) -> Rows:
    """Answer as a model would: some right, some wrong, some unparsable; sides have likelihoods."""
    for i, row in enumerate(rows):
        if row["metadata"]["task"] == "age":
            truth = float(row["metadata"]["subject_label"])
            row["prediction"] = "no idea" if i == 5 else f"{truth + (-1) ** i * i / 3:.1f} years"
            continue
        flip = {"left.": "right.", "right.": "left."}
        row["prediction"] = "both" if i == 9 else flip[row["reference"]] if i % 7 in (3, 4) else row["reference"]
        share = 0.5 + 0.49 * math.sin(i) ** 2
        likeliest = row["prediction"] if row["prediction"] in flip else "left."
        row["likelihoods"] = {answer: math.log(share if answer == likeliest else 1 - share) for answer in flip}
    return rows


def make_run(root: Path) -> tuple[World, Path]:
    """A world and a run in it, evaluated twice, first in part; the answers of the last evaluation are `answered`."""
    world = small_run.make_world(root, train={"max_new_tokens": 16})  # "20.25 years" takes ten
    write_json(world.eval, evaluation())
    training = json.loads(world.train.read_text())
    write_json(world.train, [record for record in training if record["task_id"].startswith("one-")])  # one shape
    out = root / "run"
    flags = ["--eval-data", world.eval, "--epochs", STEP, "--set", "train.eval_steps=2"]
    flags += ["--set", "train.eval_samples=20"]
    umbrella(*world.train_flags(out, *flags))
    last = out / "predictions" / f"step_{STEP}.jsonl"
    rows = answered(read_lines(last))
    write_rows(last, rows)
    write_rows(out / "controls" / f"step_{STEP}" / "blank.jsonl", blanked(rows))
    return world, out


def blanked(rows: Rows) -> Rows:
    """Answer without the scan: pairs as with it, all other sides are left, and every age is 40."""
    by_task = {"side": {"prediction": "left."}, "age": {"prediction": "40"}, "pair": {}}
    plain = [{key: value for key, value in row.items() if key != "likelihoods"} for row in rows]
    return [row | {"control": "blank"} | by_task[row["metadata"]["task"]] for row in plain]


def write_rows(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    return make_run(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(made: tuple[World, Path]) -> Path:
    return made[1]


@pytest.fixture(scope="module")
def rows(run: Path) -> Rows:
    return read_lines(run / "predictions" / f"step_{STEP}.jsonl")


@pytest.fixture(scope="module")
def baselines(run: Path, rows: Rows) -> Path:
    """One that always says left and 30, and one that leaves the pairs out."""
    folder = run.parent / "baselines"
    plain = [{k: v for k, v in row.items() if k != "likelihoods"} for row in rows]
    said = [row | {"prediction": "30" if row["metadata"]["task"] == "age" else "left."} for row in plain]
    write_rows(folder / "baseline" / "cnn.jsonl", said)
    write_rows(folder / "baseline" / "probe.jsonl", [row for row in said if row["metadata"]["task"] != "pair"])
    return folder


@pytest.fixture(scope="module")
def page(run: Path, baselines: Path) -> Page:
    said = umbrella("report", run, "--baseline", baselines, "--samples", 30)
    assert said == f"{run / 'report.html'}:\n  {html_page.PRIVACY}\n"
    return Page(run / "report.html")


def by_task(rows: Rows, task: str) -> Rows:
    return [row for row in rows if row["metadata"]["task"] == task]


def test_accuracies_are_those_of_the_predictions(page: Page, rows: Rows) -> None:
    for task in ("side", "pair"):
        of = by_task(rows, task)
        right = np.mean([row["prediction"] == row["reference"] for row in of])
        most = Counter(row["reference"] for row in of).most_common(1)[0][1] / len(of)
        value, text = page.cells[task, "accuracy", "run"]
        assert value == pytest.approx(right)
        assert text.startswith(f"{right:.3f}")
        assert page.cells[task, "accuracy", "cnn"][0] == pytest.approx(np.mean([r["reference"] == "left." for r in of]))
        if task == "side":
            assert page.numbers["scores"]["tasks"][task]["figures"]["accuracy"]["chance"] == pytest.approx(most)
            low, high = (page.numbers["scores"]["tasks"][task]["figures"]["accuracy"][end] for end in ("low", "high"))
            assert low < right < high
            assert f"{low:.3f} to {high:.3f}" in text
    assert ("pair", "accuracy", "probe") not in page.cells
    assert ("side", "accuracy", "probe") in page.cells


def test_errors_of_numbers_are_those_of_the_predictions(page: Page, rows: Rows) -> None:
    of = by_task(rows, "age")
    pairs = [(r["metadata"]["subject_label"], r["prediction"].removesuffix(" years")) for r in of]
    assert page.numbers["numbers"]["age"] == [[t, None if p == "no idea" else float(p)] for t, p in pairs]
    truths = [truth for truth, _ in pairs]
    farther = {t: max(max(truths) - t, t - min(truths)) for t in truths}  # the value that replaces a missing number
    errors = [farther[t] if p == "no idea" else abs(float(p) - t) for t, p in pairs]
    assert page.cells["age", "mae", "run"][0] == pytest.approx(np.mean(errors))
    assert page.cells["age", "mae", "cnn"][0] == pytest.approx(np.mean([abs(30 - t) for t in truths]))


def test_controls_and_baselines_are_those_of_score(page: Page, rows: Rows, run: Path, baselines: Path) -> None:
    scores = json.loads(umbrella("score", run, "--baseline", baselines, "--json"))
    assert page.numbers["compared"] == scores["compared"]
    for task in ("side", "pair"):
        changed = np.mean([row["prediction"] != "left." for row in by_task(rows, task)]) if task == "side" else 0
        assert page.cells[f"{task}: controls", "changed", "blank"][0] == pytest.approx(changed)
    cnn = next(one for one in scores["compared"]["tasks"]["age"]["predictors"] if one["name"] == "cnn")
    value, text = page.cells["age: mae", "difference", "cnn"]
    assert value == cnn["difference"]["figure"]["value"]
    assert f"{cnn['difference']['figure']['low']:.3f} to" in text


def test_baselines_in_a_run_are_compared_by_default(copy: Path, baselines: Path) -> None:
    shutil.copytree(baselines / "baseline", copy / "baseline")
    printed = f"baselines: those in {copy / 'baseline'}; --baseline DIR takes others"
    scored = " ".join(umbrella("score", copy).split())
    assert printed in scored
    assert "cnn" in scored
    assert printed in umbrella("report", copy, "--samples", 0)
    assert "cnn" in Page(copy / "report.html").numbers["baselines"]


def test_the_first_screen_says_how_much_the_answers_show(page: Page, run: Path, rows: Rows, tmp_path: Path) -> None:
    first_screen = page.text.split('<h2 id="scan">')[0]
    assert "It was asked 36 questions of 3 tasks about 12 subjects; the answers are those after step 3" in first_screen
    assert (
        "<b>No evidence that the answers come from the scan</b>: without it, they are not clearly worse.<"
        in first_screen
    )
    assert "<li>pair: none of 12 answers changes with blank volumes" in first_screen
    assert "the best baseline, cnn" in first_screen
    assert "reliance on the scan unknown: the figure may be chance (blank)" in first_screen
    assert "<li>The only control is blank volumes" in first_screen
    assert "Few subjects (age 12, pair 12, side 12): with fewer than 30," in first_screen
    for number, task in enumerate(("age", "pair", "side"), 1):
        assert f'<a class="task" href="#task-{number}">{task}</a>' in first_screen
        assert f'<h3 id="task-{number}">{task} (' in page.text
    assert f'<a href="#samples">{page.numbers["failures"]} of 36 answers failed</a>.' in first_screen
    assert '<h2 id="samples">' in page.text
    right = [row | {"prediction": row["reference"]} for row in rows]
    write_rows(tmp_path / "right.blank.jsonl", blanked(rows))
    file = write_rows(tmp_path / "right.jsonl", right)
    umbrella("report", run, "--predictions", file, "--samples", 0, "--out", tmp_path / "right.html")
    other = Page(tmp_path / "right.html").text
    assert "No evidence" not in other
    assert "No baseline was given" in other
    umbrella("report", run, "--step", 2, "--samples", 0, "--out", tmp_path / "two.html")
    assert "No control without the scan was run" in Page(tmp_path / "two.html").text


def test_confusion_is_that_of_the_predictions(page: Page, rows: Rows) -> None:
    for task in ("side", "pair"):
        counts = Counter((row["reference"], row["prediction"]) for row in by_task(rows, task))
        columns = ("left.", "right.", "both")
        assert page.counts[task] == [counts[right, said] for right in ("left.", "right.") for said in columns]
    assert sum(page.counts["side"]) == 12


def test_calibration_is_that_of_the_likelihoods(page: Page, rows: Rows) -> None:
    for task in ("side", "pair"):
        bins = page.numbers["calibration"][task]
        assert sum(b["count"] for b in bins) == 12
        likeliest = [max(row["likelihoods"].items(), key=lambda item: item[1]) for row in by_task(rows, task)]
        mean = sum(b["count"] * b["confidence"] for b in bins) / 12
        assert mean == pytest.approx(np.mean([math.exp(value) for _, value in likeliest]))
        hits = [answer == row["reference"] for (answer, _), row in zip(likeliest, by_task(rows, task), strict=True)]
        assert sum(b["count"] * b["accuracy"] for b in bins) == pytest.approx(sum(hits))
        error = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / 12
        assert page.cells[task, "ece", "run"][0] == pytest.approx(error)


def test_curves_are_those_of_the_metrics(page: Page, run: Path) -> None:
    lines = read_lines(run / "metrics.jsonl")
    curves = page.numbers["curves"]

    def found(name: str) -> list[list[float]]:
        return [[line["step"], line[name]] for line in lines if name in line]

    assert len(found("loss")) == STEP
    assert curves["loss"] == {"training": found("loss"), "evaluation": found("eval_loss")}
    assert [step for step, _ in curves["loss"]["evaluation"]] == [2, STEP]
    assert curves["gradient norm"] == {"": found("grad_norm")}
    assert curves["learning rate"] == {"": found("learning_rate")}
    assert curves["evaluation: accuracy"] == {task: found(f"eval_accuracy/{task}") for task in ("pair", "side")}
    assert curves["evaluation: mae (years)"] == {"age": found("eval_mae/age")}
    drawn = [str(of["aria-label"]) for tag, of in page.elements if tag == "svg" and of.get("role") == "img"]
    assert [label.split(" over the steps")[0] for label in drawn if " over the steps" in label] == list(curves)


def test_the_page_has_the_data_parameters_and_versions_of_the_run(page: Page, made: tuple[World, Path]) -> None:
    world, run = made
    summary = umbrella("inspect", "--config", world.config, "--base", world.base)
    for name, (trains, frozen) in page.numbers["trains"].items():
        assert re.search(rf"^{name} +{trains + frozen:,} +{trains:,} +\S+ +{frozen:,} +\S+$", summary, re.MULTILINE)
        assert f'data-trains="{trains}">{trains:,}<' in page.text
    assert page.numbers["trains"]["patch_embed"][0] > 0
    train, evaluated = page.numbers["data"]["train"], page.numbers["data"]["eval"]
    assert (train["conversations"], train["volumes"]) == (4, 4)
    assert (evaluated["conversations"], evaluated["subjects"], evaluated["volumes"]) == (36, 12, 8)
    versions = small_run_meta(run)["versions"]
    assert {"umbrella-jax", "jax", "numpy"} <= versions.keys()
    for text in (str(world.base), *(f"{name} {version}" for name, version in versions.items()), "max_new_tokens: 16"):
        assert text in page.text


def small_run_meta(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    small_run.edit_meta(run, found.update)
    return found


def test_failures_come_first_of_every_task_in_turn(page: Page, rows: Rows) -> None:
    samples = page.numbers["samples"]
    failed = [sample["failed"] for sample in samples]
    assert failed == sorted(failed, reverse=True)
    assert len(samples) == 30
    assert [sample["task"] for sample in samples[:3]] == ["age", "pair", "side"]
    wrong = {
        row["task_id"] for row in rows if row["prediction"] != row["reference"] and row["metadata"]["task"] != "age"
    }
    assert {sample["task_id"] for sample in samples if sample["failed"] and sample["task"] != "age"} == wrong
    truth = {row["task_id"]: row["metadata"]["subject_label"] for row in by_task(rows, "age")}
    predictions = {row["task_id"]: row["prediction"] for row in by_task(rows, "age")}
    ages = [sample for sample in samples if sample["task"] == "age"]
    assert predictions[ages[0]["task_id"]] == "no idea"
    limit = np.mean(np.abs(np.array(list(truth.values())) - np.median(list(truth.values()))))
    off = [abs(float(predictions[s["task_id"]].split()[0]) - truth[s["task_id"]]) for s in ages[1:]]
    assert [s["failed"] for s in ages[1:]] == [error > limit for error in off]
    assert page.numbers["failures"] == len(wrong) + sum(sample["failed"] for sample in ages)  # 30 samples hold them all
    shown = [title for title in page.titles if " · " in title]
    assert len(shown) == 30
    assert shown[0] == f"no number age · {ages[0]['task_id']}"


def test_it_holds_all_it_shows_and_runs_only_its_own_script(page: Page) -> None:
    assert any(ODD in title for title in page.titles)
    tags = Counter(tag for tag, _ in page.elements)
    assert [of.get("type") for tag, of in page.elements if tag == "script"] == ["application/json", None]
    scans = {of["data-volume"] for _, of in page.elements if "data-volume" in of}
    assert len(scans) == 8, "each scan once, however many conversations show it"
    assert {"niivue", *scans} == {of["id"] for tag, of in page.elements if tag == "template"}
    assert not tags.keys() & {"link", "iframe", "object", "video"}
    links = [str(of[key]) for _, of in page.elements for key in ("src", "href", "srcset") if key in of]
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not any(key.startswith("on") for _, of in page.elements for key in of)
    assert "@import" not in page.text
    assert all(of.get("alt") for tag, of in page.elements if tag == "img")
    assert html_page.PRIVACY in page.text.replace("&#39;", "'")


def test_it_is_readable_by_everyone_and_asks_for_nothing(page: Page, run: Path, chromium: Browser) -> None:
    check_page(chromium, run / "report.html")


def test_it_is_legible_without_webgl_and_on_paper(page: Page, run: Path, tmp_path: Path, chromium: Browser) -> None:
    with chromium.open((run / "report.html").as_uri(), webgl=False) as tab:
        for width, on_paper in ((1280, False), (400, False), (718, True)):  # the last: A4 within its margins
            measured = tab.measure(width, paper=on_paper)
            assert (measured["whole"], measured["out"], measured["cut"]) == (width, [], 0)
            assert measured["smallest"] >= 12
            assert measured["tallest"] < 70  # no word is broken into letters
            assert all(natural > 0 and shown > 150 for natural, shown in measured["pictures"])
            if on_paper:
                continue
            file = tab.screenshot(tmp_path / f"{width}.png", selector="article.failed")
            picture = np.asarray(Image.open(file).convert("RGB"))
            assert (picture == (168, 58, 0)).all(-1).sum() > 200  # the badge of a failure
            assert (picture.max(-1) < 8).mean() > 0.02  # around slices
            assert (picture == 255).all(-1).mean() > 0.4
        assert 3 < len(re.findall(rb"/Type /Page\b(?!s)", tab.print_pdf())) < 60


def test_answers_are_listed_to_sort_and_filter(page: Page, run: Path, rows: Rows, chromium: Browser) -> None:
    with chromium.open((run / "report.html").as_uri()) as tab:
        headings = tab.evaluate("[...document.querySelectorAll('#answers-of-all th[scope=col]')].map(e => e.innerText)")
        assert headings == ["conversation", "subject", "task", "result", "expected", "answered", "error", "probability",
                            "reference_label", "comparison_type"]  # fmt: skip
        tab.choose(".data label:nth-of-type(3) select", "side")
        tab.choose(".data label:nth-of-type(4) select", "wrong")
        body = "[...document.querySelector('#answers-of-all tbody').rows]"
        cells = f"{body}.map(row => [...row.cells].map(e => e.innerText))"
        shown = tab.evaluate(cells)
        wrong = [row for row in by_task(rows, "side") if row["prediction"] != row["reference"]]
        assert {cell[0] for cell in shown} == {row["task_id"] for row in wrong}
        confidence = {row["task_id"]: math.exp(max(row["likelihoods"].values())) for row in wrong}
        assert all(float(cell[7]) == pytest.approx(confidence[cell[0]], abs=1e-3) for cell in shown)
        tab.choose("input[aria-label='probability from']", "0.9")
        assert len(tab.evaluate(cells)) == sum(value >= 0.9 for value in confidence.values())
        target = tab.evaluate("document.querySelector('#answers-of-all a').getAttribute('href')")
        assert tab.evaluate(f"document.querySelector('{target} h3').innerText").startswith(
            ("wrong", "no number", "off")
        )


def test_another_evaluation_and_other_predictions(run: Path, rows: Rows, tmp_path: Path) -> None:
    umbrella("report", run, "--step", 2, "--samples", 3, "--out", tmp_path / "two.html")
    two, part = Page(tmp_path / "two.html"), read_lines(run / "predictions" / "step_2.jsonl")
    assert two.numbers["step"] == 2
    assert two.numbers["calibration"] == {}
    assert 20 <= len(part) < 36
    assert f"Answers to {len(part)} of 36 conversations" in two.text
    right = [row["prediction"] == row["reference"] for row in by_task(part, "side")]
    assert two.cells["side", "accuracy", "run"][0] == np.mean(right)
    shown = [sample["task_id"] for sample in two.numbers["samples"]]
    assert set(shown) <= {row["task_id"] for row in part}
    (age,) = (name for name in shown if name.endswith("age"))
    assert f"run-{int(age[1:3]) % 4}.nii" in two.text  # its own scan
    umbrella("report", run, "--samples", 0, "--out", tmp_path / "none.html")
    assert "<article" not in Page(tmp_path / "none.html").text
    all_right = write_rows(tmp_path / "right.jsonl", [row | {"prediction": row["reference"]} for row in rows])
    umbrella("report", run, "--predictions", all_right, "--samples", 1, "--out", tmp_path / "right.html")
    assert "right.html: already exists; choose another file, or remove it" in refused(
        run, "--samples", 0, "--out", tmp_path / "right.html"
    )
    other = Page(tmp_path / "right.html")
    assert other.numbers["step"] is None
    assert other.cells["side", "accuracy", "run"][0] == 1
    assert [sample["failed"] for sample in other.numbers["samples"]] == [False]
    assert 'class="failed"' not in other.text


def test_explanations_are_laid_over(run: Path, rows: Rows, tmp_path: Path) -> None:
    answers = [row | {"prediction": row["reference"]} for row in rows]
    pair = next(row for row in answers if row["metadata"]["task"] == "pair")
    pair["prediction"] = "both"  # the one that failed comes first
    pair["number"] = {"expectation": 41.2345, "median": 41.0, "interval_80": [30.0, 50.0]}
    words = ["--predictions", write_rows(tmp_path / "answers.jsonl", answers), "--samples", 1, "--explain", "gradient"]
    umbrella("report", run, *words, "--out", tmp_path / "out.html")
    explained = Page(tmp_path / "out.html")
    assert explained.titles[-1] == f"wrong pair · {pair['task_id']}"
    assert "red raises it, blue lowers it" in explained.text.split('id="sample-1"')[0], "also if the panels are open"
    assert "log-probability of “both”:" in explained.text
    assert "expected 41.23, median 41, 80 % between 30 and 50<" in explained.text
    coloured = [read_picture(str(of["src"])) for tag, of in explained.elements if "speaks for" in str(of.get("alt"))]
    assert len(coloured) == 2  # both of its scans
    for picture in coloured:
        red, green, blue = (picture[..., i].astype(int) for i in range(3))
        assert (red > blue + 60).any()
        assert (blue > red + 60).any()
        assert (np.abs(red - green) < 3).mean() > 0.2
        bar = picture[-(2 * slices.MARGIN + 6) + 6, slices.MARGIN + 40 : -slices.MARGIN - 40].astype(int)
        assert (bar[0, 2] - bar[0, 0], bar[-1, 0] - bar[-1, 2]) > (60, 60)  # from against, blue, to for, red
        assert (np.diff(bar[:, 0] - bar[:, 2]) >= 0).all()
    beside = [
        (str(of["src"]), str(of["alt"])) for tag, of in explained.elements if tag == "img" and "scans" in str(of["alt"])
    ]
    for (scan, caption), (overlaid, _) in zip(beside[::2], beside[1::2], strict=True):
        assert caption.endswith("slices through the voxel with the largest share")
        grey, both = (
            read_picture(scan).astype(int),
            read_picture(overlaid).astype(int)[: read_picture(scan).shape[0]],
        )
        plain = (np.ptp(both, axis=-1) < 3) & (both.max(-1) > 60)  # tissue that the map leaves as it is
        assert plain.any()
        assert np.abs(grey[plain] - both[plain]).max() < 8, "the same slices"


def test_methods_and_commands_are_those_of_the_run(page: Page, run: Path, baselines: Path) -> None:
    (text,) = re.findall('<div class="to-copy">(.*?)</div>', page.text, re.DOTALL)
    trained, frozen = page.numbers["trains"]["total"]
    assert (
        f"We trained patch_embed of base with umbrella-jax {metadata.version('umbrella-jax')}: "
        f"{trained:,} of {trained + frozen:,} parameters" in text
    )
    assert "rsfMRI volumes were reoriented to RAS, cut into windows of 4 frames" in text
    assert f"Training took {STEP} steps ({STEP} epochs) of 6 conversations with AdamW (learning rate 0.01," in text
    assert "asked without the evidence (blank). Baselines are cnn, probe;" in text
    cited = [line.split(": ")[0] for line in re.findall("<li>(.*?)</li>", text)]
    assert cited == ["Software", "LLaVA", "AdamW", "Bootstrap", "Holm&#39;s method"]
    (commands,) = re.findall('<pre class="to-copy" tabindex="0">(.*?)</pre>', page.text, re.DOTALL)
    words = html.unescape(commands).split("again")[-1].replace("\\\n", " ").split()
    assert words == ["umbrella-jax", "report", str(run), "--baseline", str(baselines), "--samples", "30"]


def test_charts_have_the_numbers() -> None:
    """Calibration and coverage are on axes from 0 to 1; an absurd answer and one without a number keep their places."""
    chart = figures.calibration_chart([facts.Bin(40, 1.0, 1.0), facts.Bin(10, 0.5, 0.25)])
    frame = chart.frame
    assert (chart.points[0].x, chart.points[0].y) == (frame.right, frame.top)
    assert [point.label for point in chart.points] == ["40", "10"]
    area = [(point.radius - 3) ** 2 for point in chart.points]
    assert area[0] == pytest.approx(4 * area[1])
    coverage = Figure(0.5, 0.3, 0.6, 12, 12, None)
    (level,) = figures.coverage_chart(
        [CalibratedLevel(80, 0.82, coverage, Figure(9.0, None, None, 12, 12, None))]
    ).points
    assert level.x == pytest.approx(frame.left + 0.82 * (frame.right - frame.left))
    assert level.low - level.high == pytest.approx(0.3 * (frame.bottom - frame.top))
    chart = figures.number_chart([(20.0, 30.0), (60.0, 55.0), (20.0, None), (40.0, 1e12)], "years")
    assert [point.shape for point in chart.points] == ["dot", "dot", "cross", "edge"]
    assert chart.x_name == "true (years)"
    assert "1 answer beyond the axis" in chart.text
    assert "without a number" in chart.text
    assert chart.points[0].y - chart.points[1].y > 50, "the absurd answer leaves room for the others"


def test_groups_and_corrected_errors_are_those_of_score(run: Path, rows: Rows, tmp_path: Path) -> None:
    people = [
        r | {"metadata": r["metadata"] | {"sex": "F<" if i // 3 % 2 else "M", "age": i}} for i, r in enumerate(rows)
    ]
    file = write_rows(tmp_path / "rows.jsonl", people)
    flags = ["--by", "sex", "--adjust", "age"]
    umbrella("report", run, "--predictions", file, "--samples", 0, "--out", tmp_path / "page.html", *flags)
    page = Page(tmp_path / "page.html")
    scores = json.loads(umbrella("score", file, "--json", "--config", run / "config.yaml", *flags))
    assert page.numbers["by"] == scores["by"]
    assert page.numbers["adjust"] == scores["adjust"]
    right = np.mean([r["prediction"] == r["reference"] for r in by_task(people, "side") if r["metadata"]["sex"] == "M"])
    assert page.cells["by sex", "side accuracy", "M"][0] == pytest.approx(right)
    gap = scores["by"]["columns"]["sex"]["tasks"]["side"]["accuracy"]["gap"]
    assert page.cells["by sex", "side accuracy", "gap"][0] == pytest.approx(gap["value"])
    assert '<td class="group">F&lt;</td>' in page.text
    mae = scores["adjust"]["tasks"]["age"]["figures"]["mae"]["corrected"]["value"]
    assert page.cells["errors of age", "mae", "corrected"][0] == pytest.approx(mae)
    assert "do not measure accuracy" in page.text
    assert "--by: height: no answer has it" in refused(run, "--by", "height", "--out", tmp_path / "other.html")


def test_reports_are_side_by_side_with_their_differences(run: Path, rows: Rows, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    settings = small_run.read_config(copied / "config.yaml")
    settings["evaluation"]["tasks"] = {"side": {"kind": "report"}}
    small_run.write_config(copied / "config.yaml", settings)
    reference, answer = "Left frontal infarct & no mass.", "Right frontal infarct\nwithout a mass <1 cm."
    reports = [row | {"reference": reference, "prediction": answer} for row in by_task(rows, "side")]
    file = write_rows(tmp_path / "reports.jsonl", reports)
    umbrella("report", copied, "--predictions", file, "--samples", 1, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    (card,) = re.findall(r'<div class="reports">(.*?)</div>', text, re.DOTALL)
    marks = re.findall(r'<mark(?: class="(\w+)")? title="(.*?)">(.*?)</mark>', card)
    assert marks == [
        ("differs", "frontal lobe left: present", "Left"),
        ("", "frontal lobe: present", "frontal"),
        ("", "infarct: present", "infarct"),
        ("", "tumour: absent", "mass"),
        ("differs", "frontal lobe right: present", "Right"),
        ("", "frontal lobe: present", "frontal"),
        ("", "infarct: present", "infarct"),
        ("", "tumour: absent", "mass"),
    ]
    shown = f"expected: {reference} answered: {answer}".replace("&", "&amp;").replace("<", "&lt;")
    assert re.sub("<.*?>", "", card).split() == shown.split()
    assert "40% of statements differ" in text  # two of five


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def refused(*words: object) -> str:
    message = umbrella("report", *words, code=2)
    assert not list(Path(str(words[0])).glob("*.html")) or (Path(str(words[0])) / "report.html").exists()
    return message


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "no run; expected the --out of umbrella-jax train" in refused(tmp_path)
    assert refused(tmp_path / "none").startswith(f"umbrella-jax: {tmp_path / 'none'}: not found; expected the --out of")
    (tmp_path / "file").touch()
    assert "file: a file, not a directory; expected the --out of" in refused(tmp_path / "file")


def test_every_fault_is_reported_together(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    shutil.rmtree(copy / "predictions")
    (copy / "report.html").unlink(missing_ok=True)
    (tmp_path / "none").mkdir()
    message = refused(copy, "--baseline", tmp_path / "none")
    assert "the run has no checkpoint yet; train it first" in message
    assert "no predictions; train with data.eval (--eval-data PATH)" in message
    assert "no .jsonl in it; expected the --out of umbrella-jax baseline" in message
    assert not (copy / "report.html").exists()


def test_steps_that_are_not_there_are_refused(copy: Path) -> None:
    assert "--step 7: " in refused(copy, "--step", 7)
    assert "expected latest or one of 2, 3" in refused(copy, "--step", 7)
    message = refused(copy, "--step", 2, "--explain", "gradient")
    assert "step 2 answered, but its checkpoint is gone; expected --step 3" in message


def test_answers_to_other_conversations_are_refused(copy: Path, rows: Rows, baselines: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [*rows[:-1], rows[-1] | {"task_id": "S99_age"}])
    assert "answers to other conversations than those of data.eval" in refused(copy, "--predictions", other)
    write_rows(tmp_path / "other" / "cnn.jsonl", rows[1:])
    message = refused(copy, "--baseline", tmp_path / "other")
    assert "other: cnn: task side: other conversations than the run's: S00_side" in message
    odd = [row | {"metadata": row["metadata"] | {"task": "handedness"}} for row in rows]
    write_rows(tmp_path / "other" / "cnn.jsonl", odd)
    assert "task handedness: not one of the run's, age, pair, side" in refused(copy, "--baseline", tmp_path / "other")


def test_data_that_changed_are_refused(copy: Path, made: tuple[World, Path], tmp_path: Path) -> None:
    world, _ = made
    evaluated, scan = world.eval.read_bytes(), (world.root / "scans" / "1.nii.gz").read_bytes()
    try:
        small_run.write_volume(world.root / "scans" / "1.nii.gz", small_run.VOLUME_SHAPES["T1"], seed=77)
        message = refused(copy)
        assert "scans/1.nii.gz: other content than the run read; bring it back, or --samples 0" in message
        world.eval.write_bytes(evaluated + b" ")
        message = refused(copy)
        assert f"data.eval: {world.eval}: other content than the run read" in message
        umbrella("report", copy, "--samples", 0)
        assert "not counted: data.eval" in (copy / "report.html").read_text()
    finally:
        world.eval.write_bytes(evaluated)
        (world.root / "scans" / "1.nii.gz").write_bytes(scan)


def test_no_page_without_its_packages(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umbrella_jax.report.page.read_facts", lambda *_, **__: pytest.fail("work was begun"))
    assert "expected the name of a file" in refused(copy, "--out", copy / "none" / "page.html")
    assert "--explain: no conversations" in refused(copy, "--samples", 0, "--explain", "gradient")
    monkeypatch.setattr(html_page, "_installed", lambda module: module != "PIL")
    assert "pillow not installed; pip install 'umbrella-jax[report]'" in refused(copy)
