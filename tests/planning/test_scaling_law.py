"""The law of losses: its form, what a fit recovers, whether its interval holds, and the files it is kept in."""

import dataclasses
import json
import math

import numpy as np
import pytest

from tale_jax.planning import scaling_law
from tale_jax.planning.scaling_law import SPREADS, Bootstrap, KnownLaw, LossLaw, Rung, default_law, fit

SIZES = [(0.3e6, 0.7e6), (0.6e6, 0.5e6), (0.6e6, 1e6), (1.1e6, 0.6e6), (1.1e6, 2e6), (2.6e6, 1e6)]  # weights, bytes
TEXT = 1e8


def drawn_law(rng):
    """A law of a text as texts differ."""
    values = zip(dataclasses.astuple(default_law().law), dataclasses.astuple(SPREADS), strict=True)
    return LossLaw(*(value * math.exp(spread * rng.standard_normal()) for value, spread in values))


def measured(law, rng, noise=0.003):
    return [Rung(n, d, TEXT, law.predict(n, d, TEXT) * math.exp(noise * rng.standard_normal())) for n, d in SIZES]


def test_the_law_wants_more_weights_and_more_text_and_new_text_more_than_old():
    law = default_law().law
    assert law.predict(2e6, 1e7, 1e7) < law.predict(1e6, 1e7, 1e7)
    losses = [law.predict(2e6, passes * 1e6, 1e6) for passes in (0.5, 1, 2, 8, 64)]
    assert losses == sorted(losses, reverse=True)
    assert law.predict(2e6, 8e6, 8e6) < losses[3] - 0.01
    assert law.predict(1e30, 1e30, 1e30) == pytest.approx(law.floor)


def test_the_law_is_the_published_form():
    """Within a pass each byte counts once; text that is read for ever is worth (1 + repeats) times its size."""
    law = LossLaw(floor=1.0, size=0.5, size_power=0.5, text=2.0, text_power=1.0, repeats=3.0)
    assert law.predict(4e6, 1e6, 5e6) == pytest.approx(1.0 + 0.5 / 2 + 2.0)
    assert law.predict(4e6, 1e12, 5e6) == pytest.approx(1.0 + 0.5 / 2 + 2.0 / 20)
    assert law.predict(4e6, 2 * 5e6, 5e6) == pytest.approx(1.25 + 2.0 / (5 + 5 * 3 * (1 - math.exp(-1 / 3))))


def test_many_runs_without_noise_give_their_law_back():
    true = LossLaw(1.1, 0.3, 0.38, 0.7, 0.26, 4.0)
    runs = [(n, d, t) for n in (3e5, 1e6, 3e6, 1e7, 1e8) for d in (5e5, 2e6, 8e6, 1e8) for t in (2e6, 1e9)]
    law = fit([Rung(*run, true.predict(*run)) for run in runs], default_law().law, noise=1e-5)
    assert dataclasses.astuple(law) == pytest.approx(dataclasses.astuple(true), rel=0.01)


def test_what_no_run_tells_stays_as_it_was():
    rungs = measured(default_law().law, np.random.default_rng(0), noise=0.0)  # no text is read twice
    start = dataclasses.replace(default_law().law, repeats=7.0)
    assert fit(rungs, start).repeats == pytest.approx(7.0)


def test_a_known_entropy_is_the_floor():
    """Losses that fall steeply, as those of tales: runs alone would allow less than any run can reach."""
    true = LossLaw(floor=0.107, size=0.03, size_power=0.4, text=0.2, text_power=1.0, repeats=5.0)
    rungs = measured(true, np.random.default_rng(5))
    laws = Bootstrap(rungs, draws=20, entropy=true.floor)
    assert laws.law.floor == pytest.approx(true.floor)
    reached = true.predict(9e6, 2e7, TEXT)
    fitted, known = Bootstrap(rungs, draws=20).predict(9e6, 2e7, TEXT), laws.predict(9e6, 2e7, TEXT)
    assert fitted.lower < true.floor <= known.lower <= reached <= known.upper
    assert known.upper - known.lower < 0.5 * (fitted.upper - fitted.lower)
    assert known.bits_per_byte == pytest.approx(reached, rel=0.01)


@pytest.mark.slow
def test_nineteen_of_twenty_laws_lie_in_their_intervals():
    """A run of ten times the largest compute, on twenty texts that differ as texts do."""
    rng, held, off = np.random.default_rng(1), 0, []
    for _ in range(20):
        law = drawn_law(rng)
        found = Bootstrap(measured(law, rng), draws=60).predict(5.3e6, 1e7, TEXT)
        true = law.predict(5.3e6, 1e7, TEXT)
        held += found.lower <= true <= found.upper
        off.append(abs(found.bits_per_byte / true - 1))
    assert held >= 17 and float(np.median(off)) < 0.02
    assert float(np.median(off)) > 0  # it is predicted, not known


def test_the_interval_narrows_with_the_distance():
    laws = Bootstrap(measured(default_law().law, np.random.default_rng(2)), draws=60)
    near, far = laws.predict(1.1e6, 2e6, TEXT), laws.predict(5e7, 9e7, TEXT)
    assert near.lower < near.bits_per_byte < near.upper
    assert near.upper / near.lower < far.upper / far.lower


def test_the_law_of_a_text_is_found_again_and_no_other_text_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_law, "cache_folder", lambda: tmp_path)
    corpus = {"name": "files", "digests": ["a"]}
    assert scaling_law.known_law(corpus) == default_law()
    rungs = measured(default_law().law, np.random.default_rng(3))
    known = KnownLaw(fit(rungs, default_law().law), tuple(rungs), "a text")
    path = scaling_law.law_file(corpus)
    path.parent.mkdir()
    scaling_law.save_law(path, known)
    assert scaling_law.known_law(corpus) == known
    assert scaling_law.known_law({"name": "files", "digests": ["b"]}) == default_law()
    path.write_text(path.read_text()[:-9])
    assert scaling_law.known_law(corpus) == default_law()  # a damaged file is as none


@pytest.mark.parametrize("change", [{"law": {}}, {"law": None}, {"rungs": [1]}, {"law": {"floor": "x"}}])
def test_a_file_without_a_law_is_one_line(tmp_path, change):
    path = tmp_path / "law.json"
    scaling_law.save_law(path, default_law())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"law\.json must hold a law of losses; remove it$"):
        scaling_law.read_law(path)


def test_the_law_that_ships_is_that_of_the_runs_beside_it():
    known = default_law()
    left = scaling_law.residuals(known.law, known.rungs)
    assert len(left) >= 5 and np.abs(left).max() < 0.03
