"""The dtypes that weights are written and read in. Ours are float32; bfloat16 is numpy's by way of ml_dtypes."""

import ml_dtypes
import numpy as np
from jaxtyping import Float

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def cast(name: str, array: Float[np.ndarray, "..."], dtype: str) -> np.ndarray:
    """The array in a dtype of `DTYPES`. Raises ValueError, in one line, where that cannot hold it."""
    with np.errstate(over="ignore"):
        written = array.astype(DTYPES[dtype], copy=False)
    if dtype == "float16" and not np.isfinite(written).all() and np.isfinite(array).all():
        largest = abs(array).max()
        raise ValueError(f"dtype=float16 must hold {name}, whose largest weight is {largest:.3g}; try bfloat16")
    return written
