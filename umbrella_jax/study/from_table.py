"""Turn a table and a folder of scans into conversations about one column: write a study of them, and build it."""

import re
from collections.abc import Sequence
from pathlib import Path

from umbrella_jax.config.schema import TaskKind
from umbrella_jax.data.labels import infer_kind
from umbrella_jax.errors import Faults
from umbrella_jax.io.files import check_new_folder, relative_path
from umbrella_jax.study.build import build_config
from umbrella_jax.study.cohort import read_cohort
from umbrella_jax.study.schema import (
    DEFAULT_SEED,
    ScansConfig,
    SplitConfig,
    StudyConfig,
    TableConfig,
    TaskStudyConfig,
    dump_study,
)


def from_table(
    table: str | Path,
    out: str | Path,
    target: str,
    scans: str,
    *,
    key: str = "participant_id",
    root: str | Path | None = None,
    modality: str = "sMRI",
    kind: TaskKind | None = None,
    missing: Sequence[str] = (),
    width: int | None = None,
    stratify: Sequence[str] = (),
    seed: int = DEFAULT_SEED,
) -> list[str]:
    """Write conversations about `target`, in train (0.8 of the subjects) and eval, as `build_study` does.

    `out`/study.yaml is the study. Edit it for anything else: more tasks, visits, conditions, folds.

    Args:
        table: .tsv, .csv, .xlsx, .xls or .parquet with one row per subject.
        out: an empty or new directory.
        target: column with the right answers.
        scans: pattern of the scans' paths below `root`, with {KEY} or {subject}, such as `{eid}/T1/{eid}.nii.gz`.
        key: column with the subject's id.
        root: where image paths start; default the folder of the table.
        modality: of the scans.
        kind: classification, regression or comparison. Default: regression if all values are numbers and more than
            MAX_CLASSES are distinct; else classification.
        missing: values that mean a missing one, besides those of `is_missing`. If given, no other value is doubted.
        width: digits of ids that lost their leading zeros.
        stratify: columns whose combinations both splits get their share of.
        seed: for the split and the references.

    Returns:
        Lines about what was written, what was left out and why.

    Raises:
        ConfigError, DataError: every fault of the arguments, the table and the scans.
    """
    table, out = Path(table), Path(out)
    check_new_folder(out)
    root = table.parent if root is None else Path(root)

    def study(kind: TaskKind) -> StudyConfig:
        return StudyConfig(
            root=relative_path(root, out),
            subjects=(TableConfig(file=relative_path(table, root), key=key, width=width),),
            scans={modality: ScansConfig(pattern=scans)},
            missing={target: tuple(missing)} if missing else {},
            tasks={re.sub(r"\W", "_", target): TaskStudyConfig(kind=kind, column=target)},
            split=SplitConfig(stratify=tuple(stratify), seed=seed),
        )

    if kind is None:
        faults = Faults()
        labels = study("classification")
        visits = read_cohort(labels, labels, root, faults, []).visits
        kind = infer_kind([visit.values[target] for visit in visits if target in visit.values])
    config = study(kind)
    return build_config(config, dump_study(config), root, out, str(table))
