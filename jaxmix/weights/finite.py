"""Whether all numbers in a large array are finite, at about the speed of reading it."""

from typing import Any

import ml_dtypes
import numpy as np

# (unsigned view, exponent bits): a number is infinite or NaN exactly if all of its exponent bits are set.
_EXPONENTS: dict[np.dtype, tuple[Any, int]] = {
    np.dtype(np.float64): (np.uint64, 0x7FF0_0000_0000_0000),
    np.dtype(np.float32): (np.uint32, 0x7F80_0000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
_CHUNK = 1 << 16  # numbers at a time, so that the scratch memory stays in the cache


def all_finite(array: np.ndarray) -> bool:
    """Return whether a contiguous array holds neither NaN nor infinities; integers always pass.

    The exponent bits are compared as integers, several times faster than `numpy.isfinite` on half precision.
    """
    if array.dtype not in _EXPONENTS:
        return array.dtype.kind in "biu" or bool(np.isfinite(array).all())
    unsigned, exponent = _EXPONENTS[array.dtype]
    bits = array.reshape(-1).view(unsigned)
    mask = unsigned(exponent)
    scratch = np.empty(min(_CHUNK, bits.size), unsigned)
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        if np.bitwise_and(part, mask, out=scratch[: part.size]).max() == mask:
            return False
    return True
