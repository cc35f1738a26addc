"""Plans beside measurements: which runs are calibrated, what comes back from the other process, and the table."""

import pytest
from helpers import build_config

from tale_jax.planning import calibrate
from tale_jax.utils.subprocesses import run


def test_twelve_runs_around_a_config():
    config = build_config(
        **{"model.embed_dim": 128, "model.num_heads": 4, "model.mlp_dim": 384, "corpus.num_train_tales": 7}
    )
    configs = calibrate.calibration_configs(config)
    assert len(configs) == 12
    assert len({repr(each) for each in configs.values()}) == 12
    for name, each in configs.items():
        half = name.startswith("half")
        assert (each.model.embed_dim, each.model.num_heads) == ((64, 2) if half else (128, 4))
        assert (each.model.mlp_dim == 384) == (not half)
        assert f"remat {each.remat}, {each.precision}, batch {each.batch_size}" in name
        assert each.micro_batch_size == each.batch_size
        assert each.model.scan_layers == (each.remat == "block")
        assert each.corpus == config.corpus


def test_a_run_that_dies_is_a_row(monkeypatch):
    monkeypatch.setattr(calibrate, "run_module", lambda *args, **kwargs: run(["false"]))
    assert calibrate.calibrate(build_config(), "cpu") == {"error": "ended with exit code 1: nothing on stderr"}


def test_the_table_tells_how_far_off_each_plan_was(capsys):
    row = {"predicted_bytes": 1100 * 10**6, "measured_bytes": 10**9, "predicted_step": 0.9, "measured_step": 1.0}
    calibrate.print_calibrations({"one": row, "two": {"error": "ended with signal 9: killed"}})
    out = " ".join(capsys.readouterr().out.split())
    assert "one 1.10 GB 1.00 GB +10.0% 0.900 s 1.000 s -10.0%" in out
    assert "signal 9" in out


@pytest.mark.slow
def test_a_run_is_measured_in_another_process(monkeypatch):
    """Within the bounds of a machine that does other things too; `plan.py --table` says how good it is."""
    monkeypatch.delenv("XLA_FLAGS")  # one device, not those that tests simulate
    result = calibrate.calibrate(build_config(precision="float32", **{"checkpoint.keep": 1}), "cpu")
    assert "error" not in result, result
    assert result["predicted_bytes"] == pytest.approx(result["measured_bytes"], rel=0.3)
    assert result["predicted_bytes"] == result["memory"]["peak"]
    assert result["predicted_step"] > 0 and result["measured_step"] > 0
