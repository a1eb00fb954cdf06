"""Effect of 8-bit weights and products on loss, gradients, answers and size; and the products of compiled programs."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.data import CONFIGS
from bench.jax_step import model_config
from bench.measure import figure
from bench.workload import SCANS, TEXT
from umbrella_jax.batch import Batch
from umbrella_jax.config.load import load_config
from umbrella_jax.config.schema import Quantized
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import Params, merge
from umbrella_jax.plan import parse_devices
from umbrella_jax.plan.compile_step import compile_step
from umbrella_jax.plan.flops import workload
from umbrella_jax.sharding import MeshShape
from umbrella_jax.training import freeze
from umbrella_jax.training.loss import loss_sum

SETTINGS: dict[str, tuple[Quantized | None, bool]] = {
    "none": (None, False),
    "int8": ("int8", False),
    "int8_activations": ("int8", True),
    "fp8": ("fp8", False),
    "fp8_activations": ("fp8", True),
}
"""{name: `model.quantize` and `model.quantize_activations`}."""
COMPILED = {
    "v5e-1": ("none", "int8_activations"),
    "v6e-1": ("none", "int8_activations"),
    "h200": ("none", "int8_activations", "fp8_activations"),
}
"""{devices: settings to compile for}, if their compiler is installed."""


def quantize(work_dir: Path) -> None:
    """Compare 8-bit weights and products with none, on the demo's model and the golden case; count them when compiled.

    Gradients are those of the patch embedding. Programs are compiled for devices whose compilers are installed.
    """
    _demo(work_dir / "demo")
    _golden()
    _compiled()


def _demo(folder: Path) -> None:
    import umbrella_jax
    from umbrella_jax.cli import main
    from umbrella_jax.data.loader import eval_batches
    from umbrella_jax.demo import run_demo
    from umbrella_jax.models import split
    from umbrella_jax.scoring.metrics import normalise
    from umbrella_jax.training.step import jit_eval_step

    if not (folder / "export").exists():
        run_demo(main, folder)
    processor = umbrella_jax.Processor.load(folder / "export")
    data = processor.dataset(folder / "data" / "eval.json", evaluation=True)
    references = [normalise(conversation.messages[-1].text) for conversation in data.conversations]
    unquantized: tuple[list[str], np.ndarray] | None = None
    for name, (dtype, activations) in SETTINGS.items():
        options: dict[str, Any] = {"quantized": dtype, "quantize_activations": activations}
        model = umbrella_jax.load(folder / "export", **options)
        graphdef, params = split(model)
        total, count, gradient = 0.0, 0, np.zeros(())
        for _, batch in eval_batches(data, 16, prompts=False):
            loss, supervised = jit_eval_step()(params, {}, batch, graphdef=graphdef)
            total, count = total + float(loss), count + int(supervised)
            gradient = gradient + _loss_and_gradient(graphdef, params, batch)[1]
        decoded: dict[int, str] = {}
        for indices, batch in eval_batches(data, 16, prompts=True):
            tokens = umbrella_jax.generate(model, batch, stop_ids=processor.stop_ids, max_new_tokens=4)
            decoded |= dict(zip(indices, processor.decode(tokens), strict=False))
        answers = [normalise(decoded[index]) for index in range(len(data))]
        unquantized = unquantized or (answers, gradient)
        more: dict[str, Any] = {
            "loss": round(total / count, 5),
            "gradient_cosine": _cosine(gradient, unquantized[1]),
            "same_answers": float(np.mean([a == b for a, b in zip(answers, unquantized[0], strict=True)])),
            "megabytes": round(sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6, 2),
        }
        accuracy = float(np.mean([a == b for a, b in zip(answers, references, strict=True)]))
        figure(f"quantize_{name}_accuracy", accuracy, "", **more)


def _golden() -> None:
    """Compare on the golden case: a random model, 32 to 64 wide, in which rounding has large effects."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.helpers.golden_case import golden_batch, golden_model
    from umbrella_jax.models import abstract_params
    from umbrella_jax.models import quantize as quantize_params

    config, params = golden_model()
    batch = golden_batch()
    unquantized: tuple[np.ndarray, np.ndarray] | None = None
    for name, (dtype, activations) in SETTINGS.items():
        graphdef = abstract_params(replace(config, product_dtype=dtype if activations else None))[0]
        weights = quantize_params(dict(params), dtype) if dtype else params
        loss, gradient, words = _loss_and_gradient(graphdef, weights, batch)
        unquantized = unquantized or (words, gradient)
        more = {
            "gradient_cosine": _cosine(gradient, unquantized[1]),
            "same_words": round(float((words == unquantized[0])[batch.target_mask].mean()), 3),
        }
        figure(f"quantize_golden_{name}_loss", float(loss / batch.target_mask.sum()), "", **more)


def _compiled() -> None:
    """Count the products of a training step as compiled for devices that are not at hand: 0.5b size, a layer each."""
    model = model_config("0.5b", SCANS["t1"], "bfloat16", "none", layers=1)
    for devices, names in COMPILED.items():
        for name in names:
            dtype, activations = SETTINGS[name]
            settings = {"model.quantize": dtype, "model.quantize_activations": activations}
            config = load_config(CONFIGS / "t1_0.5b.yaml", settings | {"model.compute_dtype": "bfloat16"})
            mesh, work = MeshShape(data=1, fsdp=1, tensor=1), workload(config, model, TEXT)
            try:
                program = compile_step(config, model, parse_devices(devices), mesh, 2, work, frozen_dtype="bfloat16")
            except ConfigError as error:  # no compiler
                figure(f"quantize_{devices}_{name}_products_in_8_bits", None, "", error=str(error))
                continue
            count = sum(program.products.get(dtype, 0) for dtype in ("s8", "f8e4m3fn"))
            more = {"products": program.products, "compile_seconds": round(program.seconds)}
            figure(f"quantize_{devices}_{name}_products_in_8_bits", count, "", **more)


def _loss_and_gradient(graphdef: Any, params: Mapping[str, Any], batch: Batch) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the summed loss, its gradient by the patch embedding as one vector, and the likeliest target words."""
    trainable, frozen = freeze.partition(params, freeze.label_params(list(params), ["patch_embed"]))
    (loss, words), grads = _differentiate(trainable, frozen, batch, graphdef=graphdef)
    vector = np.concatenate([np.ravel(grads[path]) for path in sorted(grads)]).astype(np.float64)
    return float(loss), vector, np.asarray(words)


@partial(jax.jit, static_argnames="graphdef")
def _differentiate(trainable: Params, frozen: Params, batch: Batch, *, graphdef: Any) -> Any:
    def loss(trainable: Params) -> tuple[jax.Array, jax.Array]:
        model = merge(graphdef, trainable | frozen)
        return loss_sum(model, batch)[0], model.target_logits(batch).argmax(-1)

    return jax.value_and_grad(loss, has_aux=True)(trainable)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return round(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), 5)
