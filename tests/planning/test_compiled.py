"""What is read from compiled programs: small ones, whose products and messages are known by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tale_jax.planning.compiled import Collective, read_work

MESH = {"rows": 2, "columns": 2}
WHOLE = PartitionSpec()
SIZE = 8 * 32 * 4  # bytes of the product [8, 32] in float32


def mesh_of_four() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), tuple(MESH))


def compiled(function, *args, result=WHOLE) -> str:
    """The text of a function compiled for four devices, of arrays of (shape, partition)."""
    placed = functools.partial(NamedSharding, mesh_of_four())
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in args]
    jitted = jax.jit(function, in_shardings=[placed(spec) for _, spec in args], out_shardings=placed(result))
    return jitted.lower(*shapes).compile().as_text()


def product(x, w):
    return x @ w


def contracted(axes) -> list:
    """The two sides of a product [8, 16] by [16, 32] whose sum is split along axes."""
    return [((8, 16), PartitionSpec(None, axes)), ((16, 32), PartitionSpec(axes, None))]


def repeated(function, count: int):
    """`function(x, w)` [8, 16] so many times in a loop, each time of the result of the last one."""

    def run(x, w):
        return jax.lax.fori_loop(0, count, lambda _, x: x + function(x, w)[:, :16], x)

    return run


def test_a_sum_over_four_devices():
    work = read_work(compiled(product, *contracted(("rows", "columns"))))
    assert work.matmul_flops == 2 * 8 * 16 * 32 / 4 and work.unknown_loops == 0
    [only] = work.collectives
    assert (only.kind, only.array_bytes, only.times) == ("all-reduce", SIZE, 1)
    assert only.sent_bytes == 2 * SIZE * 3 / 4  # reduced around the ring, then gathered around it
    assert only.groups == ((0, 1, 2, 3),) and only.axes(MESH) == ("rows", "columns")


@pytest.mark.parametrize(("axis", "groups"), [("rows", ((0, 2), (1, 3))), ("columns", ((0, 1), (2, 3)))])
def test_a_sum_along_one_axis(axis, groups):
    work = read_work(compiled(product, *contracted(axis)))
    assert work.matmul_flops == 2 * 8 * 16 * 32 / 2  # both halves do the same
    [only] = work.collectives
    assert (only.kind, only.array_bytes, only.sent_bytes) == ("all-reduce", SIZE, SIZE)
    assert sorted(only.groups) == sorted(groups) and only.axes(MESH) == (axis,)


def test_a_result_that_is_gathered():
    rows = PartitionSpec(("rows", "columns"))
    work = read_work(compiled(product, ((8, 16), rows), ((16, 32), WHOLE)))
    assert work.matmul_flops == 2 * 8 * 16 * 32 / 4
    [only] = work.collectives
    assert (only.kind, only.array_bytes, only.sent_bytes) == ("all-gather", SIZE, SIZE * 3 / 4)
    assert only.axes(MESH) == ("rows", "columns")


def test_weights_that_are_gathered_for_rows():
    """As FSDP does it: rows of the batch stay where they are, and each device gets the whole of the weights."""

    def function(x, w):
        whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh_of_four(), WHOLE))
        return x @ whole

    spread = PartitionSpec(("rows", "columns"))
    work = read_work(compiled(function, ((8, 16), spread), ((16, 32), spread), result=spread))
    [only] = work.collectives
    assert (only.kind, only.array_bytes, only.sent_bytes) == ("all-gather", 16 * 32 * 4, 16 * 32 * 4 * 3 / 4)


@pytest.mark.parametrize(
    ("kind", "send", "array_bytes", "sent_bytes"),
    [
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "rows", tiled=True), 8 * 4, 8 * 4 / 2),
        ("all-gather", lambda x: jax.lax.all_gather(x, "rows", tiled=True), 2 * 8 * 4, 8 * 4),
        ("all-reduce", lambda x: jax.lax.psum(x, "rows"), 8 * 4, 8 * 4),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "rows", 0, 0, tiled=True), 8 * 4, 8 * 4 / 2),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "rows", [(0, 1), (1, 0)]), 8 * 4, 8 * 4),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "rows", [(0, 1)]), 8 * 4, 8 * 4 / 2),
    ],
)
def test_every_kind_by_hand(kind, send, array_bytes, sent_bytes):
    """Each device has eight numbers, and talks to the one in the other row."""
    try:
        shard_map = jax.shard_map
    except AttributeError:
        from jax.experimental.shard_map import shard_map
    one = PartitionSpec(("rows", "columns"))
    whole = shard_map(send, mesh=mesh_of_four(), in_specs=one, out_specs=one)
    work = read_work(compiled(whole, ((32,), one), result=one))
    [only] = work.collectives
    assert (only.kind, only.array_bytes, only.sent_bytes, only.times) == (kind, array_bytes, sent_bytes, 1)
    assert only.axes(MESH) == ("rows",) and work.matmul_flops == 0


def in_loops(outer: int, inner: int) -> str:
    function = repeated(product, inner)
    nested = (lambda x, w: jax.lax.fori_loop(0, outer, lambda _, x: function(x, w), x)) if outer > 1 else function
    return compiled(nested, *contracted(("rows", "columns")), result=PartitionSpec(None, ("rows", "columns")))


@pytest.mark.parametrize(("outer", "inner"), [(1, 5), (3, 5)])
def test_what_stands_in_a_loop_counts_as_often_as_it_runs(outer, inner):
    once = read_work(compiled(product, *contracted(("rows", "columns"))))
    text = in_loops(outer, inner)
    work = read_work(text)
    assert work.matmul_flops == outer * inner * once.matmul_flops and work.unknown_loops == 0
    sums = [each for each in work.collectives if each.kind == "all-reduce"]
    assert sum(each.times * each.array_bytes for each in sums) == outer * inner * SIZE
    without = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert without != text and read_work(without) == work  # the condition says it, too


def test_a_loop_that_does_not_say_how_often_it_runs_counts_once():
    def run(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x + (x @ w)[:, :16], x)

    work = read_work(compiled(run, *contracted(("rows", "columns"))))
    assert work.unknown_loops == 1 and work.matmul_flops == 2 * 8 * 16 * 32 / 4


# Groups of devices, however XLA writes them; both halves of eight devices, the four columns of [4, 2], and so on.
GROUPS = {
    "{{0,1,2,3},{4,5,6,7}}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "{}": (tuple(range(8)),),
    "[2,4]<=[8]": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "[2,4]<=[4,2]T(1,0)": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "[4,2]<=[2,2,2]T(0,2,1)": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','fsdp'}": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "mesh['data'=2,'fsdp'=4] {'fsdp':(1)2}": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "mesh['data'=2,'fsdp'=4] {'fsdp':(2)2}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "mesh['data'=2,'fsdp'=4] {'data','fsdp':(2)2}": ((0, 1, 4, 5), (2, 3, 6, 7)),
    "mesh['data'=4,'fsdp'=2], device_ids=([2,4]T(1,0)) {'fsdp'}": ((0, 4), (1, 5), (2, 6), (3, 7)),
}
PROGRAM = """HloModule jit_f, entry_computation_layout={{(f32[16]{{0}})->f32[16]{{0}}}}, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}

ENTRY %main (p: f32[16]) -> f32[16] {{
  %p = f32[16]{{0}} parameter(0), metadata={{op_name="a (b"}}
  ROOT %{name} = f32[16]{{0}} {operation}, channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""


@pytest.mark.parametrize(("text", "groups"), GROUPS.items())
@pytest.mark.parametrize("operation", ["all-reduce(%p)", "all-reduce-start(%p)", "all-reduce(f32[16]{0} %p)"])
def test_groups_however_they_are_written(text, groups, operation):
    work = read_work(PROGRAM.format(name="r", operation=operation, groups=text))
    count = len(groups[0])
    assert work.collectives == (Collective("all-reduce", 64, 2 * 64 * (count - 1) / count, groups, 1),)


def test_the_start_and_the_end_of_an_asynchronous_operation_are_one():
    text = PROGRAM.format(name="r", operation="all-gather-start(%p)", groups="{{0,1,2,3},{4,5,6,7}}")
    done = text.replace("ROOT %r = f32[16]{0}", "%r = (f32[16]{0}, f32[64]{0})").replace(
        "\n}\n", "\n  ROOT %done = f32[64]{0} all-gather-done(%r)\n}\n"
    )
    [only] = read_work(done).collectives
    assert (only.kind, only.array_bytes, only.sent_bytes) == ("all-gather", 256, 256 * 3 / 4)
