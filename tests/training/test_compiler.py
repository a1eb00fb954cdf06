"""XLA options are passed on NVIDIA GPUs, as far as jaxlib knows them."""

import pytest

from umbrella_jax.training import compiler
from umbrella_jax.training.compiler import choose_loop, compiler_options


@pytest.fixture(autouse=True)
def _asked_anew():
    compiler_options.cache_clear()
    yield
    compiler_options.cache_clear()


def test_nothing_on_a_cpu():
    assert compiler_options() == {}


def test_gpus_get_the_options_that_this_jaxlib_knows(monkeypatch):
    monkeypatch.setattr(compiler, "native_backend", lambda device: "cudnn")
    monkeypatch.setitem(compiler._CUDA, "xla_gpu_no_such_option", True)
    found = compiler_options()
    assert found["xla_gpu_enable_triton_gemm"] is False
    assert compiler._CUDA.keys() - found.keys() <= {
        "xla_gpu_no_such_option",
        "xla_gpu_enable_dus_accumulator_zero_init_elimination",  # not in jaxlib 0.8.1
    }
    assert "xla_gpu_no_such_option" not in found


def test_other_refusals_are_not_hidden(monkeypatch):
    """An error of ours, such as a value of the wrong type, is raised."""
    monkeypatch.setattr(compiler, "native_backend", lambda device: "cudnn")
    monkeypatch.setitem(compiler._CUDA, "xla_gpu_enable_triton_gemm", "perhaps")
    with pytest.raises(Exception, match="xla_gpu_enable_triton_gemm"):
        compiler_options()


@pytest.mark.parametrize(
    ("requested", "platform", "passes", "cached", "loop", "reason"),
    [
        ("auto", "cpu", 1e6, True, "scanned", "auto: unrolling pays on GPUs"),
        ("auto", "tpu", 1e6, True, "scanned", "auto: unrolling pays on GPUs"),
        ("auto", "gpu", 1234, False, "unrolled", "auto: 1,234 passes per program repay a longer compilation"),
        (
            "auto",
            "gpu",
            300,
            False,
            "scanned",
            "auto: 300 passes per program do not repay a longer compilation, 500 do",
        ),
        ("auto", "gpu", 300, True, "unrolled", "auto: 300 passes per program repay a longer compilation"),
        ("unrolled", "cpu", 1, False, "unrolled", "model.layers names it"),
    ],
)
def test_layers_are_unrolled_where_it_repays(requested, platform, passes, cached, loop, reason):
    assert choose_loop(requested, platform, passes, cached=cached) == (loop, reason)
