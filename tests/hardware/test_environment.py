"""Variables of the environment that keep JAX from starting are named, in one line, before XLA ends the process."""

import fake_plugins
import pytest

START = "import sys; from tale_jax.hardware.backend import start_backend; print(start_backend(sys.argv[1]).platform)"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("XLA_FLAGS", "--foo", "keeps XLA from starting (Unknown flag"),
        ("JAX_PLATFORMS", "nonsense", "JAX_PLATFORMS=nonsense keeps JAX from starting"),
    ],
)
def test_the_variable_is_named(tmp_path, name, value, words):
    code = f"import os; os.environ[{name!r}] = {value!r}; {START}"
    done = fake_plugins.run_python(tmp_path, "-c", code, "cpu")
    assert done.returncode == 1 and words in done.stderr.splitlines()[-1] and name in done.stderr.splitlines()[-1]
