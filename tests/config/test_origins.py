"""Where a value came from, in the faults that are found after parsing."""

import pytest

from umbrella_jax.config.origins import Origins

ORIGINS = Origins(
    "run.yaml",
    flags={"data.eval": "--eval-data", "mesh": "--mesh", "train.groups.lora": "--set"},
    given=["data.train", "train.groups.patch_embed", "train.early_stopping.metric"],
)
ORIGINAL = Origins("umbrella.yaml", flags={"data.eval": "--eval-data"}, keys={"train.epochs": "trainer.max_epochs"})


@pytest.mark.parametrize(
    ("origins", "fault", "named"),
    [
        (ORIGINS, "data.train, data.eval: 3 scans", "run.yaml, --eval-data: data.train, data.eval: 3 scans"),
        (ORIGINS, "mesh.fsdp: 2", "--mesh: mesh.fsdp: 2"),
        (ORIGINS, "train.groups: none", "run.yaml, --set: train.groups: none"),
        (ORIGINS, "train.early_stopping.metric: x", "run.yaml: train.early_stopping.metric: x"),
        (ORIGINS, "process 1: data.eval: x", "process 1: --eval-data: data.eval: x"),
        (ORIGINS, "a: b: cannot resume: data.eval: x", "a: b: cannot resume: --eval-data: data.eval: x"),
        (ORIGINAL, "train.epochs: x", "umbrella.yaml: trainer.max_epochs: train.epochs: x"),
        (ORIGINAL, "data.eval: x", "--eval-data: data.eval: x"),
    ],
)
def test_a_fault_starts_with_what_was_typed(origins: Origins, fault: str, named: str) -> None:
    assert origins.name_in(fault) == named
    assert origins.name_in(named) == named


@pytest.mark.parametrize("fault", ["model.base: expected a path", "a.json: data.eval: x", "data.evaluate: x", "seed"])
def test_other_faults_stay(fault: str) -> None:
    assert ORIGINS.name_in(fault) == fault
