from rushes.requests.limits import RateLimiter


def test_no_rate_no_limit() -> None:
    limiter = RateLimiter(0)
    assert {0.0} == {limiter.take("key", 0.0) for _ in range(1000)}


def test_a_burst_then_the_rate() -> None:
    limiter = RateLimiter(2.0)
    assert [0.0] * 20 == [limiter.take("key", 5.0) for _ in range(20)]
    assert 0.5 == limiter.take("key", 5.0)
    assert 0.25 == limiter.take("key", 5.25)
    assert 0.0 == limiter.take("key", 5.5)
    assert 0.5 == limiter.take("key", 5.5)
    assert 0.0 == limiter.take("other", 5.5)


def test_slow_rates_still_let_one_through() -> None:
    limiter = RateLimiter(0.01)
    assert 0.0 == limiter.take("key", 0.0)
    assert 100.0 == limiter.take("key", 0.0)
    assert 0.0 == limiter.take("key", 100.0)


def test_memory_is_bounded() -> None:
    limiter = RateLimiter(1.0)
    for number in range(20_000):
        limiter.take(number, float(number))
    assert 10_000 == len(limiter._buckets)
