"""FLOPs of a batch by its shape, and data sheets by the device's name."""

from typing import Any

import pytest

from tests.helpers.training_case import SMALL_MODALITIES, TEXT, VISION
from umbrella_jax.config.schema import GroupConfig, ModalityConfig, ModelConfig, RunConfig, TrainConfig
from umbrella_jax.models import LlavaConfig
from umbrella_jax.plan import at_shape, batch_flops, sheet_of
from umbrella_jax.plan.devices import DEVICE_KINDS

OTHER = ModalityConfig(size=(4, 4, 4, 2), patch=(2, 2, 2, 1))  # 16 patches of 8 voxels
CONFIG = LlavaConfig(
    vision=VISION, text=TEXT, modalities=SMALL_MODALITIES | {"fMRI": OTHER}, image_token_id=50, compute_dtype="bfloat16"
)


def run_of(*groups: str, accumulate_steps: int = 1) -> RunConfig:
    train = TrainConfig(groups={name: GroupConfig() for name in groups}, accumulate_steps=accumulate_steps)
    return RunConfig(model=ModelConfig(modalities=dict(CONFIG.modalities)), train=train)


RUN = run_of("patch_embed")


def flops(conversations: int, run: RunConfig = RUN, **volumes: int) -> float:
    shape: dict[str, Any] = {"positions": 40, "targets": 8, "volumes": volumes}
    return batch_flops(run, CONFIG, conversations=conversations, **shape)


@pytest.mark.parametrize("name", ["T1", "fMRI"])
def test_plan_counts_one_conversation_with_one_volume(name: str) -> None:
    model = at_shape(RUN, CONFIG, name, positions=40, targets=8, frozen_dtype="float32")
    assert model.workload.positions == 40
    assert flops(1, **{name: 1}) == sum(model.flops(None).values())


def test_volumes_cost_the_tower_and_conversations_the_language_model() -> None:
    """However many conversations show a volume, it is encoded once; those without any have none."""
    text, one, other = flops(1), flops(1, T1=1) - flops(1), flops(1, fMRI=1) - flops(1)
    assert min(text, one, other) > 0
    assert one != other
    assert flops(6, T1=2, fMRI=3) == pytest.approx(6 * text + 2 * one + 3 * other)


def test_text_costs_its_products_and_attention() -> None:
    """2 FLOPs for each weight and position, forward and for the gradient of the input, and once more for that of a
    weight that trains; scores and values, six times; the head over the supervised positions alone."""
    weights = 3 * (28 * 48 + 2 * 28 * 16 + 48 * 28 + 3 * 28 * 47) * 40 + 53 * 28 * 8
    attention = 6 * 2 * 3 * 40**2 * 6 * 8
    assert flops(1) == 4 * weights + attention
    assert flops(1, run_of("patch_embed", "language_model")) == 6 * weights + attention


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A10", None),
        ("TPU v4", "v4"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("Tesla T4", "t4"),
        ("cpu", None),
    ],
)
def test_names_of_devices(name: str, kind: str | None) -> None:
    """jax's names map to data sheets; a slower card is not mistaken for its faster namesake."""
    assert sheet_of(name) is (DEVICE_KINDS[kind] if kind else None)
