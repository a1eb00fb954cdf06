"""Commands for data: `data build`, `from-bids`, `from-table`, `validate`, `cache`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umbrella_jax.cli.options import (
    DATA_FLAGS,
    add_command,
    add_config,
    add_group,
    add_json,
    add_overlap,
    config_of,
    number,
)
from umbrella_jax.config.schema import MAX_CLASSES
from umbrella_jax.data.bids.templates import TEMPLATES
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.errors import ConfigError
from umbrella_jax.io.files import strict_json


def add(commands: Any) -> None:
    """Add the commands."""
    data = add_group(
        commands,
        "data",
        "Make and check conversation files, preprocess volumes.",
        "umbrella-jax data build study.yaml conversations",
    )
    build = add_command(
        data,
        "build",
        _build,
        "Turn a study file's tables and scans into conversations.",
        "umbrella-jax data build study.yaml conversations",
    )
    build.add_argument("study", metavar="STUDY", help="YAML file: subjects, scans, conditions, tasks, split")
    build.add_argument("out", metavar="OUT", help="directory for conversations, record and page")
    bids = add_command(
        data,
        "from-bids",
        _from_bids,
        "Turn a BIDS data set into conversations, split by subject.",
        "umbrella-jax data from-bids ds000001 conversations --target sex",
    )
    bids.add_argument("root", metavar="DIR", help="BIDS data set with participants.tsv")
    bids.add_argument("out", metavar="OUT", help="directory for the conversation files")
    bids.add_argument("--target", required=True, metavar="COLUMN", help="column of participants.tsv: sex, age, ...")
    bids.add_argument(
        "--kind",
        choices=list(TEMPLATES),
        metavar="KIND",
        help=f"{', '.join(TEMPLATES)}; default regression for more than "
        f"{MAX_CLASSES} distinct numbers, else classification",
    )
    bids.add_argument(
        "--modality",
        metavar="NAME",
        help="sMRI or T1: anat/*_T1w (default); fMRI or rsfMRI: func/*_task-rest*_bold",
    )
    bids.add_argument(
        "--entity",
        dest="entities",
        action="append",
        metavar="KEY=VALUE",
        help="use only files with this entity, such as echo=1, or without it (space=none); repeatable",
    )
    bids.add_argument(
        "--missing", action="append", metavar="VALUE", help="value that means missing, such as -999; repeatable"
    )
    bids.add_argument("--derivatives", metavar="NAME", help="use the scans in DIR/derivatives/NAME")
    bids.add_argument("--template", metavar="FILE", help="YAML or JSON of questions and answers (docs/bids.md)")
    bids.add_argument("--split", metavar="SHARES", help="shares of subjects; default train=0.8,eval=0.2")
    bids.add_argument("--split-from", metavar="DIR", help="use the split of DIR, an earlier OUT")
    bids.add_argument("--seed", type=int, metavar="N", help="random seed for splits and pairs; default 1234")
    bids.add_argument("--pairs-per-subject", type=int, metavar="N", help="references per compared scan; default 4")

    table = add_command(
        data,
        "from-table",
        _from_table,
        "Turn a table and scans into conversations.",
        "umbrella-jax data from-table t.csv out --target sex --scans '{subject}.nii'",
    )
    table.add_argument("table", metavar="TABLE", help=".tsv, .csv, .xlsx, .xls or .parquet, a row per subject")
    table.add_argument("out", metavar="OUT", help="directory for the conversation files")
    table.add_argument("--target", required=True, metavar="COLUMN", help="column with the right answers")
    table.add_argument("--scans", required=True, metavar="PATTERN", help="paths of the scans, with {KEY} for the id")
    table.add_argument("--key", metavar="COLUMN", help="column with the subject's id; default participant_id")
    table.add_argument("--root", metavar="DIR", help="where paths of scans start; default the folder of the table")
    table.add_argument("--modality", metavar="NAME", help="of the scans; default sMRI")
    table.add_argument("--kind", choices=list(TEMPLATES), metavar="KIND", help="as for from-bids")
    table.add_argument("--missing", action="append", metavar="VALUE", help="value that means missing; repeatable")
    table.add_argument("--width", type=number, metavar="N", help="digits of ids that lost their leading zeros")
    table.add_argument("--stratify", action="append", metavar="COLUMN", help="balance the split by it; repeatable")
    table.add_argument("--seed", type=int, metavar="N", help="random seed for split and references; default 1234")

    check = add_command(
        data,
        "validate",
        _validate,
        "Check conversations and volumes; report every problem.",
        "umbrella-jax data validate --config run.yaml --train-data train.json",
    )
    add_config(check, ["--base", *DATA_FLAGS])
    check.add_argument("--html", metavar="FILE", help="write a new page with slices of volumes (extra `report`)")
    check.add_argument("--samples", type=number, metavar="N", help="volumes on the page; default 24")
    add_overlap(check)
    add_json(check)

    cache = add_command(
        data,
        "cache",
        _cache,
        "Preprocess all volumes before the runs that use them.",
        "umbrella-jax data cache --config run.yaml --train-data train.json --cache mri",
    )
    add_config(cache, [*DATA_FLAGS, "--cache"])
    cache.add_argument("--verify", action="store_true", help="also check cached volumes; replace damaged ones")
    cache.add_argument("--shard", metavar="I/N", help="make the Ith of N parts, I from 1, such as in a job array")


def _build(arguments: argparse.Namespace) -> None:
    from umbrella_jax.study.build import build_study

    print("\n".join(build_study(arguments.study, arguments.out)))


def _from_bids(arguments: argparse.Namespace) -> None:
    from umbrella_jax.study.from_bids import from_bids

    options = {key: value for key, value in vars(arguments).items() if key != "call" and value is not None}
    print("\n".join(from_bids(**options)))


def _from_table(arguments: argparse.Namespace) -> None:
    from umbrella_jax.study.from_table import from_table

    options = {key: value for key, value in vars(arguments).items() if key != "call" and value is not None}
    print("\n".join(from_table(**options)))


def _validate(arguments: argparse.Namespace) -> int:
    from umbrella_jax.checkpoints.load import local_tokenizer
    from umbrella_jax.data.validation.checks import validate
    from umbrella_jax.data.validation.page import check_page, write_page
    from umbrella_jax.html.page import PRIVACY
    from umbrella_jax.inference.answers import check_lengths
    from umbrella_jax.scoring.rows import blank_rows
    from umbrella_jax.scoring.tasks import tasks_of

    config, page = config_of(arguments), arguments.html and Path(arguments.html)
    if page:
        check_page(page)
    elif arguments.samples is not None:
        raise ConfigError("--samples: sets the number of volumes on the page; add --html FILE")
    loaded: list[Any] = []

    def tokenizer() -> Any:
        loaded.append(local_tokenizer(config))
        return loaded[-1]

    def scored(conversations: Sequence[Conversation]) -> None:
        rows = blank_rows(conversations)
        tasks = tasks_of(rows, config.evaluation.tasks)
        for words in filter(None, loaded):
            limit = (config.data.template, config.train.max_new_tokens, "train.max_new_tokens")
            check_lengths(conversations, rows, tasks, words, *limit)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report = validate(config, tokenizer, scored, say)
    if page:
        sample = 24 if arguments.samples is None else arguments.samples
        data = config.data
        options: dict[str, Any] = {"threads": data.threads, "augment": data.augment, "say": say}
        write_page(report, config.model.modalities, page, sample=sample, **options)
        print(f"{page}:\n  {PRIVACY}", file=sys.stderr)
    print(strict_json(report.to_json(), indent=1) if arguments.json else "\n".join(report.lines()))
    return 0 if report.ok else 1


def _cache(arguments: argparse.Namespace) -> None:
    from umbrella_jax.data.cache import fill_cache

    print("\n".join(fill_cache(config_of(arguments), verify=arguments.verify, shard=arguments.shard)))
