"""The demo: convert, train, answer, export and compare, each step a command that a user types."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umbrella_jax.demo.base import make_base
from umbrella_jax.demo.data import DemoData, lesion_mask, make_data
from umbrella_jax.errors import RunError
from umbrella_jax.html.page import PACKAGES, page_faults

CONFIG = "tiny"
"""A shipped config."""
ATTRIBUTION_TEXT = """
The lesion gets {:.1f} times the attribution (integrated gradients of the answer)
of as many random brain voxels, median over held-out subjects.
To see it on a scan: umbrella-jax explain"""


def run_demo(
    main: Callable[[Sequence[str]], int],
    directory: Path,
    *,
    seed: int = 0,
    subjects: tuple[int, int] = (320, 40),
    arguments: Sequence[str] = (),
) -> dict[str, float]:
    """Make a small LLaVA-Qwen and a data set, convert, train, answer, export, and load the export again.

    Args:
        main: runs one `umbrella-jax` command line and returns its exit code.
        directory: folder for all files; must be empty or not exist.
        seed: seed of the base's weights and of the data.
        subjects: numbers of training and held-out subjects, multiples of 4.
        arguments: more arguments for `umbrella-jax train`.

    Returns:
        {task: held-out accuracy}, and under `attribution` the ratio of `_attribution_ratio`.

    Raises:
        ConfigError: the directory is not empty.
        RunError: a command failed, or the export's answers differ from the run's.
    """
    from umbrella_jax.io.files import check_new_folder, check_run_name
    from umbrella_jax.rundir import predictions_by_step
    from umbrella_jax.scoring.metrics import read_predictions

    def command(*words: object) -> None:
        text = [str(word) for word in words]
        print(f"\n$ umbrella-jax {shlex.join(text)}", flush=True)
        if main(text):
            raise RunError(f"demo: umbrella-jax {text[0]} failed")

    check_new_folder(directory)
    check_run_name(directory, "choose another directory (--out DIR)")
    base, native, run, export = (directory / name for name in ("base", "native", "run", "export"))
    make_base(base, seed)
    data = make_data(directory / "data", seed, *subjects)
    print(
        f"{base}: a small LLaVA-Qwen with random weights\n{data.root}: heads with a lesion, runs with an active region"
    )

    command("convert", "from-hf", base, native, "--config", CONFIG)
    data_options = ["--base", native, "--train-data", data.train, "--eval-data", data.eval]
    data_options += ["--cache", directory / "cache"]
    controls = ["--set", "evaluation.controls=[blank,noise,shuffled]"]
    command("train", "--config", CONFIG, *data_options, *controls, "--out", run, *arguments)
    command("convert", "to-hf", run, export)
    # A quarter of the network's published channels and few epochs are enough for these drawings.
    small = ["--cnn-width", 0.25, "--cnn-epochs", 5]
    command("baseline", run, *small)

    *_, last_evaluation = predictions_by_step(run).values()
    rows = read_predictions(last_evaluation)
    answers = _answers(export, data.eval)
    if answers != [row["prediction"] for row in rows]:
        raise RunError(f"{export}: answers differ from the run's; the export lacks trained weights")
    print(f"\n{export}: loaded again; its {len(answers)} held-out answers equal the run's")
    command("score", run, "--baseline", run, "--table", directory / "table.tex")
    if faults := page_faults("report", run / "report.html", PACKAGES):
        print("\n".join(["", "no report of the run:", *faults]))
    else:
        command("report", run, "--samples", 3, "--explain", "gradient", "--baseline", run)
    accuracies = print_accuracies(rows)
    ratio = _attribution_ratio(export, data)
    print(ATTRIBUTION_TEXT.format(ratio))
    return accuracies | {"attribution": ratio}


def _attribution_ratio(checkpoint: Path, data: DemoData) -> float:
    """Return how many times more attribution the lesions get than other voxels; the median over held-out subjects.

    A subject's ratio is the sum of |attribution| over the lesion's voxels, divided by the sum over as many random
    voxels of the rest of the head, on the scan's own grid.
    """
    import nibabel as nib
    import numpy as np

    from umbrella_jax.checkpoints.load import load
    from umbrella_jax.config.load import load_config
    from umbrella_jax.data.conversation import read_conversations
    from umbrella_jax.inference.explain import explain
    from umbrella_jax.inference.processor import Processor

    model, processor = load(checkpoint), Processor.load(checkpoint)
    longest = load_config(CONFIG).train.max_new_tokens
    rng, ratios = np.random.default_rng(0), []
    for conversation in read_conversations(data.eval, processor.modalities, task_filter="lesion_side"):
        explained = explain(model, processor, conversation, steps=8, max_new_tokens=longest)
        (image,) = explained.maps
        attribution = np.abs(explained.in_scan(processor, image))
        (subject,) = conversation.subjects
        inside = np.asarray(nib.load(data.root / lesion_mask(f"sub-{subject}")).dataobj) > 0
        outside = np.flatnonzero((np.asarray(nib.load(image.path).dataobj) > 0) & ~inside)
        others = rng.choice(outside, np.count_nonzero(inside), replace=False)
        ratios.append(attribution[inside].sum() / attribution.reshape(-1)[others].sum())
    return float(np.median(ratios))


def _answers(checkpoint: Path, conversations: Path) -> list[str]:
    """Return the checkpoint's answers, made as in a notebook: load, make a batch, generate."""
    from umbrella_jax.checkpoints.load import load
    from umbrella_jax.config.load import load_config
    from umbrella_jax.inference.generate import generate
    from umbrella_jax.inference.processor import Processor

    model = load(checkpoint)
    processor = Processor.load(checkpoint)
    batch = processor.batch(conversations, prompts=True)
    longest = load_config(CONFIG).train.max_new_tokens
    tokens = generate(model, batch, stop_ids=processor.stop_ids, max_new_tokens=longest)
    return processor.decode(tokens)


def print_accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Print accuracy and chance level per task on the held-out subjects; return {task: accuracy}."""
    from umbrella_jax.scoring.metrics import score, tasks_of

    scores = score(rows, tasks_of(rows), resamples=0)
    print(f"\n{'held-out task':<28}{'n':>5}{'accuracy':>10}{'chance':>8}")
    result = {}
    for task in scores.tasks:
        figure = scores.task_figures(task)["accuracy"]
        assert figure.value is not None
        assert figure.chance is not None
        print(f"{task:<28}{figure.n:>5}{figure.value:>10.1%}{figure.chance:>8.1%}")
        result[task] = figure.value
    return result
