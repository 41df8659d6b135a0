"""Stochastic rounding to dtypes below float32."""

from __future__ import annotations

import torch
from torch import Tensor

# How many of float32's mantissa bits the narrower types lack, where both are normal numbers.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}

NARROW = tuple(_DROPPED_BITS)

# Below its smallest normal number, 2**-14, float16 has a fixed spacing of 2**-24. bfloat16 has
# the exponents of float32.
_HALF_NORMAL = 2.0**-14
_HALF_SPACING_BITS = 24
_FRACTION_BITS = 20


def stochastic_round(values: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round to a neighbour in ``dtype``, up with the probability that makes the mean exact.

    A value between neighbours a < b becomes b with probability (value - a) / (b - a) over uniform
    ``random``; a value that ``dtype`` can hold does not change. For given bits the function is
    monotone: a larger value is never rounded lower.
    (Gupta et al. 2015, arXiv 1502.02551, section 3.1.)

    Args:
        values: float32.
        dtype: torch.bfloat16 or torch.float16.
        random: 32 random bits for each value, in an integer tensor of the same shape (higher bits
            do not matter).

    Returns:
        a tensor of ``dtype``. nan and infinities stay; a value beyond the largest finite one rounds
        to that or to infinity.
    """
    dropped = _DROPPED_BITS[dtype]
    mask = (1 << dropped) - 1
    # The bits of a float order its magnitudes: a carry goes to the next number away from zero.
    bits = random.to(torch.int32).bitwise_and_(mask).add_(values.view(torch.int32))
    rounded = bits.bitwise_and_(~mask).view(torch.float32)
    if dtype == torch.float16:
        size = values.abs()
        fixed = (size.clamp(max=_HALF_NORMAL) * 2.0 ** (_HALF_SPACING_BITS + _FRACTION_BITS)).long()
        fixed = (fixed + (random & ((1 << _FRACTION_BITS) - 1))) >> _FRACTION_BITS
        small = (fixed.to(torch.float32) * 2.0**-_HALF_SPACING_BITS).copysign(values)
        rounded = torch.where(size < _HALF_NORMAL, small, rounded)
    return torch.where(values.isfinite(), rounded, values).to(dtype)
