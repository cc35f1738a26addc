"""The dtype check: it runs the step of a run, finds what is wrong in it, and its result decides the precision."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tale_jax.hardware import machine
from tale_jax.model import loss
from tale_jax.planning import numerics
from tale_jax.planning.numerics import DTYPES, DtypeCheck, check_dtype, check_dtypes, choose_precision
from tale_jax.training import muon, step


@pytest.fixture(scope="module")
def reference(cpu):
    """The initial weights of the check, and the results of float32 on the CPU that others are compared with."""
    computed = []
    with pytest.MonkeyPatch.context() as patch:
        compute = numerics._compute
        patch.setattr(numerics, "_compute", lambda *args: computed.append((args[2], compute(*args))) or computed[-1][1])
        patch.setattr(numerics, "_tokens_per_second", lambda backend, dtype: 1.0)
        check = check_dtype(cpu, "float32")
    assert (check.correct, check.reason, check.decode_error, check.tokens_per_second) == (True, "", 0.0, 1.0), check
    assert len(computed) == 2
    return computed[0]


@pytest.fixture
def quick(monkeypatch, reference):
    """Checks compute what they check, but take the reference from before, and time nothing."""
    compute, calls = numerics._compute, []

    def patched(*args):
        calls.append(args)
        return compute(*args) if len(calls) % 2 == 0 else reference[1]

    monkeypatch.setattr(numerics, "_compute", patched)
    monkeypatch.setattr(numerics, "_tokens_per_second", lambda backend, dtype: 1.0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", [pytest.param(d, marks=[pytest.mark.slow] * (d == "float16")) for d in DTYPES])
def test_this_cpu_is_numerically_correct(cpu, dtype):
    check = check_dtype(cpu, dtype)
    assert (check.correct, check.reason) == (True, ""), check
    assert (check.decode_error == 0) == (dtype == "float32")
    assert 0 < check.loss_error < check.gradient_error or dtype == "float32"


def in_bfloat16(wrong):
    """A function that is `wrong` where it is given bfloat16, as a broken backend may be, and right elsewhere."""

    def patch(right):
        def patched(*args):
            half = any(x.dtype == jnp.bfloat16 for x in jax.tree_util.tree_leaves(args) if hasattr(x, "dtype"))
            return wrong(right(*args)) if half else right(*args)

        return patched

    return patch


@pytest.fixture
def broken_loss_gradient():
    """The gradient of the loss that training uses, of twice its size in bfloat16."""

    @in_bfloat16(lambda gradients: (2 * gradients[0], 2 * gradients[1], None, None))
    def backward(*args):
        return loss._backward(*args)

    loss.weighted_cross_entropy.defvjp(loss._forward, backward)
    yield
    loss.weighted_cross_entropy.defvjp(loss._forward, loss._backward)


@pytest.mark.usefixtures("quick", "broken_loss_gradient")
def test_a_wrong_gradient_of_the_loss_is_found(cpu):
    check = check_dtype(cpu, "bfloat16")
    assert not check.correct
    assert check.gradient_error == pytest.approx(1.0, abs=0.1)
    assert "relative errors: loss" in check.reason and "gradient 1.0e+00" in check.reason


@pytest.mark.usefixtures("quick")
def test_a_wrong_optimizer_is_found(cpu, monkeypatch):
    right = muon.newton_schulz
    monkeypatch.setattr(muon, "newton_schulz", lambda *args, **kwargs: 1.5 * right(*args, **kwargs))
    check = check_dtype(cpu, "float32")
    assert not check.correct
    assert check.update_error > 0.02 and check.gradient_error < 1e-5


@pytest.mark.usefixtures("quick")
def test_the_check_takes_the_step_of_a_run_once(cpu, monkeypatch):
    steps = []
    right = step.Trainer.step

    def counted(self, state, windows):
        steps.append((self.model.dtype, windows.shape))
        return right(self, state, windows)

    monkeypatch.setattr(step.Trainer, "step", counted)
    check_dtype(cpu, "bfloat16")
    shape = (numerics.CHECKED_CONFIG.batch_size, numerics.CHECKED_CONFIG.model.seq_len + 1)
    assert steps == [(jnp.bfloat16, shape)]


@pytest.mark.parametrize("part", ["loss", "gradient", "update", "decode"])
def test_each_part_decides_and_what_is_no_number_is_not_correct(cpu, monkeypatch, reference, part):
    max_error = numerics.MAX_ERROR["bfloat16"] * numerics.ERROR_FACTORS[part]
    monkeypatch.setattr(numerics, "_tokens_per_second", lambda backend, dtype: 1.0)
    for factor, correct in ((1 + 0.9 * max_error, True), (1 + 1.1 * max_error, False), (float("nan"), False)):
        factors = iter([1.0, factor])  # of the reference, and of what is checked

        def patched(*args, factors=factors):
            return reference[1] | {part: np.asarray(reference[1][part] * next(factors))}

        monkeypatch.setattr(numerics, "_compute", patched)
        check = check_dtype(cpu, "bfloat16")
        assert check.correct == correct == (check.reason == "")
        assert correct or f"{part} " in check.reason
        assert (getattr(check, f"{part}_error") is None) == (factor != factor)
        assert json.dumps(dataclasses.asdict(check), allow_nan=False)


def test_the_gradient_is_all_of_it(cpu, reference):
    """What is compared has as many numbers as the model has weights: no moment is left out, none is counted twice."""
    initial, results = reference
    num_weights = sum(leaf.size for leaf in jax.tree_util.tree_leaves(initial.params))
    assert results["gradient"].size == results["update"].size == num_weights


def check_of(dtype: str, correct: bool, rate: float) -> DtypeCheck:
    return DtypeCheck(dtype, correct, "" if correct else "it aborts", tokens_per_second=rate)


@pytest.mark.parametrize(
    ("checks", "dtype"),
    [
        ([check_of("float32", True, 100), check_of("bfloat16", True, 200)], "bfloat16"),
        ([check_of("float32", True, 100), check_of("bfloat16", True, 105)], "float32"),
        ([check_of("float32", True, 100), check_of("bfloat16", False, 900)], "float32"),
    ],
)
def test_auto_takes_the_fastest_correct_dtype(cpu, monkeypatch, checks, dtype):
    monkeypatch.setattr(numerics, "check_dtypes", lambda backend: checks)
    chosen, reason = choose_precision(dataclasses.replace(cpu, platform="metal"), "auto")
    assert chosen == jnp.dtype(dtype) and "float32 100" in reason
    assert ("bfloat16 is not correct: it aborts" in reason) == (not checks[1].correct)


def test_a_dtype_asked_for_must_be_correct(cpu, monkeypatch):
    metal = dataclasses.replace(cpu, platform="metal")
    monkeypatch.setattr(
        numerics, "check_dtypes", lambda backend: [check_of("float32", True, 1), check_of("bfloat16", False, 1)]
    )
    rule = "must be numerically correct on metal, but is not"
    message = rf"^precision=bfloat16 {rule} \(it aborts\); try --config.precision=float32$"
    with pytest.raises(ValueError, match=message):
        choose_precision(metal, "bfloat16")
    assert choose_precision(metal, "float32")[0] == jnp.float32
    monkeypatch.setattr(numerics, "check_dtypes", lambda backend: [check_of("float32", False, 1)])
    with pytest.raises(
        ValueError, match=r"finds no dtype .* on metal \(float32: it aborts\); try --config.backend.platform=cpu"
    ):
        choose_precision(metal, "auto")
    with pytest.raises(ValueError, match=r"precision=float32 must be .* try --config.backend.platform=cpu"):
        choose_precision(metal, "float32")


@pytest.mark.parametrize(("peak", "dtype"), [(3e11, "bfloat16"), (1.2e11, "float32"), (5e10, "float32")])
def test_a_cpu_takes_the_dtype_of_the_faster_products_and_is_not_checked(cpu, monkeypatch, peak, dtype):
    monkeypatch.setattr(numerics, "check_dtypes", lambda backend: pytest.fail("checked"))
    monkeypatch.setattr(numerics, "matmul_peak", lambda name: {"float32": 1e11, "bfloat16": peak}[name])
    chosen, reason = choose_precision(cpu, "auto")
    assert chosen == jnp.dtype(dtype) and "float32 100 GFLOP/s" in reason
    assert choose_precision(cpu, "bfloat16") == (jnp.dtype("bfloat16"), "as the config says")


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """The dtypes that another process was asked to check; the cache is in a folder that does not exist yet."""
    checked = []

    def check(platform, dtype):
        checked.append(dtype)
        return check_of(dtype, True, 1.0)

    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(numerics, "_check_in_subprocess", check)
    return checked


def test_results_are_cached_for_these_versions(cpu, monkeypatch, checked):
    first = check_dtypes(cpu)
    assert check_dtypes(cpu) == first == [check_of(dtype, True, 1.0) for dtype in DTYPES]
    assert checked == list(DTYPES)
    check_dtypes(cpu, fresh=True)
    assert len(checked) == 2 * len(DTYPES)
    version = machine.version
    monkeypatch.setattr(machine, "version", lambda name: "9.9" if name == "jax" else version(name))
    check_dtypes(cpu)
    check_dtypes(dataclasses.replace(cpu, device="another"))
    monkeypatch.setattr(numerics, "CHECK_VERSION", 10**6)
    check_dtypes(cpu)
    assert len(checked) == 5 * len(DTYPES)


@pytest.mark.parametrize("content", ["", "{", '[{"dtype": "float32"}]', '[{"new": 1}]'])
def test_a_damaged_cache_is_replaced(cpu, tmp_path, checked, content):
    check_dtypes(cpu)
    [file] = (tmp_path / "cache" / "dtypes").iterdir()
    whole = file.read_text()
    file.write_text(content)
    assert check_dtypes(cpu) == [check_of(dtype, True, 1.0) for dtype in DTYPES]
    assert file.read_text() == whole


def test_a_cache_that_cannot_be_written_does_no_harm(cpu, tmp_path, checked):
    (tmp_path / "cache").write_text("a file where the folder would be")
    for _ in range(2):
        assert [check.dtype for check in check_dtypes(cpu)] == list(DTYPES)
    assert len(checked) == 2 * len(DTYPES)


def test_a_check_that_aborts_is_a_result(monkeypatch):
    monkeypatch.setattr(numerics, "run_module", lambda *args, **kwargs: machine.run(["false"]))
    check = numerics._check_in_subprocess("cpu", "float32")
    assert check == DtypeCheck("float32", False, "the check ended with exit code 1: nothing on stderr")


@pytest.mark.slow
def test_another_process_checks_and_times(cpu):
    check = numerics._check_in_subprocess("cpu", "float32")
    assert check.correct and check.decode_error == 0 and check.tokens_per_second > 1
