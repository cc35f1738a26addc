"""Updates that must not count: a loss or gradient that is no number, and a loss far above those before it.

Such an update is left out inside the jitted step: weights, moments and moving average stay as they were, bit for bit,
and the run goes on with the next batch, as large runs do (PaLM, Chowdhery et al. 2022, section 5.1; OLMo 2, 2025).
"""

from jaxtyping import Array, Bool, Float

from tale_jax.utils.outliers import Recent, is_outlier

WINDOW = 64  # losses remembered, of the steps that counted
MIN_LOSSES = 32  # before any is taken for a spike: a loss that still falls fast tells little
DEVIATIONS, MIN_DEVIATION = 12.0, 0.02  # from the median; one is at least that share of it: late losses hardly move


def is_spike(losses: Recent, loss: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a loss is far above those before it."""
    return is_outlier(losses, loss, DEVIATIONS, MIN_DEVIATION, MIN_LOSSES)
