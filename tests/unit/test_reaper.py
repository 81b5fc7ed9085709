from rushes.worker.reaper import BeatWatch


def test_a_beat_that_stands_still_for_the_patience_is_silent() -> None:
    watch: BeatWatch[str] = BeatWatch(patience=10, interval=2)
    assert [] == watch.look({"a": 1, "b": 1}, now=100)
    for now in range(102, 110, 2):
        assert [] == watch.look({"a": 1, "b": now}, now)
    assert ["a"] == watch.look({"a": 1, "b": 110}, now=110)


def test_a_beat_that_moves_starts_anew() -> None:
    watch: BeatWatch[str] = BeatWatch(patience=4, interval=2)
    watch.look({"a": 1}, now=0)
    watch.look({"a": 1}, now=2)
    assert [] == watch.look({"a": 2}, now=4)
    assert [] == watch.look({"a": 2}, now=6)
    assert ["a"] == watch.look({"a": 2}, now=8)


def test_a_watcher_that_was_away_gives_everybody_the_whole_time_anew() -> None:
    watch: BeatWatch[str] = BeatWatch(patience=10, interval=2)
    watch.look({"a": 1}, now=0)
    assert [] == watch.look({"a": 1}, now=500)
    for now in range(502, 510, 2):
        assert [] == watch.look({"a": 1}, now)
    assert ["a"] == watch.look({"a": 1}, now=510)


def test_what_comes_back_is_new() -> None:
    watch: BeatWatch[str] = BeatWatch(patience=4, interval=2)
    watch.look({"a": 1}, now=0)
    watch.look({}, now=2)
    watch.look({"a": 1}, now=4)
    assert [] == watch.look({"a": 1}, now=6)
    assert ["a"] == watch.look({"a": 1}, now=8)
    watch.forget(["a"])
    assert [] == watch.look({"a": 1}, now=10)
