"""What holds for the tests of the engine."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """The programs of these tests run for milliseconds: their compilation is what takes time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
