"""The profile of a step: each instruction counts for one part, and containers for none."""

import re

import jax
import jax.numpy as jnp
import pytest
from helpers import build_config

from tale_jax.bench.profile import PARTS, instruction_op_names, part_of, profile
from tale_jax.bench.throughput import Bench

SMALL = {"model.seq_len": 64, "precision": "float32", "tokenizer.vocab_size": 512}


@pytest.fixture(scope="module")
def subject(cpu):
    return Bench(build_config(**SMALL), cpu)


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(train_step)/jvp(Transformer)/blocks/mlp/gate/dot_general", "blocks: products"),
        ("jit(train_step)/transpose(jvp(Transformer))/blocks/attention/query/dot_general", "blocks: products"),
        ("jit(train_step)/jvp(Transformer)/blocks/attention/dot_general", "blocks: attention core"),
        ("jit(train_step)/jvp(Transformer)/blocks/attention/query_norm/mul", "blocks: norms"),
        ("jit(train_step)/jvp(Transformer)/blocks/mlp/jit(silu)/mul", "blocks: rest"),
        ("jit(train_step)/jvp(Transformer)/dot_general", "head and loss"),
        ("jit(train_step)/jvp()/log", "head and loss"),
        ("jit(train_step)/jvp(Transformer)/jit(_take)/gather", "embedding"),
        ("jit(train_step)/mul", "optimizer"),
    ],
)
def test_an_instruction_belongs_to_the_part_its_name_says(op_name, part):
    assert part_of(op_name) == part


def test_containers_are_not_counted_beside_what_they_hold():
    """In a compiled program: the loop is left out, and what runs in it is there, with the name of its operation."""

    def repeated(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ x), x).sum()

    text = jax.jit(repeated).lower(jnp.ones((64, 64))).compile().as_text()
    [loop] = re.findall(r"%?([\w.]+) = [^\n]* while\(", text)
    op_names = instruction_op_names(text)
    assert loop not in op_names
    assert any("while/body" in op_name and "dot_general" in op_name for op_name in op_names.values())


def test_every_instruction_of_a_step_belongs_to_a_part(subject):
    op_names = instruction_op_names(subject.trainer.compile().as_text())
    parts = {part_of(op_name) for op_name in op_names.values()}
    assert parts == {part for part, _ in PARTS}


def test_a_profile_finds_the_parts_of_a_step(subject):
    found = profile(subject)
    shares = {part: row["share"] for part, row in found.record()["profile"].items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert {"blocks: products", "blocks: attention core", "head and loss", "optimizer"} <= set(shares)
    assert set(shares) <= {part for part, _ in PARTS}
    assert [table.row_count for table in found.tables()] == [len(shares), len(found.longest)]
