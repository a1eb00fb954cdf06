"""The training step is compiled for TPUs that are not at hand, by their own compiler."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.config.test_configs import write_hub_config
from tests.helpers.small_run import umbrella
from umbrella_jax import tpu
from umbrella_jax.config.load import load_config
from umbrella_jax.doctor import reference_step
from umbrella_jax.plan import compile_step as compile_module
from umbrella_jax.plan import parse_devices
from umbrella_jax.plan.compile_step import (
    Collective,
    CompiledProgram,
    _torus,
    compile_step,
    count_collectives,
    count_products,
)
from umbrella_jax.plan.flops import workload
from umbrella_jax.sharding import MeshShape

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def test_compiles_a_step_for_two_slices():
    run = load_config(TINY, {"data.modality": "T1"})
    model = replace(reference_step.CONFIG, compute_dtype="bfloat16")
    devices, mesh = parse_devices("v5e-16x2"), MeshShape(data=32)
    program = compile_step(run, model, devices, mesh, 32, workload(run, model), frozen_dtype="bfloat16", hlo=True)
    assert program.fits
    assert program.available_bytes is None
    assert program.bytes["aliased"] > 0.9 * program.bytes["outputs"] > 0  # the old state's memory is used again
    assert program.bytes["temporaries"] > 0
    gradients = sum(4 * size for size in (24, 6 * 24, 24 * 24))  # patch embedding: bias, positions, weight
    assert gradients <= program.collectives["all-reduce"].bytes < 2 * gradients
    assert "splash_mha" in program.hlo  # TPU attention, on a machine whose own is XLA's


ACCEPTED = CompiledProgram(
    compiler="libtpu 1.2.3",
    fits=True,
    seconds=130.0,
    needed_bytes=4_000_000_000,
    available_bytes=None,
    bytes={"arguments": 10**9, "outputs": 10**6, "aliased": 10**6, "temporaries": 3 * 10**9, "code": 10**7},
    flops=1e12,
    bytes_accessed=1e10,
    products={"bf16": 40, "s8": 15},
    collectives={"all-reduce": Collective(count=2, bytes=8_000_000)},
    hlo=None,
)
REFUSED = replace(ACCEPTED, fits=False, needed_bytes=20 * 10**9, available_bytes=16 * 10**9, bytes={}, collectives={})


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            ACCEPTED,
            [
                "accepts it after 2.2 min",
                "temporaries 3.00",
                "at the peak 4.00",
                "all-reduce 2 × 4 MB",
                "40 bf16, 15 s8",
            ],
        ),
        (REFUSED, ["refuses it after 2.2 min: 20.00 of 16.00 GB"]),
    ],
)
def test_plan_shows_the_compilers_figures_beside_its_own(program, words, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_module, "compile_step", lambda *args, **options: program)
    base = write_hub_config(tmp_path / "base", "0.5b")
    flags = ["plan", "--config", TINY.with_name("t1_0.5b.yaml"), "--base", base, "--devices", "v5e-16", "--compile"]
    flags += ["--mesh", "data=16", "--batch-size", 16]
    table = umbrella(*flags)
    for text in [*words, "plan"]:
        assert text in " ".join(table.split())
    assert max(map(len, table.splitlines())) <= 80
    report = json.loads(umbrella(*flags, "--json"))["compiled"]
    assert report["fits"] == program.fits
    assert report["needed_bytes"] == program.needed_bytes
    assert report["mesh"] == {"data": 16, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("devices", "words"),
    [("v5e-16", 'pip install "umbrella-jax[aot]"'), ("a100x8", 'pip install "jax[cuda12]'), ("l40s", "expected v4,")],
)
def test_a_missing_compiler_is_reported_before_the_base_is_read(devices, words, monkeypatch):
    monkeypatch.setattr(compile_module.importlib.util, "find_spec", lambda name: None)
    flags = ["plan", "--config", TINY.with_name("t1_0.5b.yaml"), "--base", "nowhere", "--devices", devices, "--compile"]
    assert words in umbrella(*flags, code=2)


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["v5e-1", "v6e-1"])
def test_frozen_products_are_compiled_in_8_bits(devices):
    """Six in a layer of the tower, two in the projector, seven in a layer of the decoder; loops count once."""
    run = load_config(TINY, {"data.modality": "T1", "model.quantize": "int8", "model.quantize_activations": True})
    model = replace(reference_step.CONFIG, compute_dtype="bfloat16")
    mesh, work = MeshShape(data=1), workload(run, model)
    program = compile_step(run, model, parse_devices(devices), mesh, 2, work, frozen_dtype="bfloat16")
    assert program.products["s8"] >= 6 + 2 + 7
    assert program.products["bf16"] > 6 + 2 + 7  # gradients, attention and head


def test_counts_products_by_the_type_of_their_first_factor():
    hlo = """
      %a = s8[2,3]{1,0} parameter(0)
      b.1 = f8e4m3fn[2,3] parameter(1)
      %c.2 = (s32[2,2]{1,0}, s8[4]) custom-call(%a, %a), custom_call_target="__cublas$lt$matmul", x={}
      %d = (f32[2,2]) custom-call(b.1, %a, %e), custom_call_target="__cublas$lt$matmul$f8"
      ROOT %e = s32[2,2] convolution(%a, %a), window={size=1}
      %f = bf16[2,2] custom-call(%a), custom_call_target="Sharding"
      %g = bf16[2,2] dot(%f, %f)"""
    assert count_products(hlo) == {"bf16": 1, "f8e4m3fn": 1, "s8": 2}


def test_counts_collectives_with_their_results():
    hlo = """
      %all-reduce.1 = (f32[], bf16[2,3]{1,0:T(8,128)(2,1)S(1)}) all-reduce(%a, %b), channel_id=1
      %x = f32[2] get-tuple-element(%all-reduce.1), index=1
      %all-gather-start.2 = bf16[4] all-gather-start(%c)
      %all-gather-done.2 = bf16[4] all-gather-done(%all-gather-start.2)
      %all-gather.3 = pred[5] all-gather(%d)"""
    assert count_collectives(hlo) == {
        "all-gather": Collective(count=2, bytes=8 + 5),
        "all-reduce": Collective(count=1, bytes=4 + 12),
    }


def test_slices_are_as_compact_as_google_offers_them():
    flat = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 256: (16, 16)}
    deep = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4)}
    assert {count: _torus(count, 2) for count in flat} == flat
    assert {count: _torus(count, 3) for count in deep} == deep


@pytest.mark.skipif(tpu.has_chips(), reason="this machine has a TPU")
def test_libtpu_is_silent_on_a_machine_without_a_tpu():
    environment = {name: value for name, value in os.environ.items() if name not in tpu._WITHOUT_TPU}
    script = "from umbrella_jax import tpu; tpu.describe_machine(); import jax; jax.devices()"
    script += "; import os; os.kill(os.getpid(), 15)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-15, "")
