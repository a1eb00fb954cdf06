"""A run with products in 8 bits: it warns where they are emulated, and is computed the same way afterwards."""

import jax
import pytest

import umbrella_jax
from tests.helpers.small_run import make_world_of_one_shape, read_lines, soften, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.models import split


@pytest.mark.slow
def test_answers_of_a_run_are_computed_as_its_evaluations_were(tmp_path):
    """Weights that the run trained stay as they are; an export is not rounded; resuming keeps the setting."""
    world, run = make_world_of_one_shape(tmp_path), tmp_path / "run"
    soften(world.base)
    settings = ["model.quantize=int8", "model.quantize_activations=true", "train.epochs=2"]
    settings += ["train.groups={patch_embed: {}, projector: {}}", "evaluation.likelihoods=true"]
    flags = world.train_flags(run, "--eval-data", world.eval, *(word for key in settings for word in ("--set", key)))
    warning = "model.quantize_activations: cpu is not known to have int8 products"
    assert warning in " ".join(umbrella(*flags, "--dry-run").split())
    assert warning in " ".join(umbrella(*flags).split())
    changed = [word.replace("activations=true", "activations=false") for word in flags]
    said = umbrella(*changed, "--resume", code=2)
    assert "model.quantize_activations: False now, True in the run" in " ".join(said.split())

    graphdef, params = split(umbrella_jax.load(run))
    rounded = {path for path, leaf in params.items() if not isinstance(leaf, jax.Array)}
    assert {path.split(".")[0] for path in rounded} == {"vision_tower", "language_model"}
    umbrella(
        "predict",
        run,
        "--data",
        world.eval,
        "--image-root",
        tmp_path / "scans",
        "--out",
        tmp_path / "a.jsonl",
        "--likelihoods",
        *("--max-new-tokens", 2),
        *("--batch-size", 2),  # the run's: in another batch a sum may round otherwise, and then activations too
    )
    expected = read_lines(next((run / "predictions").glob("*.jsonl")))
    for ours, theirs in zip(read_lines(tmp_path / "a.jsonl"), expected, strict=True):
        assert ours["prediction"] == theirs["prediction"]
        for answer, likelihood in theirs["likelihoods"].items():
            assert ours["likelihoods"][answer] == pytest.approx(likelihood, abs=1e-4)

    exported = Checkpoint.open(run).merged().params()
    assert all(isinstance(leaf, jax.Array) for leaf in exported.values())
    again, weights = split(umbrella_jax.load(run, quantized="fp8"))
    assert again != graphdef
    assert {leaf.qvalue.dtype.name for leaf in weights.values() if not isinstance(leaf, jax.Array)} == {"float8_e4m3fn"}
