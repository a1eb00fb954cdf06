"""`umbrella-jax plan`: its counts against hand-made ones and against XLA's, its choices against its own formulas."""

import json
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args
from unittest import mock
from unittest.mock import Mock

import jax
import pytest
from bench.workload import SCANS

from tests.config.test_configs import CONFIGS, expected_counts, write_hub_config
from tests.helpers.full_size import TEXT_TOKENS, abstract_step, full_size
from tests.helpers.small_run import umbrella
from umbrella_jax import cli
from umbrella_jax.config.load import parse_mesh
from umbrella_jax.config.schema import (
    DataConfig,
    GroupConfig,
    LoraConfig,
    MeshConfig,
    ModalityConfig,
    ModelConfig,
    Quantized,
    RematPolicy,
    RunConfig,
    TrainConfig,
)
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import LlavaConfig, QwenConfig, SiglipConfig
from umbrella_jax.plan import HardwarePlan, parse_devices, plan_hardware
from umbrella_jax.plan import devices as devices_module
from umbrella_jax.plan.devices import DEVICE_KINDS, PEAK_EFFICIENCY, PLAN_ERROR
from umbrella_jax.plan.estimate import (
    ATTENTION_EFFICIENCY,
    BANDWIDTH_EFFICIENCY,
    LINK_EFFICIENCY,
    estimate,
    largest_batch,
)
from umbrella_jax.plan.flops import KEPT, RECOMPUTED, ModelCounts, count_model, workload
from umbrella_jax.sharding import MeshShape, mesh_shapes

# A model whose every size can be told from the others: 12 patches of 30 numbers, 8 text tokens, so 20 positions.
N, P, T, K = 12, 30, 20, 8
E, F, LV, UNUSED, HV = 8, 14, 3, 7, 4
D, G, LT, HT, KV, DH, V = 24, 10, 5, 6, 2, 4, 50
MODALITY = ModalityConfig(size=(4, 9, 10), patch=(2, 3, 5))
OTHER = ModalityConfig(size=(4, 4, 4), patch=(2, 2, 2))


def tiny(*groups: str, tied: bool = True, dtype: str = "float32", lora: LoraConfig | None = None) -> ModelCounts:
    """Counts of the tiny model that trains `groups`."""
    model = LlavaConfig(
        vision=SiglipConfig(
            hidden_size=E,
            intermediate_size=F,
            num_hidden_layers=LV + UNUSED,
            num_attention_heads=HV,
            num_unused_layers=UNUSED,
            layer_norm_eps=1e-6,
        ),
        text=QwenConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=G,
            num_hidden_layers=LT,
            num_attention_heads=HT,
            num_key_value_heads=KV,
            head_dim=DH,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            max_position_embeddings=100,
            tie_word_embeddings=tied,
        ),
        modalities={"T1": MODALITY, "dwi": OTHER},
        image_token_id=1,
        compute_dtype=dtype,
        lora=lora,
    )
    config = RunConfig(
        model=ModelConfig(modalities=dict(model.modalities), lora=lora),
        train=TrainConfig(groups={group: GroupConfig() for group in groups or ("patch_embed",)}),
    )
    return count_model(config, model, workload(config, model, T - N), "bfloat16")


def in_8_bits(devices: str, dtype: Quantized | None) -> HardwarePlan:
    """Return the plan of the tiny model whose products are in an 8-bit type; None for bfloat16."""
    model = tiny(dtype="bfloat16").config
    settings = {"quantize": dtype, "quantize_activations": True} if dtype else {}
    config = RunConfig(model=ModelConfig(modalities=dict(model.modalities), remat="none", **settings))  # type: ignore[arg-type]
    return plan_hardware(config, model, parse_devices(devices), frozen_dtype="bfloat16", text_tokens=T - N)


def test_products_in_8_bits_take_less_time_where_the_device_has_them() -> None:
    """Forward ones of the tower, the projector and the decoder, at twice the peak; the others as before."""
    weights = LV * N * (4 * E * E + 2 * E * F) + N * (E * D + D * D)
    weights += LT * T * (2 * D * HT * DH + 2 * D * KV * DH + 3 * D * G)
    plain, int8, fp8 = (in_8_bits("v5e-1", dtype) for dtype in (None, "int8", "fp8"))
    assert int8.model.flops(None) == plain.model.flops(None)
    seconds = [plan.configured[0].seconds["compute"] for plan in (plain, int8, fp8)]
    batch, rate = plain.configured[0].batch_size, DEVICE_KINDS["v5e"].flops * PEAK_EFFICIENCY
    assert seconds[0] - seconds[1] == pytest.approx(2 * weights / 2 * batch / rate)
    assert seconds[2] == seconds[0]
    assert "2 times that peak in int8" in " ".join(int8.assumptions())
    assert "v5e is not known to have fp8 products" in " ".join(fp8.assumptions())
    assert "products with them in int8" in int8.table().replace("\n", " ")


def lowered(run: RunConfig, model: LlavaConfig, batch_size: int) -> jax.stages.Lowered:
    """The real training step, with frozen weights in float32."""
    step, arguments = abstract_step(run, model, batch_size, "float32")
    return step.lower(*arguments)


def test_every_remat_policy_is_counted() -> None:
    assert set(KEPT) == set(RECOMPUTED) == set(get_args(RematPolicy))


def test_the_floor_of_the_issues_workload(tmp_path: Path) -> None:
    """2.5 TFLOP: forward, and gradients of activations back to the patch embedding."""
    run, model = full_size(tmp_path, "0.5b", "float32")
    counted = count_model(run, model, workload(run, model, TEXT_TOKENS), "float32")
    n, t = 729, 793
    vision = 26 * (2 * n * (4 * 1152**2 + 2 * 1152 * 4304) * 2 + 6 * 2 * n * n * 1152)
    text = 24 * (2 * t * (4 * 1024**2 + 3 * 1024 * 2816) * 2 + 6 * 2 * t * t * 1024) + 2 * 8 * 152_000 * 1024 * 2
    ends = 2 * n * (1152 * 1024 + 1024**2) * 2 + 2 * n * 1000 * 1152 * 2
    assert sum(counted.flops(None).values()) == vision + text + ends
    assert 2.45e12 < vision + text + ends < 2.55e12


def test_flops_by_hand() -> None:
    counted = tiny()
    layer_v, mlp_v = 4 * E * E + 2 * E * F, E * F
    layer_t, mlp_t = 2 * D * HT * DH + 2 * D * KV * DH + 3 * D * G, 2 * D * G
    one_v, one_t = 2 * N * N * E, 2 * T * T * HT * DH  # scores of all heads of a layer
    floor = {
        "patch_embed": 2 * (2 * N * P * E),  # forward and weight gradient; the input is data
        "vision_tower": LV * (2 * (2 * N * layer_v) + 6 * one_v),
        "projector": 2 * (2 * N * (E * D + D * D)),
        "language_model": LT * (2 * (2 * T * layer_t) + 6 * one_t) + 2 * (2 * K * D * V),
    }
    assert counted.flops(None) == floor
    none = floor | {
        "vision_tower": floor["vision_tower"] + LV * one_v,
        "language_model": floor["language_model"] + LT * one_t,
    }
    assert counted.flops("none") == none
    mlp = none | {
        "vision_tower": none["vision_tower"] + LV * 2 * N * mlp_v,
        "language_model": none["language_model"] + LT * 2 * T * mlp_t,
    }
    assert counted.flops("mlp") == mlp
    assert counted.flops("full") == none | {  # all but the product that ends a layer
        "vision_tower": none["vision_tower"] + LV * (2 * N * (layer_v - F * E) + 2 * one_v),
        "language_model": none["language_model"] + LT * (2 * T * (layer_t - G * D) + 2 * one_t),
    }


def test_flops_depend_on_the_trained_parts() -> None:
    floor = tiny().flops(None)
    everything = tiny("patch_embed", "vision_tower", "projector", "language_model", tied=False).flops(None)
    assert everything["vision_tower"] - floor["vision_tower"] == LV * 2 * N * (4 * E * E + 2 * E * F)
    assert everything["projector"] == 3 * 2 * N * (E * D + D * D)
    head = 2 * K * D * V
    layers = LT * 2 * T * (2 * D * HT * DH + 2 * D * KV * DH + 3 * D * G)
    assert everything["language_model"] - floor["language_model"] == head + layers
    projector = tiny("projector")
    assert projector.flops("full")["vision_tower"] == LV * (2 * N * (4 * E * E + 2 * E * F) + 2 * 2 * N * N * E)
    assert projector.flops("full")["patch_embed"] == 2 * N * P * E
    kept = [counted.device_bytes(MeshShape(), 1, "none")["activations"] for counted in (tiny(), projector)]
    assert kept[0] - kept[1] == LV * N * (6 * E + F + HV) * 4


R = 7
LORA = LoraConfig(rank=R, targets=("language_model", "vision_tower.fc2"))


def test_adapters_by_hand() -> None:
    """No weight gradient of W; A forward, again, and two gradients; B forward, again where W is, and two gradients."""
    without, counted = tiny("patch_embed"), tiny("patch_embed", "lora", lora=LORA)
    q, kv = HT * DH, KV * DH
    a_text, b_text = R * (5 * D + q + G), R * (q + 2 * kv + 2 * D + 2 * G)
    a_vision, b_vision = R * F, R * E
    ended = R * D  # B of down_proj, whose output nothing needs; as of fc2
    for remat, again in ((None, 0), ("none", 0), ("mlp", 2 * R * G), ("full", b_text - ended)):
        more = {name: flops - without.flops(remat)[name] for name, flops in counted.flops(remat).items()}
        assert more == {
            "patch_embed": 0,
            "vision_tower": LV * 2 * N * ((4 if remat else 3) * a_vision + 3 * b_vision),
            "projector": 0,
            "language_model": LT * 2 * T * ((4 if remat else 3) * a_text + 3 * b_text + again),
        }
    adapters = LV * (a_vision + b_vision) + LT * (a_text + b_text)
    assert counted.trained - without.trained == adapters
    ours, theirs = (c.device_bytes(MeshShape(), 1, "none") for c in (counted, without))
    assert ours["trained weights and moments"] - theirs["trained weights and moments"] == 12 * adapters
    assert ours["gradients"] - theirs["gradients"] == 8 * adapters
    assert ours["frozen weights"] == theirs["frozen weights"]
    assert tiny("lora", lora=LORA).flops("none")["patch_embed"] == 2 * N * P * E  # whose gradient nobody asks for


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_by_hand(dtype: str, size: int) -> None:
    counted = tiny(dtype=dtype)
    trained = (P + 1) * E + N * E + (8 + 1) * E + 8 * E  # both modalities' patch embeddings
    vision = (LV + UNUSED) * (4 * E + 4 * (E * E + E) + 2 * E * F + F + E)
    text = V * D + D + LT * (2 * D + (HT + 2 * KV) * DH * (D + 1) + HT * DH * D + 3 * D * G)
    frozen = 2 * (vision + text + (E * D + D) + (D * D + D) + 2 * E)
    one = counted.device_bytes(MeshShape(), 1, "none")
    assert one["trained weights and moments"] == 12 * trained
    assert one["frozen weights"] == frozen
    assert one["gathered weights"] == 0
    assert one["logits"] == 2 * K * V * 4
    ends = (N + 2 * T) * D * size
    kept = {
        "none": LV * N * ((6 * E + F) * size + HV * 4) + LT * T * ((4 * D + 2 * KV * DH + 2 * G) * size + HT * 4),
        "mlp": LV * N * (6 * E * size + HV * 4) + LT * T * ((4 * D + 2 * KV * DH) * size + HT * 4),
        "full": (LV * N * E + LT * T * D) * size,
    }
    for policy, expected in kept.items():
        assert counted.device_bytes(MeshShape(), 1, policy)["activations"] == expected + ends
    split = counted.device_bytes(MeshShape(data=3, fsdp=4, tensor=2), 24, "none")  # two conversations on each
    unused = UNUSED * (4 * E * E + 2 * E * F)
    into = (LV + UNUSED) * (3 * E + F) + LT * (HT + 2 * KV) * DH + D  # biases of what goes into heads and MLPs
    stream = (LV + UNUSED) * 6 * E + 2 * E + D + LT * 2 * D + D  # biases and norms of the residual stream
    assert 2 * (matrices() + unused + into + stream) == frozen
    assert split["frozen weights"] == 2 * ((matrices() + unused) / 8 + into / 2 + stream)
    assert split["gathered weights"] == size * max(2 * text_layer(), V * D) / 2
    assert split["trained weights and moments"] == 12 * trained / 4
    whole = 2 * size * (LV * N * E + LT * T * D)  # the residual stream, twice a layer, is on each device of `tensor`
    assert split["activations"] == 2 * ((kept["none"] - whole) / 2 + whole + ends)
    assert split["logits"] == 2 * K * V * 4 * 2 / 2


def matrices() -> int:
    """Numbers in all frozen ones of the tiny model that are used, its table of words among them."""
    vision, text = 4 * E * E + 2 * E * F, 2 * D * HT * DH + 2 * D * KV * DH + 3 * D * G
    return LV * vision + LT * text + E * D + D * D + V * D


def text_layer() -> int:
    """Numbers in a layer of the tiny language model, the larger of the two towers'."""
    return 2 * D + (HT + 2 * KV) * DH * (D + 1) + HT * DH * D + 3 * D * G


def test_collectives_by_hand() -> None:
    counted = tiny()
    trained = counted.trained

    def sent(mesh: MeshShape, batch_size: int, remat: str = "none") -> list[float]:
        return [size for _, _, size in counted.collectives(mesh, batch_size, remat).values()]

    assert sent(MeshShape(), 1) == [0, 0, 0]
    assert sent(MeshShape(data=8), 8) == [2 * 7 / 8 * 4 * trained, 0, 0]
    used = 2 * 4 * matrices() + 4 * trained  # forward and backward; the trained part forward alone
    assert sent(MeshShape(fsdp=8), 8) == pytest.approx([2 * 7 / 8 * 4 * trained, 7 / 8 * used, 0])
    narrow = tiny(dtype="bfloat16").collectives(MeshShape(fsdp=8), 8, "none")  # whatever they are held in
    assert narrow["weights"] == (8, 1, pytest.approx(7 / 8 * used / 2))
    assert narrow["gradients"] == (8, 1, 2 * 7 / 8 * 4 * trained)
    untied = tiny(tied=False)  # the table that is only looked up stays where it is
    assert (
        untied.collectives(MeshShape(fsdp=8), 8, "none")["weights"]
        == counted.collectives(MeshShape(fsdp=8), 8, "none")["weights"]
    )
    stream = (LV * N * E + LT * T * D) * 4 * 3  # three conversations
    assert sent(MeshShape(tensor=2), 3) == [0, 0, 2 * 1 / 2 * 4 * stream]
    assert sent(MeshShape(tensor=2), 3, "full") == [0, 0, 2 * 1 / 2 * 5 * stream]


def test_traffic_by_hand() -> None:
    """Count the values read and written between products, per position and layer."""
    counted = tiny()
    q, kv = HT * DH, KV * DH
    # forward: two norms (read, written), two sums (two read, one written); q, k, v; the activation's inputs and result
    vision, text = 10 * E + 2 * 3 * E + 2 * F, 10 * D + 2 * (q + 2 * kv) + 3 * G
    # backward: a gradient more in each; and what is kept, copied there and back: input, q, k, v, attention's output and
    # denominators, the stream between the blocks, and what the activation takes
    back = 10 * E + 2 * 3 * E + 3 * F, 10 * D + 2 * (q + 2 * kv) + 5 * G
    kept = E + 3 * E + E + HV + E + F, D + q + 2 * kv + q + HT + D + 2 * G
    none = LV * N * (vision + back[0] + 4 * kept[0]) + LT * T * (text + back[1] + 4 * kept[1])
    assert counted.traffic(MeshShape(), 1, "none") == 4 * none + 28 * counted.trained
    less = LV * N * F + LT * T * 2 * G
    assert counted.traffic(MeshShape(), 1, "none") - counted.traffic(MeshShape(), 1, "mlp") == 4 * 4 * less
    full = LV * N * (2 * vision + back[0] + 4 * E) + LT * T * (2 * text + back[1] + 4 * D)
    assert counted.traffic(MeshShape(), 1, "full") == 4 * full + 28 * counted.trained


# Batch, seconds, GiB: `python scripts/benchmark.py gpu` on one H200, 2026-11-27 (docs/performance.md).
H200 = {
    ("0.5b", "t1"): [(8, 0.061, 8.5), (32, 0.217, 28.8), (128, 0.849, 110.2)],
    ("0.5b", "t1-16"): [(128, 0.253, 37.8)],
    ("0.5b", "rsfmri"): [(24, 0.458, 52.3)],
    ("7b", "t1"): [(8, 0.341, 37.2), (32, 1.283, 102.0)],
    ("7b", "rsfmri"): [(8, 0.795, 66.0)],
}


@pytest.mark.parametrize(("size", "scan"), H200)
def test_estimates_are_close_to_measurements_on_a_gpu(size: str, scan: str, tmp_path: Path) -> None:
    """Seconds within 25 %, memory within 3 %."""
    run, model = full_size(tmp_path, size, "bfloat16", remat="none")
    modalities = {SCANS[scan].modality: ModalityConfig(size=SCANS[scan].size, patch=SCANS[scan].patch)}
    model = replace(model, modalities=modalities, attention="cudnn")
    run = replace(run, model=replace(run.model, modalities=modalities), data=replace(run.data, max_length=4096))
    counted = count_model(run, model, workload(run, model, 64), "bfloat16")
    for batch_size, seconds, gib in H200[size, scan]:
        found = estimate(counted, parse_devices("h200"), MeshShape(), batch_size, "none")
        assert found.step_seconds == pytest.approx(seconds, rel=0.25)
        assert found.total_bytes / 2**30 == pytest.approx(gib, rel=0.03)


@cache
def one_layer_flops(
    size: str, remat: RematPolicy, *, adapters: bool = False, qwen3: bool = False
) -> tuple[float, float]:
    """Return our count and XLA's of a step at the real widths, one layer per tower and one more that does not run.

    Qwen3 at the width of 0.5b is its 0.6B: 16 heads of 128 numbers, 8 for keys, with norms and without biases.

    XLA counts a loop's body once: the step is lowered without loops.
    """
    lora = LoraConfig(rank=256, targets=("vision_tower", "projector", "language_model")) if adapters else None
    with (
        TemporaryDirectory() as folder,
        mock.patch.object(jax.lax, "scan", partial(jax.lax.scan, unroll=True)),
        mock.patch.object(jax.lax, "map", lambda function, xs: jax.vmap(function)(xs)),
    ):
        run, model = full_size(Path(folder), size, "float32", layers=1, vision_layers=2, remat=remat, lora=lora)
        model = replace(model, vision=replace(model.vision, num_unused_layers=1))
        if qwen3:
            heads = {"head_dim": 128, "num_key_value_heads": 8, "intermediate_size": 3072}
            model = replace(model, text=replace(model.text, qk_norm=True, qkv_bias=False, **heads))
        groups = dict.fromkeys(["patch_embed", *(["lora"] if lora else [])], GroupConfig())
        run = replace(run, model=replace(run.model, lora=lora), train=replace(run.train, groups=groups))
        cost = lowered(run, model, 1).cost_analysis()
        assert cost is not None
        ours = sum(count_model(run, model, workload(run, model, TEXT_TOKENS), "float32").flops(remat).values())
        return ours, cost["flops"]


@pytest.mark.parametrize(
    ("size", "remat"), [pytest.param("0.5b", "none", marks=pytest.mark.slow), ("0.5b", "full"), ("7b", "mlp")]
)
def test_flops_are_xlas(size: str, remat: RematPolicy) -> None:
    ours, xlas = one_layer_flops(size, remat)
    assert ours == pytest.approx(xlas, rel=0.05)


def test_flops_of_qwen3_are_xlas() -> None:
    """With `none`, which recomputes no product in spite of the norms of queries and keys."""
    ours, xlas = one_layer_flops("0.5b", "none", qwen3=True)
    assert ours == pytest.approx(xlas, rel=0.05)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_flops_of_adapters_are_xlas(remat: RematPolicy) -> None:
    """A large rank adds its share to the step."""
    without, theirs_without = one_layer_flops("0.5b", remat)
    with_, theirs_with = one_layer_flops("0.5b", remat, adapters=True)
    assert with_ > 1.3 * without
    assert with_ - without == pytest.approx(theirs_with - theirs_without, rel=0.05)


@pytest.mark.parametrize(
    ("size", "remat", "batch_size"), [pytest.param("0.5b", "none", 1, marks=pytest.mark.slow), ("7b", "full", 4)]
)
def test_bytes_are_xlas(size: str, remat: RematPolicy, batch_size: int, tmp_path: Path) -> None:
    """At the real sizes and depths; compiled, not run. In float32: XLA's CPU makes copies for bfloat16 products."""
    run, model = full_size(tmp_path, size, "float32", remat=remat)
    xla = lowered(run, model, batch_size).compile().memory_analysis()
    assert xla is not None
    ours = count_model(run, model, workload(run, model, TEXT_TOKENS), "float32").device_bytes(
        MeshShape(), batch_size, remat
    )
    lasting = ours["frozen weights"] + ours["trained weights and moments"]
    assert lasting == pytest.approx(xla.argument_size_in_bytes, rel=0.01)
    assert sum(ours.values()) - lasting == pytest.approx(xla.temp_size_in_bytes, rel=0.1)


def test_step_time_is_the_longest_overlapping_part_plus_the_rest() -> None:
    counted = tiny(dtype="bfloat16")
    slow = replace(DEVICE_KINDS["h100"], flops=1e6, bandwidth=1e9, link=1e6, network=1e3)
    devices = replace(parse_devices("h100x8"), kind=slow)
    estimated = estimate(counted, devices, MeshShape(data=4, tensor=2), 4, "none")
    attention, (_, _, stream) = (
        7 * 2 * (LV * N**2 * E + LT * T**2 * HT * DH),  # forward, its scores again, four gradients
        counted.collectives(estimated.mesh, 4, "none")["activations"],
    )
    flops = sum(counted.flops("none").values()) - attention + attention / ATTENTION_EFFICIENCY["xla"]
    assert estimated.seconds["compute"] == pytest.approx(flops * 4 / 8 / (1e6 * PEAK_EFFICIENCY))
    assert estimated.seconds["memory"] == pytest.approx(
        counted.traffic(estimated.mesh, 4, "none") / (1e9 * BANDWIDTH_EFFICIENCY)
    )
    assert estimated.seconds["activations"] == pytest.approx(stream / (1e6 * LINK_EFFICIENCY))
    between = estimated.seconds["compute"] + estimated.seconds["memory"]
    assert estimated.step_seconds == pytest.approx(between + estimated.seconds["activations"])
    slower = estimate(counted, replace(devices, kind=replace(slow, link=1.0)), MeshShape(data=8), 8, "none")
    assert slower.step_seconds == slower.seconds["gradients"] > slower.seconds["compute"]
    assert estimated.samples_per_second == pytest.approx(4 / estimated.step_seconds)
    assert estimated.bottleneck == "compute"


def test_collectives_beyond_the_links_take_the_network() -> None:
    counted, kind = tiny(dtype="bfloat16"), DEVICE_KINDS["h100"]

    def gradients(name: str, **sizes: int) -> float:
        mesh = MeshShape(**sizes)
        return estimate(counted, parse_devices(name), mesh, mesh.parts, "none").seconds["gradients"]

    sent = 4 * counted.trained / LINK_EFFICIENCY
    assert gradients("h100x8", data=8) == pytest.approx(2 * 7 / 8 * sent / kind.link)
    assert gradients("h100x16", data=16) == pytest.approx(2 * 15 / 16 * sent / kind.network)
    # Eight ways of data, but the tensor axis lies within each node: neighbours are two devices apart.
    assert gradients("h100x16", data=8, tensor=2) == pytest.approx(2 * 7 / 8 * sent / kind.network)


@pytest.mark.parametrize("kind", ["v5e", "h100"])
def test_more_devices_are_never_slower_per_conversation(kind: str, tmp_path: Path) -> None:
    run, model = full_size(tmp_path, "0.5b", "bfloat16")
    counted = count_model(run, model, workload(run, model), "bfloat16")
    rates = []
    for count in (1, 2, 4, 8, 16, 64, 256, 512):
        found = estimate(counted, parse_devices(f"{kind}-{count}"), MeshShape(data=count), 8 * count, "mlp")
        rates.append(found.samples_per_second)
    assert rates == sorted(rates)
    assert rates[3] == pytest.approx(8 * rates[0], rel=0.01)


@pytest.mark.parametrize("remat", ["none", "mlp", "full"])
def test_the_largest_batch_is_the_largest(remat: str, tmp_path: Path) -> None:
    run, model = full_size(tmp_path, "7b", "bfloat16")
    counted, devices = count_model(run, model, workload(run, model), "bfloat16"), parse_devices("v5e-16")
    room = devices.kind.room
    found = {mesh: largest_batch(counted, devices, mesh, remat) for mesh in mesh_shapes(16, model, island_size=16)}
    assert found[MeshShape(data=16)] == 0  # 16 GB of weights on each
    assert any(found.values())
    for mesh, batch in found.items():
        assert batch % mesh.parts == 0
        assert not batch or sum(counted.device_bytes(mesh, batch, remat).values()) <= room
        assert sum(counted.device_bytes(mesh, batch + mesh.parts, remat).values()) > room


def test_the_best_comes_first(tmp_path: Path) -> None:
    run, model = full_size(tmp_path, "7b", "bfloat16")
    plan = plan_hardware(run, model, parse_devices("v5e-16"), frozen_dtype="bfloat16", subjects=1000)
    assert {e.mesh.parts for e in plan.configured} == {1, 2}  # the config's batch is 2
    larger = replace(run, train=replace(run.train, batch_size=256))
    mixed = plan_hardware(larger, model, plan.devices, frozen_dtype="bfloat16").configured
    assert {e.fits for e in mixed} == {True, False}
    assert all(e.fits == (e.total_bytes <= 15.75 * 2**30 * (1 - PLAN_ERROR)) for e in mixed)
    for estimates in (plan.configured, plan.largest, mixed):
        assert len({e.mesh for e in estimates}) == len(estimates) > 1
        fitting = [e.samples_per_second for e in estimates if e.fits]
        assert fitting == pytest.approx(sorted(fitting, reverse=True), rel=1e-2)  # rounded: the simpler mesh first
        assert [e.fits for e in estimates] == sorted([e.fits for e in estimates], reverse=True)
    assert all(e.fits for e in plan.largest)
    best = plan.largest[0]
    assert plan.hours(best) == math.ceil(1000 / best.batch_size) * best.step_seconds / 3600
    assert [e.remat for e in plan.policies] == list(KEPT)


def test_a_config_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    run, model = full_size(tmp_path, "0.5b", "bfloat16", remat="none")
    model_config = replace(run.model, remat="none", attention="xla")
    run = replace(run, model=model_config, train=replace(run.train, batch_size=3))
    devices = parse_devices("v5e-2")

    def plan(memory: float, batch_size: int) -> HardwarePlan:
        small = replace(devices, kind=replace(devices.kind, memory=memory, usable=None))
        sized = replace(run, train=replace(run.train, batch_size=batch_size), mesh=MeshConfig(data=2))
        return plan_hardware(sized, model, small, frozen_dtype="bfloat16")

    small = plan(2.6e9, 3)  # 1.7 GB of weights, 0.9 GB of activations where all are kept
    assert (small.configured, small.largest) == ((), ())
    assert [estimated.remat for estimated in small.policies] == ["mlp", "full"]
    assert "batch 3: no mesh of these devices divides it; the next for all is 4" in small.table()
    nothing = plan(1e9, 4)
    assert [estimated.fits for estimated in nothing.configured] == [False]
    for words in ("(too much)", "no conversation fits on any mesh under any remat policy"):
        assert words in nothing.table()
    assert "to train" not in nothing.table()


def test_attention_is_that_of_the_devices(tmp_path: Path) -> None:
    run, model = full_size(tmp_path, "0.5b", "bfloat16")
    run = replace(run, model=replace(run.model, remat="mlp"))

    def plan(devices: str, attention: Any = "auto") -> HardwarePlan:
        asked = replace(run, model=replace(run.model, attention=attention))
        return plan_hardware(asked, model, parse_devices(devices), frozen_dtype="bfloat16")

    plans = {"splash": plan("v5e-1"), "cudnn": plan("h100"), "xla": plan("v5e-1", "xla")}
    for name, planned in plans.items():
        assert planned.model.config.attention == planned.to_json()["attention"] == name
        lines = [line for line in planned.assumptions() if line.startswith("attention is")]
        assert len(lines) == 1
        assert {"splash": "splash", "cudnn": "cuDNN", "xla": "XLA"}[name] in lines[0]
    bytes_ = {name: planned.configured[0].bytes for name, planned in plans.items()}
    assert bytes_["cudnn"] == bytes_["xla"]
    # TPUs keep q, k, v and attention's output for 768 instead of 729 patches and for 896 instead of 793 positions, and
    # the residual stream for 736 and 800
    vision = 26 * (4 * 1152 * (768 - 729) + 2 * 1152 * (736 - 729))
    text = 24 * (4 * 1024 * (896 - 793) + 2 * 1024 * (800 - 793))
    more = bytes_["splash"]["activations"] - bytes_["xla"]["activations"]
    assert more == pytest.approx(2 * run.train.batch_size * (vision + text))
    with pytest.raises(ConfigError, match=r"model\.attention: cudnn is for NVIDIA GPUs"):
        plan("v5e-1", "cudnn")


def test_meshes_are_those_that_divide(tmp_path: Path) -> None:
    _, model = full_size(tmp_path, "0.5b", "bfloat16")
    found = mesh_shapes(64, model, island_size=64)
    assert MeshShape(data=2, fsdp=2, tensor=16) in found
    assert all(m.data * m.fsdp * m.tensor == 64 and m.tensor <= 16 for m in found)  # 16 heads
    grouped = replace(model, text=replace(model.text, num_key_value_heads=2))
    assert {m.tensor for m in mesh_shapes(64, grouped, island_size=64)} == {1, 2, 4, 8, 16}  # kv heads are repeated
    assert max(m.fsdp * m.tensor for m in mesh_shapes(64, model, island_size=8)) == 8


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5x-16", ["v5x-16", "the nearest is v5", "h100x8"]),
        ("h10", ["the nearest is h100"]),
        ("v5e-0", ["v5e-0", "the nearest is v5e"]),
        ("rtx3080x2", ["the nearest is rtx3090"]),
        ("abacus", ["abacus", "expected v4, v5e, v5p, v6e, a100, a100-40gb, h100, h200, l40s", "here or cpu"]),
        ("herex2", ["expected here without a count"]),
        ("v5p-3", ["2 cores per chip", "the next is v5p-4"]),
        ("cpux2", ["expected cpu without a count, which is one device"]),
    ],
)
def test_unknown_devices_are_refused(name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_devices(name)
    for word in words:
        assert word in str(error.value)


def test_names_of_devices() -> None:
    assert (parse_devices("v5e-16").count, parse_devices("h100x8").count, parse_devices("h200").count) == (16, 8, 1)
    assert parse_devices("v5p-64").count == 32  # Google counts TensorCores
    assert (parse_devices("v4-8").count, parse_devices("a100-40").count, parse_devices("a100-40gbx4").count) == (
        4,
        40,
        4,
    )
    assert (parse_devices("rtx3090").count, parse_devices("RTX4090x2").count) == (1, 2)
    assert parse_devices("h100x8").efficiency == PEAK_EFFICIENCY
    own = parse_devices("h100x8", flops=7e14, dtype="float32")
    assert (own.kind.flops, own.efficiency) == (7e14, 1.0)
    with pytest.raises(ConfigError, match="compute_dtype: float32") as error:
        parse_devices("h100x8", dtype="float32", efficiency=1.5)
    assert len(error.value.faults) == 2


# TFLOP/s of dense products with sums in float32, GB, GB/s: as the sheets print them.
SHEETS = {
    "v4": (275, 34.36, 1200, "https://cloud.google.com/tpu/docs/v4"),  # 32 GiB
    "v5e": (197, 16, 819, "https://cloud.google.com/tpu/docs/v5e"),
    "v5p": (459, 95, 2765, "https://cloud.google.com/tpu/docs/v5p"),
    "v6e": (918, 32, 1638, "https://cloud.google.com/tpu/docs/v6e"),
    "a100": (312, 80, 2039, "https://www.nvidia.com/en-us/data-center/a100"),
    "a100-40gb": (312, 40, 1555, "https://www.nvidia.com/en-us/data-center/a100"),
    "h100": (989, 80, 3350, "https://www.nvidia.com/en-us/data-center/h100"),
    "h200": (989, 141, 4800, "https://www.nvidia.com/en-us/data-center/h200"),
    "l40s": (362.05, 48, 864, "https://www.nvidia.com/en-us/data-center/l40s"),
    "rtx6000ada": (1457 / 4, 48, 960, "https://www.nvidia.com/en-us/design-visualization/rtx-6000"),  # sparse float8
    "rtx3090": (71, 24, 936, "GA102 white paper"),
    "rtx4090": (165.2, 24, 1008, "Ada white paper"),
    "rtx5090": (209.5, 32, 1792, "RTX Blackwell white paper"),
    "t4": (8.1, 16, 320, "https://www.nvidia.com/en-us/data-center/tesla-t4"),
}


@pytest.mark.parametrize("name", SHEETS)
def test_plan_prints_the_data_sheet(name: str) -> None:
    assert DEVICE_KINDS.keys() == SHEETS.keys()
    tflops, memory, bandwidth, source = SHEETS[name]
    devices = parse_devices(name, dtype="float32" if name == "t4" else "bfloat16")
    plan = HardwarePlan(
        has_number_loss=True,
        devices=devices,
        model=tiny(),
        frozen_dtype="bfloat16",
        remat="none",
        batch_size=1,
        configured=(),
        largest=(),
        policies=(),
        subjects=None,
    )
    text = " ".join(plan.table().split())
    assert f"each {tflops:.4g} TFLOP/s, {memory:.4g} GB at {bandwidth} GB/s" in text
    assert f"75% of {tflops:.4g} TFLOP/s ({source}" in text
    assert "candidate numbers are not counted" in text
    assert max(map(len, plan.table().splitlines())) <= 80


def test_a_t4_has_no_bfloat16() -> None:
    with pytest.raises(ConfigError, match="peak is of float32; expected --set"):
        parse_devices("t4")


@pytest.mark.parametrize(("name", "fits"), [("v5e", False), ("rtx3090", True), ("rtx4090", True), ("v4", True)])
def test_memory_of_one_device(name: str, fits: bool, tmp_path: Path) -> None:
    """The 7b model has 8.14 billion frozen numbers of two bytes: too many for 16 GB, not for 24 GB."""
    run, model = full_size(tmp_path, "7b", "bfloat16")
    counts = expected_counts("7b", ["T1"])
    trained = counts.pop("patch_embed")
    weights = 2 * sum(counts.values()) + (4 + 8 + 8) * trained  # trained weights, moments and two sums of gradients
    assert 16.2e9 < weights < 16.4e9
    counted = count_model(run, model, workload(run, model), "bfloat16")
    found = estimate(counted, parse_devices(name), MeshShape(), 1, "full")
    assert weights < found.total_bytes < weights + 2e9
    assert found.fits == (weights + 2e9 < 0.9 * SHEETS[name][1] * 1e9) == fits


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(devices_module, "layer_rate", lambda dtype: measured.append(dtype) or 1.5e11)
    monkeypatch.setattr(devices_module, "memory_rate", lambda device: 2e10)
    for name in ("cpu", "here"):  # eight simulated devices are one processor
        found = parse_devices(name, dtype="float32")
        assert (found.kind.flops, found.count, found.efficiency) == (1.5e11, 1, 0.8)
        assert parse_devices(name, flops=2e11).kind.flops == 2e11
    assert measured == ["float32"] * 2


@pytest.mark.parametrize(("kind", "link"), [("NVIDIA L40S", 32e9), ("NVIDIA H200", 450e9), ("NVIDIA B999", 32e9)])
def test_accelerators_here_are_measured(kind: str, link: float, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Mock(jax.Device, platform="gpu", device_kind=kind, compute_capability="9.0")
    device.memory_stats.return_value = {"bytes_limit": 30_000_000_000}
    monkeypatch.setattr(devices_module.jax, "devices", lambda platform: [device, device])
    monkeypatch.setattr(devices_module, "product_rate", lambda dtype, device: 3e14)
    monkeypatch.setattr(devices_module, "memory_rate", lambda device, size: 8e11)
    found = parse_devices("here")
    assert (found.count, found.kind.flops, found.kind.memory, found.kind.bandwidth) == (2, 3e14, 3e10, 8e11)
    assert (found.kind.link, found.kind.attention, found.efficiency) == (link, "cudnn", 1.0)
    assert found.name == f"here ({kind})"


def test_rates_are_measured() -> None:
    device = jax.devices("cpu")[0]
    assert 1e8 < devices_module.product_rate("float32", device, size=128, times=2) < 1e14
    assert 1e7 < devices_module.memory_rate(device, 1 << 16) < 1e13


def test_a_mesh_that_cannot_be_is_refused(tmp_path: Path) -> None:
    run, model = full_size(tmp_path, "0.5b", "bfloat16")

    def plan(text: str, devices: str) -> None:
        mesh = MeshConfig(**parse_mesh(text))
        plan_hardware(replace(run, mesh=mesh), model, parse_devices(devices), frozen_dtype="bfloat16")

    for text, words in {
        "data=8,tensr=1": ["tensr=1: no such axis", "the nearest is tensor"],
        "data=8,fsdp=0": ["fsdp=0: expected fsdp=N once"],
        "data=4": ["are 4 devices; expected sizes whose product is 8"],
        "data=2,tensor=32": ["are 64 devices; expected sizes whose product is 8"],
    }.items():
        with pytest.raises(ConfigError) as error:
            plan(text, "h100x8")
        for word in words:
            assert word in str(error.value)
    with pytest.raises(ConfigError, match=r"mesh\.tensor: 3 does not divide vision heads 16.*the nearest that does: 2"):
        plan("tensor=3", "v5e-9")
    with pytest.raises(ConfigError, match="fsdp=16, tensor=1 are 16 devices, which have to be together"):
        plan("fsdp=16", "h100x16")


def test_the_modality_and_the_length_are_checked() -> None:
    counted = tiny()
    config = RunConfig(model=ModelConfig(modalities={"T1": MODALITY, "dwi": OTHER}))
    assert workload(config, counted.config).modality == "T1"  # the one with the most patches
    named = replace(config, data=DataConfig(modality="dwi"))
    assert (workload(named, counted.config).patches, workload(named, counted.config).patch_dim) == (8, 8)
    with pytest.raises(ConfigError, match=r"'rsfMRI' is not configured; expected T1 \(or sMRI\), dwi"):
        workload(replace(config, data=DataConfig(modality="rsfMRI")), counted.config)
    with pytest.raises(ConfigError, match="--text-tokens 4: expected 8 at least"):
        workload(config, counted.config, 4)
    with pytest.raises(ConfigError, match="max_length 50"):
        workload(replace(config, data=DataConfig(max_length=50)), counted.config, 39)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_hub_config(tmp_path / "base", "0.5b")
    flags = ["plan", "--config", CONFIGS / "t1_0.5b.yaml", "--base", base, "--devices", "v5p-64"]
    table = umbrella(*flags, "--subjects", 40_000)
    for words in ("v5p-64: 32 devices", "2 cores on each", "hours for 40,000", "75% of 459 TFLOP/s", "docs/v5p"):
        assert words in table
    assert max(map(len, table.splitlines())) <= 80
    report = json.loads(umbrella(*flags, "--batch-size", 64, "--json"))
    assert report["batch_size"] == 64
    assert report["configured"][0]["mesh"] == {"data": 32, "fsdp": 1, "tensor": 1}
    assert report["configured"][0]["hours_per_epoch"] is None
    assert sum(report["flops_per_sample"]["floor"].values()) == pytest.approx(2.523e12, rel=1e-3)
    auto = json.loads(umbrella(*flags, "--set", "model.frozen_dtype=auto", "--json"))
    assert auto["frozen_dtype"] == "bfloat16"  # config.json's dtype
    one = json.loads(umbrella(*flags, "--mesh", "fsdp=32", "--json"))
    assert [e["mesh"]["fsdp"] for e in one["largest"]] == [32]
    assert one["configured"] == []
    output = umbrella(*flags, "--mesh", "fsdp=32")
    assert "no mesh of these devices divides it; the next for all is 32" in output
    assert (
        f"to train, the largest: --batch-size {one['largest'][0]['batch_size']} --mesh data=1,fsdp=32,tensor=1"
        in output
    )
    assert cli.main([*map(str, flags[:-1]), "v5z-64"]) == 2
    assert "the nearest is v4" in capsys.readouterr().err


def test_no_weights_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, asked = write_hub_config(tmp_path / "base", "7b"), []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, revision, allow_patterns: asked.append((name, allow_patterns)) or str(base),
    )
    umbrella("plan", "--config", CONFIGS / "t1_7b.yaml", "--devices", "v5e-16")
    ((name, patterns),) = asked
    assert name == "llava-hf/llava-interleave-qwen-7b-hf"
    assert "*.json" in patterns
    assert not any("safetensors" in pattern for pattern in patterns)
