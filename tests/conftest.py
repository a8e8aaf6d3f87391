"""Settings that every test runs under."""

import os
import tempfile

# Before JAX starts a backend: several devices, so that a test can shard over them. Small programs
# compile faster in one piece.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_cpu_parallel_codegen_split_count=1"
)

# What one process has compiled, the others load: two of them run tests, and some run the examples.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="jaxsoftmax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import gc

import hypothesis
import jax
import pytest

# Tracing makes objects by the million, and few of them in cycles.
gc.freeze()
gc.set_threshold(100_000, 20, 50)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# HYPOTHESIS_PROFILE=nightly looks ten times as long, at every case of the large tables, and at all slow
# tests.
hypothesis.settings.register_profile("default", max_examples=200, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(config, items):
    """Leaves slow tests out, unless -m says which to take or it is night."""
    if config.option.markexpr or os.environ.get("HYPOTHESIS_PROFILE") == "nightly":
        return
    left_out = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def standard_promotion():
    """For other libraries, whose arithmetic mixes integers and floats, vectors and rows."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def key():
    return jax.random.key(20)
