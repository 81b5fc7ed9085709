"""Budgets: whether a request's cost still fits. Pure."""

import math
from typing import Final

from rushes.queue.base import Take

_NOTHING: Final = 1e-9
"""USD below which two sums are the same: ten times 0.1 is not 1 in binary."""


def check_usd(usd: float) -> float:
    """Raises ValueError where it is no amount of money: negative, infinite, not a number."""
    if not (math.isfinite(usd) and usd >= 0):
        raise ValueError(f"{usd} is no amount in USD")
    return usd


def check_take(take: Take) -> Take:
    """Raises ValueError as :func:`check_usd`."""
    for usd in (take.reserve_usd, take.budget_usd, take.key_budget_usd):
        check_usd(usd)
    return take


def fits(used: float, more: float, budget: float) -> bool:
    """In USD; a budget of 0 is none. What costs nothing fits as long as something is left."""
    return budget == 0 or (used < budget - _NOTHING and used + more <= budget + _NOTHING)


def utc_day(now: float) -> int:
    """The day (UTC) as the number of days since the epoch."""
    return int(now // 86400)
