"""The suite checks shapes and types by jaxtyping and beartype: in every module of the package, in every process."""

import importlib

import jax.numpy as jnp
import pytest
from helpers import ROOT

from tale_jax.model.layers import swiglu
from tale_jax.utils.format import format_bytes

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "tale_jax").rglob("*.py"))
]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_checked(name):
    if name.endswith(".ray_tune"):
        pytest.importorskip("ray", reason="an extra: make env EXTRAS=dev,ray")
    spec = importlib.import_module(name).__spec__
    assert spec is not None and type(spec.loader).__module__.startswith("jaxtyping")


def test_a_wrong_shape_and_a_wrong_type_are_refused():
    with pytest.raises(Exception, match="Type-check error"):
        swiglu(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(Exception, match="Type-check error"):
        format_bytes("text")  # pyright: ignore[reportArgumentType]
