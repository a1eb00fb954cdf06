"""Answers that follow a JSON schema: valid whatever the weights, and unchanged where they are valid anyway."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import umbrella_jax
from tests.helpers.small_run import modalities, write_json
from tests.helpers.training_case import QUICK, generating_with
from umbrella_jax.demo import make_base
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.inference import constrained
from umbrella_jax.inference.constrained import Constraints, JsonConstraint, JsonMasks
from umbrella_jax.inference.generate import GREEDY, NONE, Sampling, generate
from umbrella_jax.models import Llava

SCHEMA = {
    "type": "object",
    "properties": {
        "finding": {"enum": ["tumour", "infarct", "none"]},
        "left": {"type": "boolean"},
        "lesions": {"type": "integer", "minimum": 0, "maximum": 12},
        "where": {"type": "array", "items": {"enum": ["pons", "thalamus"]}, "maxItems": 2},
        "note": {"type": "string", "maxLength": 4},
    },
    "required": ["finding", "left", "lesions", "where"],
    "additionalProperties": False,
}
OBJECT = {"type": "object"}
NEW = 256


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base of random weights; programs compile in a third of the time."""
    base = tmp_path_factory.mktemp("base") / "base"
    make_base(base)
    with generating_with(QUICK):
        yield base


@pytest.fixture(scope="module")
def schema(base: Path) -> Path:
    return write_json(base.parent / "schema.json", SCHEMA)


@pytest.fixture(scope="module")
def model(base: Path) -> Llava:
    return umbrella_jax.load(base, modalities=modalities(), allow_untrained=True)


@pytest.fixture(scope="module")
def processor(base: Path) -> umbrella_jax.Processor:
    return umbrella_jax.Processor.load(base, modalities=modalities())


@pytest.fixture(scope="module")
def constraint(schema: Path, model: Llava, processor: umbrella_jax.Processor) -> JsonConstraint:
    return JsonConstraint.load(schema, processor, model.config.text.vocab_size)


def tokens_of(model: Llava, processor: umbrella_jax.Processor, masks: JsonMasks | None, **options: Any) -> np.ndarray:
    """Generate one answer."""
    batch = processor.prompt("Describe this brain.")
    return np.asarray(generate(model, batch, stop_ids=processor.stop_ids, max_new_tokens=NEW, masks=masks, **options))[
        0
    ]


@pytest.mark.parametrize(
    "sampling", [pytest.param(GREEDY, marks=pytest.mark.slow), Sampling(temperature=3.0, top_k=50, top_p=0.95)]
)
def test_answers_of_random_weights_parse_and_validate(
    model: Llava, processor: umbrella_jax.Processor, constraint: JsonConstraint, sampling: Sampling
) -> None:
    free = tokens_of(model, processor, None, sampling=sampling)
    all_allowed = JsonMasks([None], model.config.text.vocab_size)
    assert (free == tokens_of(model, processor, all_allowed, sampling=sampling)).all()
    with pytest.raises(ValueError, match=r"."):
        json.loads(processor.decode([free])[0])
    answers = set()
    for seed in range(1 if sampling is GREEDY else 5):
        tokens = tokens_of(model, processor, constraint.masks(1), sampling=sampling, seeds=[seed])
        (text,) = processor.decode([tokens])
        jsonschema.validate(json.loads(text), SCHEMA)
        assert tokens[tokens != NONE][-1] in processor.stop_ids
        answers.add(text)
    assert len(answers) == (1 if sampling is GREEDY else 5)


@pytest.mark.parametrize("indent", [None, 1])
def test_an_answer_that_is_valid_anyway_stays(
    model: Llava, processor: umbrella_jax.Processor, constraint: JsonConstraint, indent: int | None
) -> None:
    """Let the likeliest tokens be those of a valid answer, whatever the text before it."""
    answer = {"finding": "tumour", "left": True, "lesions": 3, "where": ["pons", "thalamus"]}
    ids = [*processor.tokenizer.encode(json.dumps(answer, indent=indent)), processor.stop_ids[0]]
    masks = constraint.masks(1)
    for token in ids:
        words = masks.allowed()
        assert words[0, token // 32] >> (token % 32) & 1
        assert (token == ids[-1]) == bool(words[0, processor.stop_ids[0] // 32] >> (processor.stop_ids[0] % 32) & 1)
        masks.accept(np.array([token], np.int32))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"finding": "cyst"}, "from 'cyst"),
        ({"note": "ö"}, "from "),
        ({"lesions": 13}, "from '3"),
    ],
)
def test_refuses_references_that_no_answer_could_equal(
    schema: Path, model: Llava, processor: umbrella_jax.Processor, changes: dict[str, Any], place: str
) -> None:
    answer = {"finding": "tumour", "left": True, "lesions": 3, "where": []}
    texts = [json.dumps(answer), json.dumps(answer | changes), "No JSON."]  # an ö becomes \\u00f6
    rows = [{"task_id": f"t{n}", "task_type": "note", "reference": text} for n, text in enumerate(texts)]
    arguments = {"note": schema}, processor, model.config.text.vocab_size
    with pytest.raises(DataError, match=rf"^t1: its reference does not follow {schema} {place}"):
        Constraints.for_tasks(rows, *arguments)
    assert Constraints.for_tasks([rows[0], rows[2]], *arguments)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({**OBJECT, "properties": {"a": {}}, "not": {}}, "schema: Unimplemented keys"),
        (
            {**OBJECT, "properties": {"a": {"properties": {"b": {"type": "integr"}}}}},
            "properties.a.properties.b: Invalid",
        ),
        (
            {**OBJECT, "properties": {"a": {"items": {"$ref": "#/$defs/x"}}}},
            "properties.a.items: .*not exist",
        ),
        ({**OBJECT, "properties": {"a": {"anyOf": [{}, {"not": {}}]}}}, r"properties.a.anyOf\[1\]: Unimplemented keys"),
        ({**OBJECT, "properties": {"a": {"enum": []}}, "required": ["a"]}, "properties.a: Unsatisfiable"),
        ({**OBJECT, "properties": {"a": 1}}, "properties.a: expected a schema"),
        ({"type": "string"}, 'expected "type": "object"'),
        ([1], "expected an object, got a list"),
    ],
)
def test_refuses_a_schema_by_file_and_place(
    schema: Any, place: str, tmp_path: Path, model: Llava, processor: umbrella_jax.Processor
) -> None:
    file = write_json(tmp_path / "schema.json", schema)
    with pytest.raises(ConfigError, match=f"schema.json: {place}"):
        JsonConstraint.load(file, processor, model.config.text.vocab_size)


def test_refuses_a_slow_tokenizer_and_a_missing_library(
    schema: Path, processor: umbrella_jax.Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        is_fast, name_or_path = False, "base"

    slow = umbrella_jax.Processor(Slow(), processor.modalities)
    with pytest.raises(ConfigError, match=r"base: Slow cannot be limited.*tokenizer\.json"):
        JsonConstraint.load(schema, slow, 384)
    monkeypatch.setattr(constrained, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs llguidance.*umbrella-jax\[text\]"):
        JsonConstraint.load(schema, processor, 384)
