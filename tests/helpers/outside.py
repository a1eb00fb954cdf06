"""What a user's program does with the installed package: scripts/check_install.sh runs it, and mypy --strict reads it.

`python outside.py DIR` makes the demo's inputs there on a small scale, trains for a few steps, and asks.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import umbrella_jax
from umbrella_jax.config.schema import DataConfig
from umbrella_jax.demo import make_base, make_data


def main(root: Path) -> None:
    base = make_base(root / "base")
    data = make_data(root / "data", train_subjects=8, eval_subjects=4)
    config: umbrella_jax.RunConfig = umbrella_jax.load_config(
        "tiny",
        {
            "model.base": str(base),
            "data.train": str(data.train),
            "data.eval": str(data.eval),
            "output_dir": str(root / "run"),
            "train.epochs": 1,
        },
    )
    last = umbrella_jax.train(config)
    loss = last["loss"]
    assert loss is not None
    assert np.isfinite(loss)

    model: umbrella_jax.Llava = umbrella_jax.load(root / "run")
    processor = umbrella_jax.Processor.load(root / "run")
    batch: umbrella_jax.Batch = processor.batch(data.eval, prompts=True)
    tokens = umbrella_jax.generate(
        model, batch, stop_ids=processor.stop_ids, max_new_tokens=4, sampling=umbrella_jax.Sampling(temperature=0.5)
    )
    answers: list[str] = processor.decode(tokens)
    assert model(batch).shape[:2] == batch.input_ids.shape
    unseen = replace(batch, volumes={name: np.zeros_like(volumes) for name, volumes in batch.volumes.items()})
    assert (model(unseen) != model(batch)).any()
    rows = umbrella_jax.predict(root / "run", DataConfig(eval=str(data.eval)), root / "answers.jsonl")
    assert len(rows) == len(answers) == len(batch.lengths)
    print(f"loss {loss:.4f}; {len(rows)} answers, the first: {rows[0]['prediction']!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
