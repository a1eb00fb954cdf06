"""Vision-language models for 3D and 4D brain MRI on JAX.

    model = umbrella_jax.load("runs/t1")              # or an HF directory, an export, a native checkpoint
    processor = umbrella_jax.Processor.load("runs/t1")
    batch = processor.prompt("Which side is the lesion on?", [("T1", "scan.nii.gz")])
    print(processor.decode(umbrella_jax.generate(model, batch, stop_ids=processor.stop_ids)))

Names are imported on first use, so `umbrella_jax.models` and `umbrella_jax.training` need only jax, flax, optax and
orbax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umbrella_jax.batch import Batch
    from umbrella_jax.checkpoints.load import load
    from umbrella_jax.config import ModalityConfig, RunConfig, load_config
    from umbrella_jax.errors import CheckpointError, ConfigError, DataError, UmbrellaError
    from umbrella_jax.inference.explain import explain
    from umbrella_jax.inference.features import features
    from umbrella_jax.inference.generate import Sampling, generate, stream
    from umbrella_jax.inference.predict import predict
    from umbrella_jax.inference.processor import Processor
    from umbrella_jax.models import Llava
    from umbrella_jax.run.train import train

_HOME = {
    "Batch": "umbrella_jax.batch",
    "CheckpointError": "umbrella_jax.errors",
    "ConfigError": "umbrella_jax.errors",
    "DataError": "umbrella_jax.errors",
    "Llava": "umbrella_jax.models",
    "ModalityConfig": "umbrella_jax.config",
    "Processor": "umbrella_jax.inference.processor",
    "RunConfig": "umbrella_jax.config",
    "Sampling": "umbrella_jax.inference.generate",
    "UmbrellaError": "umbrella_jax.errors",
    "explain": "umbrella_jax.inference.explain",
    "features": "umbrella_jax.inference.features",
    "generate": "umbrella_jax.inference.generate",
    "load": "umbrella_jax.checkpoints.load",
    "load_config": "umbrella_jax.config",
    "predict": "umbrella_jax.inference.predict",
    "stream": "umbrella_jax.inference.generate",
    "train": "umbrella_jax.run.train",
}

__all__ = [
    "Batch",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Llava",
    "ModalityConfig",
    "Processor",
    "RunConfig",
    "Sampling",
    "UmbrellaError",
    "explain",
    "features",
    "generate",
    "load",
    "load_config",
    "predict",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'umbrella_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
