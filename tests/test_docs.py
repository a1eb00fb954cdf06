"""README and docs stay true: every block is executed or looked at, every name that they name is there.

What their commands read stands in `tests/helpers/docs_world.py`, with the few that are not run, and why.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.config.test_configs import write_hub_config
from tests.helpers import docs_world
from tests.helpers.checkpoints import under_transformers_4_46
from tests.helpers.docs_world import GIVEN, README, ROOT, blocks, commands, execute, pages, pattern
from tests.helpers.small_run import umbrella
from tests.test_imports import FLOOR_OF
from umbrella_jax.cli import make_parser
from umbrella_jax.cli.options import walk
from umbrella_jax.config.schema import RunConfig

OTHERS = [page for page in pages() if page != README]


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of README was executed: what it makes, other pages read."""
    folder = tmp_path_factory.mktemp("readme")
    execute(README, folder, None)
    return folder


def test_readme(readme: Path) -> None:
    assert (readme / "runs" / "sex" / "checkpoints").is_dir()


@pytest.mark.parametrize("page", OTHERS)
def test_page(page: str, readme: Path, tmp_path: Path) -> None:
    execute(page, tmp_path, readme)


# The tables of docs_world hold nothing that is not needed.


def all_commands() -> list[tuple[str, str]]:
    """(page, words) of each command of each bash block."""
    return [
        (page, re.sub(r"^(?:[A-Z_]+=\S* )*", "", " ".join(words)))
        for page in pages()
        for block in blocks(page)
        if block.kind == "bash"
        for words in commands(block.text)
    ]


@pytest.mark.parametrize("table", ["NOT_RUN", "PARSED", "CHEAPER", "EXIT_CODES", "PROGRAMS"])
def test_no_dead_entry(table: str) -> None:
    keys = getattr(docs_world, table)
    used = {docs_world.beginning(keys, words.split(" ")) for _, words in all_commands()}
    assert set(keys) - used == set()


def test_no_dead_name() -> None:
    text = {page: "\n".join(block.text for block in blocks(page)) for page in pages()}
    assert [name for name in docs_world.WORLD if not any(name in each for each in text.values())] == []
    read = [(page, name) for page, names in GIVEN.items() for name in names]
    assert [
        (page, name) for page, name in read if not re.search(rf"\b{name}\b|\b{Path(name).parent}\b(?!/)", text[page])
    ] == []
    begun = {page: [block.first for block in blocks(page) if block.kind == "picture"] for page in pages()}
    listed = [(page, first) for page, firsts in docs_world.PICTURES.items() for first in firsts]
    assert [(p, first) for p, first in listed if not any(line.startswith(first) for line in begun.get(p, []))] == []


def test_blocks_are_fenced() -> None:
    """One that is indented instead nothing would execute."""
    assert [page for page in pages() if re.search(r"\n\n {4,}\S", prose(page))] == []


def test_executing_a_wrong_block_fails(tmp_path: Path) -> None:
    page = docs_world.Page("page", tmp_path)

    def run(kind: str, text: str) -> None:
        page.run(docs_world.Block("page", 1, kind, text))

    for kind, text in [
        ("", "what is this"),
        ("bash", "rm -rf everything"),
        ("bash", "umbrella-jax config from-original nowhere.yaml"),
        ("bash", "pip install '.[cuda99]'"),
        ("python", "assert False"),
        ("pycon", ">>> 1 + 1\n3"),
        ("pycon", "1 + 1"),
        ("json", '{"what": 1}'),
        ("output", "said"),
        ("tree", "umbrella_jax/\n  nothing.py  gone"),
        ("picture", "─► unlisted"),
    ]:
        with pytest.raises(AssertionError):
            run(kind, text)
    for expected, printed, same in [
        ("accuracy  0.5", "accuracy 71.25", True),
        ("accuracy 0.5", "f1 0.5", False),
        ("a\n…\nz 1", "a\nb\nc\nz 2", True),
        ("a\n…\nz", "a\nb", False),
        ("1,000 steps, 2", "12 steps, 31,000", True),
    ]:
        assert bool(pattern(expected).fullmatch(printed)) == same, (expected, printed)


# What is generated, computed or copied.


@pytest.mark.parametrize(("name", "page"), [("run", "configuration.md"), ("study", "study_keys.md")])
def test_pages_of_keys_are_generated(name: str, page: str) -> None:
    script = [sys.executable, ROOT / "scripts" / "make_config_reference.py", name]
    made = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / page).read_text() == made


def test_the_site_lists_every_page() -> None:
    listed = re.findall(r"\w+\.md", (ROOT / "docs" / "site" / "mkdocs.yml").read_text())
    assert {Path(page).name for page in pages() if page.startswith("docs/")} - set(listed) == set()


def table_after(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, its header first."""
    text = (ROOT / page).read_text()
    below = text[text.index(f"\n{heading}\n") :]
    found = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert found
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in found[0].splitlines()]
    return [rows[0], *rows[2:]]


def test_measured_figures_come_with_their_command() -> None:
    """README copies figures of the docs; each row says of which page."""
    _, *rows = table_after(README, "## Measured")
    assert len(rows) >= 6
    for row in rows:
        (page,) = re.findall(r"\]\((docs/\w+\.md)\)", row[-1])
        there = " ".join((ROOT / page).read_text().replace("*", "").split())
        assert re.search(r"`.+?`", row[-1]), row
        for figure in re.findall(r"\d[\d.,]*(?:e-?\d+)?(?: to \d[\d.]*)?", " ".join(row[1:-1])):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", there), (
                f"{figure} of {row[0]!r} is not in {page}"
            )


def test_plan_for_uk_biobank(tmp_path: Path) -> None:
    """The table is what `umbrella-jax plan` says, for models of the published sizes."""
    header, *rows = table_after(README, "## A cohort of 40,000")
    devices = {"v5e-16": "v5e-16", "v5p-64": "v5p-64", "8 × H100": "h100x8"}
    assert header[1:] == list(devices)
    assert [row[0].split(":")[0] for row in rows] == ["0.5b", "7b"]
    for (size, *cells), name in zip(rows, ("t1_0.5b", "t1_7b"), strict=True):
        base = write_hub_config(tmp_path / name, name.removeprefix("t1_"))
        for cell, device in zip(cells, devices.values(), strict=True):
            words = ["plan", "--config", ROOT / "configs" / f"{name}.yaml", "--base", base, "--devices", device]
            plan = json.loads(umbrella(*words, "--subjects", "40000", "--set", "model.remat=none", "--json"))
            best = plan["largest"][0]
            hours = best["hours_per_epoch"]
            epoch = f"{hours * 3600:.0f} s" if hours * 3600 < 100 else f"{hours * 60:.1f} min"
            assert cell == f"{best['samples_per_second']:.0f}; {epoch}", (size, device)
    assert table_after("docs/performance.md", "## Machines that are not at hand") == [header, *rows]


def test_citation() -> None:
    from tests.helpers.small_run import read_config

    cited, project = read_config(ROOT / "CITATION.cff"), docs_world.project()
    assert (cited["title"], cited["version"], cited["license"]) == (
        project["name"],
        project["version"],
        project["license"],
    )
    assert [author["name"] for author in cited["authors"]] == ["umbrella-jax contributors"]
    assert cited["cff-version"] == "1.2.0"
    assert cited["message"]


@pytest.mark.slow
def test_pytorch_page_under_transformers_4(readme: Path, tmp_path: Path) -> None:
    """The page is executed under the installed transformers by test_page; here its Python once more, under 4.46."""
    page = "docs/pytorch.md"
    docs_world.prepare(page, tmp_path, readme)
    code = "\n".join(block.text for block in blocks(page) if block.kind == "python")
    program = (
        f"import os, transformers\nassert transformers.__version__ == '4.46.3'\nos.chdir({str(tmp_path)!r})\n{code}"
    )
    under_transformers_4_46("-c", program)


@pytest.mark.slow
def test_site(tmp_path: Path) -> None:
    """The site builds without a warning, so no link or anchor is dead, and it has a page per module."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    program = ["bash", ROOT / "scripts" / "docs.sh", "build", "--site-dir", tmp_path]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    built = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert 'href="architecture.html#the-demo"' in (tmp_path / "index.html").read_text()  # a link within README
    reference = (tmp_path / "reference" / "umbrella_jax.data.epoch_plan.html").read_text()
    assert 'id="umbrella_jax.data.epoch_plan.EpochPlan"' in reference


# Names.

LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])+\]\(([^()\s]+)\)")


def prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    kept = ("".join(c for c in t.lower() if c in " -_" or unicodedata.category(c)[0] in "LN") for t in titles)
    return {title.replace(" ", "-") for title in kept}


@pytest.mark.parametrize("page", [*pages(), "CHANGELOG.md"])
def test_links(page: str) -> None:
    dead = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        there = file.exists() and file.is_relative_to(ROOT)
        if not there or (anchor and anchor not in anchors(str(file.relative_to(ROOT)))):
            dead.append(target)
    assert dead == []


def test_every_page_is_reached_from_readme() -> None:
    seen, new = set[str](), {README}
    while new:
        page = new.pop()
        seen.add(page)
        for target in LINK.findall(prose(page)):
            file = ((ROOT / page).parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" and file.is_relative_to(ROOT):
                new |= {str(file.relative_to(ROOT))} - seen
    assert set(pages()) - seen == set()


def test_flags_in_the_text() -> None:
    known = {option for parser in walk(make_parser()) for action in parser._actions for option in action.option_strings}
    scripts = "".join(
        file.read_text() for file in (ROOT / "scripts").rglob("*") if file.suffix in (".sh", ".sbatch", ".py")
    )
    known |= set(re.findall(r"--[a-z][\w-]+", scripts))
    flags_of_pages = {
        (page, flag)
        for page in pages()
        for code in re.findall(r"`([^`]+)`", prose(page))
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
    }
    assert {(page, flag) for page, flag in flags_of_pages if flag not in known} == set()


def test_commands_in_the_text() -> None:
    names = {parser.prog for parser in walk(make_parser())}
    for page in pages():
        for code in re.findall(r"`umbrella-jax ([^`]+)`", prose(page)):
            words = re.split(r"\s+", code)
            assert f"umbrella-jax {words[0]}" in names or f"umbrella-jax {' '.join(words[:2])}" in names, (page, code)
        for script, work in re.findall(r"`python scripts/(\w+\.py)(?: ([a-z]+))?", prose(page)):
            assert re.search(rf"\b{work}\b", (ROOT / "scripts" / script).read_text()), (page, script, work)


def keys(cls: Any = RunConfig, key: str = "") -> Iterator[str]:
    """Patterns of all dotted keys of a config, sections too."""
    import typing

    hints = typing.get_type_hints(cls)
    for name in (field.name for field in dataclasses.fields(cls)):
        kind, path = hints[name], rf"{key}\.{name}" if key else name
        yield path
        of = typing.get_args(kind)
        if section := next((one for one in (kind, *of[:1]) if dataclasses.is_dataclass(one)), None):  # or one | None
            yield from keys(section, path)
        elif of and dataclasses.is_dataclass(of[-1]):
            yield rf"{path}\.\w+"
            yield from keys(of[-1], rf"{path}\.\w+")


def test_keys_in_the_text() -> None:
    known = re.compile("|".join(keys()))
    for page in pages():
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            for key in re.findall(r"(?<![\w./-])(?:model|data|train|evaluation|mesh)\.\w[\w.]*", code):
                if not key.endswith((".py", ".json", ".jsonl", ".md", ".safetensors")):
                    assert known.fullmatch(key), (page, key)


FILES = re.compile(r"(?<![\w/.-])(?:tests|docs|scripts|configs|convert|umbrella_jax)/[\w./*-]*[\w*/]")


def test_files_and_tests_in_the_text() -> None:
    """Paths are there; `test_x.py` is somewhere in tests/, and `::test_y` in the file that was named last."""
    tests = {file.name: file for file in (ROOT / "tests").rglob("test_*.py")}
    for page in pages():
        last: Path | None = None
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            for path in FILES.findall(code):
                assert any(ROOT.glob(path.rstrip("/"))), (page, path)
            for file, name in re.findall(r"(test_\w+\.py)?(?:::(test_\w+))?", code):
                if file:
                    assert file in tests, (page, file)
                    last = tests[file]
                if name:
                    assert last, (page, name)
                    assert f"def {name}(" in last.read_text(), (page, last.name, name)


def test_every_room_is_in_the_tree() -> None:
    (tree,) = (block for block in blocks("docs/architecture.md") if block.kind == "tree")
    names = set(tree.text.split())
    for room in (ROOT / "umbrella_jax").iterdir():
        if room.suffix == ".py" and room.stem != "__init__":
            assert room.name in names
        if (room / "__init__.py").exists():
            assert f"{room.name}/" in names
    floors = [
        FLOOR_OF[room] for room in re.findall(r"^  (\w+)(?:/|\.py) ", tree.text, re.MULTILINE) if room in FLOOR_OF
    ]
    assert floors == sorted(floors, reverse=True), "the package's rooms, from the top floor down"


def test_files_that_an_addition_touches() -> None:
    """docs/architecture.md lists what to touch for a thing of a kind: the files that name one that is there already."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for heading, there in {
        "### A modality under several names": r"\bALIASES\b|\nMODALITIES = .*anat",
        "### A group that trains": r"\bCOMPONENTS\b",
        "### A metric": r"\b(balanced_accuracy|vote_accuracy|WITH_UNIT)\b",
        "### A kind of task": r"\"regression\"",
        "### A table format": r"parquet",
        "### A language model": (
            r"Qwen|\"qwen2\"|language_model\.|\"language_model\"|LANGUAGE_MODEL|\.embed_tokens"
            r"|text_config|\b(config|model)\.text\b"
        ),
    }.items():
        section = text[text.index(f"\n{heading}\n") + 1 :].split("\n### ")[0].split("\n## ")[0]
        listed = set(re.findall(r"\(\.\./((?:umbrella_jax|convert)/[\w./]+\.py)\)", section))
        sources = [*(ROOT / "umbrella_jax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
        naming = {
            str(f.relative_to(ROOT)) for f in sources if re.search(there, f.read_text()) and "demo" not in f.parts
        }
        assert listed == naming, heading
        for item in re.split(r"\n+(?=- )|\n\n", section):
            files = re.findall(r"\(\.\./([\w./]+\.py)\)", item)
            for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", item) if files else ():
                for file in files:
                    assert re.search(rf"\b{name.split('.')[-1]}\b", (ROOT / file).read_text()), (name, file)
