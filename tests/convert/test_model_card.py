"""The model card states what the records of a run hold, and no number by which a participant could be recognised."""

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from convert.config_json import read_config
from convert.model_card import TaskMetric, TrainingRecord, model_card, training_facts
from tests.helpers.checkpoints import MODALITIES, write_umbrella

ACCURACY = TaskMetric("sex", "accuracy", 0.875, 0.8, 0.95, 0.6, 100, 100)
RECORD = TrainingRecord(
    step="step 20 (best eval_loss, 0.5)",
    settings={"train.learning_rate": 5e-5, "seed": 7},
    versions={"jax": "0.10"},
    parameters={"patch_embed": (100, 0), "total": (100, 5000)},
    counts=None,
    metrics=(ACCURACY,),
    resamples=1000,
)


def counts(female: int, male: int) -> dict[str, Any]:
    total = female + male
    task = {"kind": "classification", "conversations": total, "subjects": total}
    return {
        "conversations": total,
        "subjects": total,
        "volumes": {"T1": total},
        "tasks": {"sex": task | {"answers": {"female": female, "male": male}}},
    }


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that writes the card of a small model."""
    folder = tmp_path_factory.mktemp("card")
    write_umbrella(folder)
    config = read_config(folder)

    def write(*records: TrainingRecord, **options: Any) -> str:
        return model_card(config, MODALITIES, "sex-t1", records=records, titles=("SigLIP", "Qwen2"), **options)

    return write


def test_front_matter_is_what_the_hub_reads(card: Any) -> None:
    text = card(RECORD, base="llava-hf/base@v1", license={"license": "other", "license_name": "qwen"})
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.base_model) == ("other", "qwen", "llava-hf/base")
    # the hub would offer to ask the model about images
    assert (data.library_name, data.get("pipeline_tag"), data.get("datasets")) == ("umbrella-jax", None, None)
    with_code = ModelCard(card(form="code"))
    assert (with_code.data.library_name, with_code.data.get("pipeline_tag")) == ("transformers", None)
    assert 'AutoProcessor.from_pretrained("sex-t1", trust_remote_code=True)' in with_code.text
    (result,) = data.eval_results
    assert (data.model_name, result.metric_type, result.metric_value) == ("sex-t1", "accuracy", 0.875)
    age = replace(ACCURACY, task="age", metric="mae", value=4.5)
    each = yaml.safe_load(card(replace(RECORD, metrics=(ACCURACY, age))).split("---")[1])["model-index"][0]["results"]
    assert [(own["dataset"]["name"], [m["value"] for m in own["metrics"]]) for own in each] == [
        ("sex, data of the run", [0.875]),
        ("age, data of the run", [4.5]),
    ]
    plain = ModelCard(card(base="a folder")).data
    assert (plain.get("eval_results"), plain.get("base_model"), plain.get("license")) == (None, None, None)


def test_an_adapter_says_what_it_needs(card: Any) -> None:
    text = card(base="my-lab/base", adapter="start", base_fingerprint="abc", form="adapter")
    assert (ModelCard(text).data.library_name, ModelCard(text).data.base_model) == ("peft", "my-lab/base")
    assert 'load_umbrella(BASE, adapter="sex-t1")' in text
    assert "Trained on top of `my-lab/base` with the adapter `start`." in text
    assert "umbrella_config.json" not in text


def test_states_data_settings_and_metrics_of_the_run(card: Any) -> None:
    text = card(replace(RECORD, counts={"train": counts(200, 220), "eval": counts(60, 40)}))
    for line in (
        "| training | sex (classification) | 420 | 420 | female: 200, male: 220 |",
        "| sex | accuracy | 0.875 | 0.800 to 0.950 | 0.600 | 100 | 100 |",
        "Exported: step 20 (best eval_loss, 0.5). jax 0.10.",
        "| `train.learning_rate` | 5e-05 |",
        "| patch_embed | 100 | 0 |",
    ):
        assert line in text.splitlines(), line
    assert "**Not a medical device.**" in text


def test_numbers_under_ten_can_be_neither_read_nor_computed(card: Any) -> None:
    text = card(replace(RECORD, counts={"train": counts(200, 220), "eval": counts(97, 3)}))
    assert "| evaluation | sex (classification) | about 100 | about 100 | female: about 100, 1 not named |" in text
    assert "| sex | accuracy | 0.875 | 0.800 to 0.950 | withheld | about 100 | about 100 |" in text
    assert not re.search(r"\b(97|male: 3)\b", text)
    facts = training_facts([replace(RECORD, counts={"train": counts(97, 3), "eval": counts(97, 3)})])
    assert (facts["subjects"], facts["tasks"]["sex"]["accuracy"]) == (
        "about 100",
        {"value": 0.875, "interval": [0.8, 0.95], "chance": None, "answers": "about 100"},
    )
    assert "| training | sex (classification) | 420 | 420 |" in text


def test_tasks_with_few_subjects_have_no_metrics(card: Any) -> None:
    few = replace(ACCURACY, task="rare", answers=9, subjects=9)
    text = card(replace(RECORD, metrics=(ACCURACY, few)))
    assert "Fewer than 10 subjects, not shown: rare." in text
    assert "| rare |" not in text
    assert len(ModelCard(text).data.eval_results) == 1
    facts = training_facts([replace(RECORD, metrics=(ACCURACY, few), counts={"train": counts(700, 720)})])
    assert (facts["tasks"].keys(), facts["trained"], facts["subjects"]) == ({"sex"}, ["patch_embed"], 1420)


def test_numbers_and_texts_are_not_listed(card: Any) -> None:
    split = counts(50, 50)
    split["tasks"] = {
        "age": {"kind": "regression", "conversations": 50, "subjects": 50, "mean": 61.24, "sd": 7.5, "unit": "years"},
        "note": {"kind": "text", "conversations": 50, "subjects": None},
    }
    text = card(replace(RECORD, counts={"train": split}, metrics=None))
    assert "| training | age (regression) | 50 | 50 | numbers: mean 61.2, SD 7.5 years |" in text
    assert "| training | note (text) | 50 | not recorded | texts |" in text
    assert "Not recorded: this step was not evaluated" in text


def test_states_every_run_of_a_chain(card: Any) -> None:
    text = card(RECORD, replace(RECORD, step="step 3", settings={"data.allow_overlap": True}))
    assert text.index("### Run 1 of 2") < text.index("Exported: step 20") < text.index("Exported: step 3")
    assert "were allowed to share participants or scans" in text


def test_what_is_not_recorded_is_called_so(card: Any) -> None:
    assert card().count("Not recorded: this model was not exported from a run") == 3
    assert "Not recorded: the run is older than the record" in card(RECORD)
