"""Effect of 8-bit frozen weights on a trained model's loss, answers and size."""

from pathlib import Path
from typing import Any

from bench.measure import figure


def quantize(work_dir: Path) -> None:
    """Compare loss and answers of the demo's model on held-out data with frozen weights in float32, int8 and fp8."""
    import jax
    import numpy as np

    import umbrella_jax
    from umbrella_jax.cli import main
    from umbrella_jax.data.loader import eval_batches
    from umbrella_jax.demo import run_demo
    from umbrella_jax.models import split
    from umbrella_jax.scoring.metrics import normalise
    from umbrella_jax.training.step import jit_eval_step

    folder = work_dir / "demo"
    if not (folder / "export").exists():
        run_demo(main, folder)
    processor = umbrella_jax.Processor.load(folder / "export")
    data = processor.dataset(folder / "data" / "eval.json", evaluation=True)
    references = [normalise(conversation.messages[-1].text) for conversation in data.conversations]
    unquantized: list[str] = []
    for dtype in (None, "int8", "fp8"):
        model = umbrella_jax.load(folder / "export", quantized=dtype)
        graphdef, params = split(model)
        total, count = 0.0, 0
        for _, batch in eval_batches(data, 16, prompts=False):
            loss, supervised = jit_eval_step()(params, {}, batch, graphdef=graphdef)
            total, count = total + float(loss), count + int(supervised)
        decoded: dict[int, str] = {}
        for indices, batch in eval_batches(data, 16, prompts=True):
            tokens = umbrella_jax.generate(model, batch, stop_ids=processor.stop_ids, max_new_tokens=4)
            decoded |= dict(zip(indices, processor.decode(tokens), strict=False))
        answers = [normalise(decoded[index]) for index in range(len(data))]
        unquantized = unquantized or answers
        more: dict[str, Any] = {
            "loss": round(total / count, 5),
            "same_answers": float(np.mean([a == b for a, b in zip(answers, unquantized, strict=True)])),
            "megabytes": round(sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6, 2),
        }
        accuracy = float(np.mean([a == b for a, b in zip(answers, references, strict=True)]))
        figure(f"quantize_{dtype or 'none'}_accuracy", accuracy, "", **more)
