"""Find the targets of the loss over numbers (`train.number_loss`) in the training data."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from umbrella_jax.config.schema import TaskConfig
from umbrella_jax.data.answer_trees import AnswerEncoder
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.tokenize import CachingTokenizer, NumberTarget, encode_prompt
from umbrella_jax.errors import ConfigError, DataError, Faults
from umbrella_jax.inference.processor import Processor
from umbrella_jax.scoring.parse_answer import parse_number
from umbrella_jax.scoring.rows import blank_rows
from umbrella_jax.scoring.tasks import number_tasks, task_of


def find_number_targets(
    dataset: Dataset, processor: Processor, configured: Mapping[str, TaskConfig]
) -> dict[int, NumberTarget]:
    """Return {number of a conversation: its target} for the conversations of tasks with candidate numbers.

    Args:
        dataset: the training data.
        configured: `evaluation.tasks`.

    Raises:
        ConfigError: no conversation has such a task; the candidates do not fit the references; all references of a task
            are equal; the template writes an answer so that it does not continue its prompt.
        DataError: a reference is not a number.
    """
    numeric = {name: config for name, config in configured.items() if config.numbers is not None}
    found = {
        index: conversation
        for index, conversation in enumerate(dataset.conversations)
        if task_of({"metadata": conversation.metadata, "task_type": conversation.task_type}) in numeric
    }
    if not found:
        raise ConfigError(f"train.number_loss: no training conversation has a task of {', '.join(numeric)}")
    rows = dict(zip(found, blank_rows(found.values()), strict=True))
    tasks = number_tasks(rows.values(), numeric)
    truths, faults = dict[int, float](), Faults()
    for index, row in rows.items():
        value = parse_number(row["reference"], tasks[task_of(row)].unit)
        if value is None:
            faults.append(f"{found[index].label}: last answer {row['reference']!r}: expected a number to learn")
        else:
            truths[index] = value
    faults.raise_as(DataError)
    scales = {name: float(np.std([truths[i] for i, row in rows.items() if task_of(row) == name])) for name in tasks}
    if constant := [name for name, scale in scales.items() if scale == 0]:
        raise ConfigError(f"train.number_loss: {', '.join(constant)}: all training references are equal")

    encode = AnswerEncoder(processor.tokenizer, processor.template)
    encode_start = partial(
        encode_prompt,
        tokenizer=CachingTokenizer(processor.tokenizer),
        modalities=processor.modalities,
        max_length=processor.max_length,
        template=processor.template,
    )
    values = {
        name: np.array(task.numbers.values, np.float32) / np.float32(scales[name])
        for name, task in tasks.items()
        if task.numbers
    }
    targets = dict[int, NumberTarget]()
    for index, conversation in found.items():
        name = task_of(rows[index])
        numbers = tasks[name].numbers
        assert numbers is not None
        start = encode_start(conversation)
        if not np.array_equal(dataset.encoded[index].input_ids[: len(start)], start.input_ids):
            faults.append(
                f"train.number_loss: {conversation.label}: data.template {processor.template}: the tokens of the "
                "answer do not continue those of its prompt; set data.template: umbrella"
            )
            continue
        with faults:
            answers = encode(conversation, numbers.texts, numbers.stems)
            targets[index] = NumberTarget(answers, values[name], truths[index] / scales[name], len(start))
    faults.raise_as(ConfigError)
    return targets
