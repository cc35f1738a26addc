"""One process agrees with itself, at once. Two that train together: tests/runs/test_train.py."""

import pytest

from tale_jax.hardware.distributed import any_process, from_main_process, is_main_process, wait_for_processes


def test_one_process_is_the_main_one_and_decides_alone():
    assert is_main_process()
    assert from_main_process(lambda: ["bfloat16", "faster"]) == ["bfloat16", "faster"]
    assert any_process(True) and not any_process(False)
    wait_for_processes()


def test_what_goes_wrong_is_raised():
    with pytest.raises(OSError, match="disk"):
        from_main_process(lambda: (_ for _ in ()).throw(OSError("disk full")))
