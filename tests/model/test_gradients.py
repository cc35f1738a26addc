"""Every gradient of our own is that of its forward function, as it stands: a changed forward function is noticed.

A `jax.custom_vjp` keeps its backward pass when somebody puts another activation into its forward pass, and would then
train silently with the gradient of the old one. So each of them is found, wherever it is, and differentiated twice: by
its own rule, and by JAX through its forward function.
"""

import importlib
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT

from tale_jax.model.loss import Head

SOURCES = sorted(path for path in (ROOT / "tale_jax").rglob("*.py") if "custom_vjp" in path.read_text(encoding="utf-8"))


def gradients_in(module) -> dict[str, jax.custom_vjp]:
    """The functions of a module that have a gradient of their own, by name."""
    short = module.__name__.rpartition(".")[2]
    found = {name: f for name, f in vars(module).items() if isinstance(f, jax.custom_vjp)}
    return {f"{short}.{name}": f for name, f in found.items() if f.__module__ == module.__name__}  # not imported ones


def all_gradients() -> dict[str, jax.custom_vjp]:
    found = {}
    for path in SOURCES:
        found |= gradients_in(importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)))
    return found


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.PRNGKey(seed + sum(shape)), shape)


def attention_arguments(length: int, materialize_transposes: bool, causal: bool):
    positions = jnp.arange(length)
    mask = (positions[None, :] <= positions[:, None])[None]
    query, key, value = normal(2, 4, length, 8), normal(2, 2, length, 8, seed=1), normal(2, 2, length, 8, seed=2)
    return query, key, value, mask, materialize_transposes, causal


def loss_arguments(tied: bool, materialize_transposes: bool, dtype=jnp.float32):
    targets = jax.random.randint(jax.random.PRNGKey(0), (2, 16), 0, 40)
    table = normal(40, 24) if tied else normal(24, 40)
    weights = jax.random.uniform(jax.random.PRNGKey(1), (2, 16))
    return normal(2, 16, 24).astype(dtype), table, targets, weights, Head(tied, materialize_transposes)


# Arguments to differentiate at. The product of `matmul` and of its like is taken in both orders of memory.
CASES = {
    "layers.rms_norm": [(normal(3, 5, 16), 1 + 0.1 * normal(16), 1e-5), (1e-3 * normal(3, 16), normal(16), 1e-2)],
    "layers.swiglu": [(3 * normal(4, 16), normal(4, 16, seed=1))],
    "layers.split_heads": [(normal(2, 16, 24), 3, materialize) for materialize in (False, True)],
    "layers.matmul": [
        (normal(2, 16, 24), normal(24, columns), materialize) for materialize in (False, True) for columns in (8, 64)
    ],
    "layers.matmul_transposed": [
        (normal(2, 16, 24), normal(rows, 24), materialize) for materialize in (False, True) for rows in (8, 64)
    ],
    "attention._attend_in_blocks": [
        attention_arguments(length, materialize, causal)
        for length, causal in ((16, False), (16, True), (264, True))
        for materialize in (False, True)
    ],
    "loss.weighted_cross_entropy": [
        loss_arguments(tied, materialize) for tied in (False, True) for materialize in (False, True)
    ],
}
# Of `_attend_in_blocks` only the first result is used with a gradient; the rest is for the backward pass.
RESULTS = {"attention._attend_in_blocks": lambda out: out[0]}
# Its docstring promises no gradient of the weights.
DIFFERENTIATED = {"loss.weighted_cross_entropy": (0, 1)}


def vjp_of(f, name, args) -> tuple[np.ndarray, list[np.ndarray]]:
    """The result of `f`, and the gradients of its arguments of floats for a fixed gradient of the result."""
    result = RESULTS.get(name, lambda out: out)
    floats = DIFFERENTIATED.get(name) or [
        i for i, x in enumerate(args) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
    ]

    def of_floats(*values):
        changed = list(args)
        for i, value in zip(floats, values, strict=True):
            changed[i] = value
        return result(f(*changed))

    out, backward = jax.vjp(of_floats, *(args[i] for i in floats))
    return np.asarray(out), [np.asarray(x) for x in backward(jnp.cos(jnp.arange(out.size)).reshape(out.shape))]


def check(name: str, f: jax.custom_vjp, monkeypatch) -> None:
    """Raises AssertionError where the own gradient, or the value it comes with, is not that of the forward function."""
    for args in CASES[name]:
        value, own = vjp_of(f, name, args)
        with monkeypatch.context() as patch:
            patch.setattr(jax.lax, "optimization_barrier", lambda x: x)  # old JAX cannot differentiate it
            plain_value, plain = vjp_of(f.fun, name, args)
        np.testing.assert_allclose(value, plain_value, rtol=1e-4, atol=1e-5 * np.abs(plain_value).max())
        for mine, wanted in zip(own, plain, strict=True):
            np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_every_gradient_of_our_own_is_checked_here():
    assert set(all_gradients()) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_of_our_own_is_that_of_its_forward_function(name, monkeypatch):
    check(name, all_gradients()[name], monkeypatch)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("layers.swiglu", r"jax\.nn\.silu\(gate", "jax.nn.gelu(gate"),
        ("layers.swiglu", r"\* up\.astype\(jnp\.float32\)\)\.astype\(gate", "* jnp.tanh(up)).astype(gate"),
        ("layers.rms_norm", r"\(wide \* inverse \* scale", "(jnp.tanh(wide * inverse) * scale"),
        ("layers.split_heads", r"return x\.reshape\(batch, length,", "return (2 * x).reshape(batch, length,"),
        ("layers.matmul", r"return product\(x, w\)\n", "return product(jnp.abs(x), w)\n"),
        ("layers.matmul_transposed", r"return product\(x, transpose\(w", "return product(jnp.abs(x), transpose(w"),
        ("attention._attend_in_blocks", r"query \* width\*\*-0\.5\)\.reshape\(batch", "query * 0.3).reshape(batch"),
        ("loss.weighted_cross_entropy", r"return jnp\.sum\(weights \* cross", "return jnp.sum(weights**2 * cross"),
    ],
)  # fmt: skip
def test_a_changed_forward_function_is_noticed(name, old, new, monkeypatch, tmp_path):
    """The source with another forward pass and the same backward pass."""
    module_name, _, function = name.partition(".")
    source, count = re.subn(old, new, (ROOT / "tale_jax" / "model" / f"{module_name}.py").read_text(encoding="utf-8"))
    assert count >= 1
    (tmp_path / f"{module_name}.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"changed_{module_name}", tmp_path / f"{module_name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError):
        check(name, getattr(module, function), monkeypatch)
