"""The demo: the main job on an embedded default, each step a command that a user types."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umbrella_jax.demo.base import make_base
from umbrella_jax.demo.data import DemoData, lesion_mask, make_data
from umbrella_jax.errors import RunError
from umbrella_jax.html.page import PACKAGES, page_faults

CONFIG = "tiny"
"""A shipped one."""
LESIONS = """
The lesion holds {:.1f} times the attribution (integrated gradients of the answer) of as many random brain voxels,
median over held-out subjects. To see it on a scan: umbrella-jax explain"""


def run_demo(
    main: Callable[[Sequence[str]], int],
    directory: Path,
    *,
    seed: int = 0,
    subjects: tuple[int, int] = (320, 40),
    arguments: Sequence[str] = (),
) -> dict[str, float]:
    """Makes a small LLaVA-Qwen and a data set, converts, trains, answers, exports and loads the export back.

    Args:
        main: runs one `umbrella-jax` command line and returns its exit code.
        directory: for all that is made; must not exist or be empty.
        subjects: to train on, and held out; multiples of 4.
        arguments: for `umbrella-jax train`, behind the demo's own.

    Returns:
        {task: held-out accuracy}, and `attribution`: see `_lesions`.

    Raises:
        ConfigError: the directory is not empty.
        RunError: the export does not answer as the run did.
    """
    from umbrella_jax.io.files import check_new_folder, check_run_name
    from umbrella_jax.rundir import evaluations
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
    command("train", "--config", CONFIG, *data_options, "--out", run, *arguments)
    command("convert", "to-hf", run, export)
    # a quarter of the network's published channels, and few epochs: enough for what is drawn here
    small = ["--cnn-width", 0.25, "--cnn-epochs", 5]
    command("baseline", "--config", CONFIG, *data_options, "--run", run, "--out", run, *small)

    *_, last = evaluations(run).values()
    rows = read_predictions(last)
    again = _answers(export, data.eval)
    if again != [row["prediction"] for row in rows]:
        raise RunError(f"{export}: answers other than the run's; the export does not hold what was trained")
    print(f"\n{export}: loaded back, its {len(again)} held-out answers are the run's, one by one")
    if faults := page_faults("report", run / "report.html", PACKAGES):
        print("\n".join(["", "no page of the run:", *faults]))
    else:
        command("report", run, "--samples", 3, "--explain", "gradient", "--baseline", run)
    found = _report(rows)
    ratio = _lesions(export, data)
    print(LESIONS.format(ratio))
    return found | {"attribution": ratio}


def _lesions(checkpoint: Path, data: DemoData) -> float:
    """How much of the answers' attribution lies in the lesions, in the scans' own space: |attribution| summed over a
    lesion's voxels, over that of as many other voxels of the head; the median over held-out subjects."""
    import nibabel as nib
    import numpy as np

    from umbrella_jax.checkpoints.load import load
    from umbrella_jax.data.conversation import read_conversations
    from umbrella_jax.inference.explain import explain
    from umbrella_jax.inference.processor import Processor

    model, processor = load(checkpoint), Processor.load(checkpoint)
    rng, ratios = np.random.default_rng(0), []
    for conversation in read_conversations(data.eval, processor.modalities, task_filter="lesion_side"):
        explained = explain(model, processor, conversation, steps=8)
        (image,) = explained.maps
        share = np.abs(explained.in_scan(processor, image))
        (subject,) = conversation.subjects
        inside = np.asarray(nib.load(data.root / lesion_mask(f"sub-{subject}")).dataobj) > 0
        outside = np.flatnonzero((np.asarray(nib.load(image.path).dataobj) > 0) & ~inside)
        others = rng.choice(outside, np.count_nonzero(inside), replace=False)
        ratios.append(share[inside].sum() / share.reshape(-1)[others].sum())
    return float(np.median(ratios))


def _answers(checkpoint: Path, conversations: Path) -> list[str]:
    """What a notebook does: load, make a batch, generate."""
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


def _report(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Prints accuracy per task on subjects that training did not see, beside what is reached without the images."""
    from umbrella_jax.scoring.metrics import score, tasks_of

    scores = score(rows, tasks_of(rows), resamples=0)
    print(f"\n{'held-out task':<28}{'n':>5}{'accuracy':>10}{'chance':>8}")
    result = {}
    for task in scores.tasks:
        figure = scores.of(task)["accuracy"]
        assert figure.value is not None
        assert figure.chance is not None
        print(f"{task:<28}{figure.n:>5}{figure.value:>10.1%}{figure.chance:>8.1%}")
        result[task] = figure.value
    return result
