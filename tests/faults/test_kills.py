"""SIGKILL at any moment: nothing that was saved is lost, and the run ends with the same bits.

Each process is killed while it stands at a moment that it has reached by itself, or a random time after that, so that
a fast machine is met as often as a slow one. FAULTS=5 does 50.
"""

import collections
import itertools
import random
import shutil
import signal
import time

import pytest
from faults.processes import EVERY_STEPS, RECIPE, SCALE, held, newest_digests, recorded_steps, run

from tale_jax.runs.verify import verify

pytestmark = pytest.mark.faults

KILLS_OF_A_RUN = 5
PARTS = ("preparing", "stepping", "saving", "saving", "deleting")


def test_kills_at_random_moments_lose_at_most_one_interval(counted, tmp_path, tell):
    """While preparing, stepping, saving and deleting; at the end every bit is that of a run left alone."""
    whole, moments = counted
    saves = 40 // EVERY_STEPS
    rng, counts, workdir = random.Random(0), collections.Counter(), tmp_path / "run"
    for _ in range(max(1, round(10 * SCALE / KILLS_OF_A_RUN))):
        for part in ("preparing", *rng.sample(PARTS[1:], k=len(PARTS) - 1)):
            # Of a run: all of preparing, the first two intervals and what is deleted in them.
            share = {"preparing": 1.0, "stepping": 2 / saves}.get(part, 1.5 / saves)
            number = rng.randint(1, max(1, int(moments[part] * share)))
            with held(f"{part}:{number}", "train", *RECIPE, f"--workdir={workdir}") as process:
                if rng.random() < 0.5:  # into what libraries do without Python
                    process.send_signal(signal.SIGCONT)
                    time.sleep(rng.uniform(0, 0.05))
                process.kill()
                process.communicate()
            assert process.returncode == -signal.SIGKILL, part
            counts[part] += 1
        done = run("train", *RECIPE, f"--workdir={workdir}")
        assert done.returncode == 0, done.stderr
        assert newest_digests(workdir) == newest_digests(whole)
        assert not verify(workdir).bad
        steps = recorded_steps(workdir)
        lost = [before - after for before, after in itertools.pairwise(steps) if after < before]
        assert max(lost, default=0) <= EVERY_STEPS + 1, lost  # an interval, and the step that is told one late
        shutil.rmtree(workdir)
    tell(f"{counts.total()} kills ({dict(counts)} of {moments}): all went on, all equal to the bit")
