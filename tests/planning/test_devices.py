"""Plans for devices that are not here: of small models, whose numbers are known by hand."""

import dataclasses
import json
import math

import pytest
from helpers import build_config, run_script

from configs import gpt2
from tale_jax.config import Config, change
from tale_jax.planning import devices
from tale_jax.planning.devices import (
    Assumptions,
    Communication,
    CompiledStep,
    DeviceMemory,
    plan_devices,
    print_device_plan,
    throughput,
)
from tale_jax.utils.files import json_line
from tale_jax.utils.subprocesses import ProcessResult

A100 = Assumptions(peak_tflops=312.0, peak_share=0.5, bandwidth=25.0)
STEP = CompiledStep(
    precision="bfloat16",
    parameters=1000,
    memory=DeviceMemory(6 * 10**9, 3 * 10**9, 10**9, weights=10**9, optimizer=2 * 10**9, ema=0),
    matmul_flops=156 * 10**12,
    communication=(
        Communication("all-gather", ("fsdp",), 12, 60 * 10**9, 40 * 10**9),
        Communication("all-reduce", ("data", "fsdp"), 1, 10**10, 10**10),
    ),
    unknown_loops=0,
    compile_seconds=3.0,
    compile_bytes=10**9,
)


def compiles(monkeypatch, step: CompiledStep = STEP) -> None:
    answer = json_line(dataclasses.asdict(step))
    monkeypatch.setattr(devices, "run_module", lambda *_, **__: ProcessResult(f"{answer}\n", ""))


def test_time_on_paper_is_work_by_speed():
    found = throughput(156 * 10**12, 50 * 10**9, tokens=3000, total_steps=86_400, assumptions=A100)
    assert (found.compute_seconds, found.communication_seconds, found.step_seconds) == (1.0, 2.0, 3.0)
    assert (found.tokens_per_second, found.days) == (1000.0, 3.0)
    assert (found.hidden_step_seconds, found.hidden_tokens_per_second, found.hidden_days) == (2.0, 1500.0, 2.0)
    unknown = throughput(156 * 10**12, 0, 3000, None, A100)
    assert unknown.days is unknown.hidden_days is None and unknown.step_seconds == unknown.hidden_step_seconds == 1.0


def test_a_plan_adds_up_and_is_told(monkeypatch, capsys):
    compiles(monkeypatch)
    config = build_config(batch_size=8, total_steps=86_400)
    plan = plan_devices(config, 8, A100, budget=11 * 10**9)
    assert plan.mesh == {"data": 8, "fsdp": 1, "tensor": 1} and plan.step == STEP
    assert plan.matmul_flops == 8 * 156 * 10**12 and plan.sent_bytes == 50 * 10**9
    assert plan.peak_bytes == 10**10 and plan.fits
    assert plan.tokens == 86_400 * plan.tokens_per_step and plan.throughput.days == 3.0
    print_device_plan(plan)
    out = capsys.readouterr().out
    for words in ("8 along data", "156.0 TFLOP of each device", "10.00 GB of 11.00 GB", "It fits", "50.00 GB"):
        assert words in out
    for words in ("1 s, at 50% of 312 TFLOP/s", "2 s, at 25 GB/s", "3.00 days for the run", "2.00 days for the run"):
        assert words in out
    tight = plan_devices(config, 8, A100, budget=9 * 10**9)
    print_device_plan(tight)
    assert not tight.fits and "It does not fit" in capsys.readouterr().out
    compiles(monkeypatch, dataclasses.replace(STEP, unknown_loops=2))
    print_device_plan(plan_devices(change(config, {"total_steps": 0}), 8, A100))
    out = capsys.readouterr().out
    assert "2 loops whose length" in out and "or set total_steps" in out and "days" not in out and "fit" not in out


def test_a_step_that_cannot_be_compiled_is_one_line_and_gets_smaller_as_told(monkeypatch):
    """Here compiling one layer for all is small enough, and of unrolled ones four devices."""

    def run(module, *, stdin, env):
        small = json.loads(stdin)["model"]["scan_layers"] or env["XLA_FLAGS"].endswith("=4")
        return ProcessResult(json_line(dataclasses.asdict(STEP)), "" if small else "signal 9: killed")

    monkeypatch.setattr(devices, "run_module", run)
    config = build_config(batch_size=8)
    with pytest.raises(ValueError, match=r"--devices=8 here \(signal 9: killed\); try ") as error:
        plan_devices(config, 8, A100)
    assert "--config.model.scan_layers=True" in str(error.value) and "fewer devices" in str(error.value)
    assert plan_devices(change(config, {"model.scan_layers": True}), 8, A100).step == STEP
    assert plan_devices(config, 4, A100).step == STEP


@pytest.mark.parametrize("name", ["peak_tflops", "peak_share", "bandwidth"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_speed_is_refused_and_another_number_taken(name, value):
    with pytest.raises(ValueError, match=rf"--{name}=.* must be a positive number; leave it out") as error:
        dataclasses.replace(A100, **{name: value})
    assert len(str(error.value).splitlines()) == 1
    dataclasses.replace(A100, **{name: 0.5})


def test_flags_that_do_not_go_with_devices_are_left_out_as_told():
    flags = ["--config=configs/gpt2.py", "--devices=6", "--config.mesh.fsdp=4"]
    done = run_script("plan", *flags, "--mac")
    assert done.returncode == 2 and "leave --mac out" in done.stderr.splitlines()[-1]
    done = run_script("plan", *flags)  # which is then about the mesh
    assert done.returncode == 2 and "mesh.fsdp=4 times mesh.data=1 must be" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("variant", "parameters"), [("", 123_588_864), ("1b", 1_013_791_232)])
def test_the_recipes_have_the_sizes_that_they_say(variant, parameters):
    config = Config.build(gpt2.get_config(variant))
    model, vocab_size = config.model, config.tokenizer.vocab_size
    layer = 4 * model.embed_dim**2 + 3 * model.embed_dim * model.mlp_dim + 2 * model.embed_dim + 2 * model.head_dim
    assert model.num_layers * layer + (vocab_size + 1) * model.embed_dim == parameters
    assert config.length_known and config.model.scan_layers


SMALL = ["--config=configs/gpt2.py", "--config.model.num_layers=3", "--config.model.embed_dim=64"]
SMALL += ["--config.model.num_heads=4", "--config.model.seq_len=64", "--config.tokenizer.vocab_size=512"]
SMALL += ["--config.precision=float32", "--config.batch_size=16", "--config.micro_batch_size=8"]


@pytest.mark.slow
def test_plan_script_of_eight_devices():
    """The same model with one copy of the weights on each device, and with an eighth of them on each."""
    plans = {}
    for fsdp in (1, 8):
        done = run_script("plan", *SMALL, "--devices=8", f"--config.mesh.fsdp={fsdp}", "--json")
        assert done.returncode == 0, done.stderr
        plans[fsdp] = json.loads(done.stdout.splitlines()[-1])
    whole, shared = plans[1], plans[8]
    parameters = whole["step"]["parameters"]
    assert (whole["mesh"]["data"], shared["mesh"]["fsdp"]) == (8, 8)
    assert whole["step"]["memory"]["weights"] == 4 * parameters
    assert parameters / 2 <= shared["step"]["memory"]["weights"] < 0.6 * parameters
    assert whole["tokens_per_step"] == 16 * 64 and whole["total_steps"] == 19_000
    for plan in (whole, shared):
        assert plan["model_flops"] <= plan["matmul_flops"] < 1.3 * plan["model_flops"]
        assert plan["matmul_flops"] == 8 * plan["step"]["matmul_flops"]
        assert plan["step"]["unknown_loops"] == 0 and plan["fits"]
        assert plan["peak_bytes"] == sum(
            plan["step"]["memory"][part] for part in ("arguments", "temporaries", "results")
        )
    # Gradients are summed in both micro-batches, and a few numbers besides.
    [sums] = [each for each in whole["step"]["communication"] if each["kind"] == "all-reduce"]
    assert sums["axes"] == ["data"] and 2 * 4 * parameters <= sums["array_bytes"] < 1.3 * 2 * 4 * parameters
    # Weights are gathered for each pass, forward and backward, and never activations: these stay where their rows are.
    gathered = sum(each["array_bytes"] for each in shared["step"]["communication"] if each["kind"] == "all-gather")
    assert 2 * 4 * parameters < gathered < 6 * 4 * parameters
    assert shared["sent_bytes"] < 4 * whole["sent_bytes"]
