"""Operations that a Metal plugin lacks, and shapes that it refuses, are found in the StableHLO of a program."""

import jax
import jax.numpy as jnp
import pytest

from tale_jax.hardware.stablehlo import check_program, known_operations


def lowered(function, *args, platform="METAL"):
    return function.trace(*args).lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")


@pytest.mark.parametrize(
    ("function", "shapes", "fault"),
    [
        (lambda x: jnp.linalg.cholesky(x), [(4, 4)], "is not among the operations that the plugin names"),
        (lambda x, y: jnp.einsum("bij,bijk->bk", x, y), [(2, 3, 4), (2, 3, 4, 5)], "contracts more than one dimension"),
        (lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (2,), (1,), "VALID"), [(8,)], "only known to work for"),
        (lambda x: x * (1 + 1j), [(3,)], "has a 64-bit tensor, tensor<3xcomplex<f32>>"),
    ],
    ids=["operation", "batched dot", "window", "complex"],
)
def test_what_a_plugin_lacks_is_found(function, shapes, fault):
    program = check_program("demo", lowered(jax.jit(function), *map(jnp.ones, shapes)), "METAL")
    assert any(fault in line for line in program.faults), program.faults


def test_the_lists_are_lists_of_operations():
    lists = known_operations()
    assert set(lists) == {"METAL", "mps", "assumed"}
    assert "stablehlo.dot_general" in lists["METAL"] & lists["mps"]
    assert not lists["assumed"] & (lists["METAL"] - {"chlo.erf", "chlo.erf_inv", "chlo.next_after"})


def test_operations_are_counted_and_a_sound_program_has_no_fault():
    program = check_program(
        "demo", lowered(jax.jit(lambda x, y: jnp.tanh(x @ y) + y * y), *[jnp.ones((4, 4))] * 2), "mps"
    )
    assert (program.name, program.faults, program.num_assumed) == ("demo", (), 0)
    assert {name: program.operations[f"stablehlo.{name}"] for name in ("dot_general", "tanh", "add", "multiply")} == {
        "dot_general": 1, "tanh": 1, "add": 1, "multiply": 1
    }  # fmt: skip


def test_what_jax_is_assumed_to_lower_is_counted_apart():
    program = check_program("demo", lowered(jax.jit(jax.lax.erf), jnp.ones(3), platform="mps"), "mps")
    assert program.num_assumed == 1 and not program.faults


def test_a_loop_counts_once_with_what_is_in_it():
    def repeated(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x), x)

    program = check_program("demo", lowered(jax.jit(repeated), jnp.ones(3)), "METAL")
    assert program.operations["stablehlo.while"] == program.operations["stablehlo.sine"] == 1
