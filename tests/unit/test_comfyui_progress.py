"""From ComfyUI's messages to a fraction and an ETA, on a clock that the test turns."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from rushes.engines.comfyui.progress import Meter, Timings
from rushes.requests.record import Progress

GRAPH = {
    "37": {"class_type": "UNETLoader", "inputs": {"unet_name": "a"}, "_meta": {"title": "Load weights"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}},
    "57": {
        "class_type": "KSamplerAdvanced",
        "inputs": {"model": ["37", 0], "positive": ["6", 0], "steps": 4, "start_at_step": 0, "end_at_step": 2},
        "_meta": {"title": "High noise"},
    },
    "58": {
        "class_type": "KSamplerAdvanced",
        "inputs": {"latent_image": ["57", 0], "steps": 4, "start_at_step": 2, "end_at_step": 10000},
        "_meta": {"title": "Low noise"},
    },
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["58", 0]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}},
}
SECONDS = {"37": 3.0, "6": 1.0, "57": 10.0, "58": 20.0, "8": 4.0, "9": 2.0}
WHOLE = 40.0
Script = list[tuple[float, str, dict]]


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class Bench:
    """One meter with its clock; plays messages and collects what is told."""

    def __init__(self, timings: Timings, graph: dict = GRAPH, signature: object = "small") -> None:
        self.clock = Clock()
        self.meter = Meter(graph, timings=timings, model="a/b", signature=signature, now=self.clock)
        self.told: list[Progress] = []

    def say(self, type_: str, after: float = 0.0, **data: object) -> Progress | None:
        self.clock.time += after
        progress = self.meter.message(type_, data)
        if progress is not None:
            self.told.append(progress)
        return progress

    def play(self, script: Iterable[tuple[float, str, dict]]) -> None:
        for after, type_, data in script:
            self.say(type_, after, **data)


def running(node: str, value: float = 0.0, most: float = 1.0, *done: str) -> dict:
    """A ``progress_state``, in the form in which ComfyUI 0.3.64 sends it."""

    def state(node_id: str, word: str, value: float, most: float) -> dict:
        maker = node_id.partition(".")[0]
        names = {"node_id": node_id, "display_node_id": maker, "parent_node_id": None, "real_node_id": node_id}
        return {"value": value, "max": most, "state": word, "prompt_id": "p", **names}

    finished = {node_id: state(node_id, "finished", 1.0, 1.0) for node_id in done}
    return {"prompt_id": "p", "nodes": finished | {node: state(node, "running", value, most)}}


def both(cached: tuple[str, ...] = (), seconds: dict[str, float] = SECONDS) -> Script:
    """A run as ComfyUI 0.3.64 tells it: ``progress`` and ``progress_state`` alike."""
    return _run(cached, seconds, old=True, new=True)


def _run(cached: tuple[str, ...], seconds: dict[str, float], *, old: bool, new: bool) -> Script:
    script: Script = [(0.0, "execution_start", {}), (0.0, "execution_cached", {"nodes": list(cached)})]
    waited = 0.0
    done: list[str] = []
    for node, taken in seconds.items():
        if node in cached:
            continue
        if new:
            script.append((waited, "progress_state", running(node, 0.0, 1.0, *done)))
            waited = 0.0
        if old:
            script.append((waited, "executing", {"node": node, "display_node": node}))
        waited = taken
        if node in ("57", "58"):
            for step in (1, 2):
                waited = taken / 2
                if new:
                    script.append((waited, "progress_state", running(node, step, 2, *done)))
                    waited = 0.0
                if old:
                    script.append((waited, "progress", {"node": node, "value": step, "max": 2}))
            waited = 0.0
        done.append(node)
        if node == "9":
            script.append((waited, "executed", {"node": "9", "display_node": "9", "output": {}}))
            waited = 0.0
    return [*script, (waited, "execution_success", {})]


def monotonic(told: list[Progress]) -> bool:
    fractions = [progress.fraction for progress in told]
    return fractions == sorted(fractions) and all(0 <= fraction < 1 for fraction in fractions)


# -- the first run --------------------------------------------------------------------------------------
def test_samplers_weigh_most_and_their_steps_are_told() -> None:
    bench = Bench(Timings())
    assert (False, None, None) == (bench.meter.started(), bench.meter.estimate(), bench.meter.tick())

    assert Progress(stage="starting") == bench.say("execution_start", prompt_id="p")
    assert bench.meter.started()
    assert "Load weights" == bench.say("executing", node="37", display_node="37").stage
    bench.say("executing", node="6", display_node="6")
    assert "CLIPTextEncode" == bench.told[-1].stage
    bench.say("executing", node="57", display_node="57")
    before = bench.told[-1].fraction
    half = bench.say("progress", 5.0, node="57", value=1, max=2)

    assert (1, 2, "High noise", None) == (half.step, half.steps, half.stage, half.eta)
    assert 0.1 > before
    assert 0.2 < half.fraction < 0.35  # half of one of two samplers
    bench.play(_run((), SECONDS, old=True, new=False)[8:])
    assert monotonic(bench.told)
    assert Progress(fraction=0.99, stage="SaveImage", eta=0.0) == bench.told[-1]


def test_the_rate_of_steps_gives_an_eta_at_the_first_run() -> None:
    bench = Bench(Timings())
    bench.say("executing", node="57")
    assert bench.say("progress", 30.0, node="57", value=1, max=20).eta is None  # 30 s of loading weights
    assert 18 * 1.5 + 2 * 1.5 == bench.say("progress", 1.5, node="57", value=2, max=20).eta  # 58 has 2 steps
    bench.clock.time += 1.0
    assert 17 * 1.5 + 0.5 + 2 * 1.5 == bench.meter.estimate()
    bench.clock.time += 100.0
    assert 17 * 1.5 + 2 * 1.5 == bench.meter.estimate()  # a step that takes long is still one step


# -- learned --------------------------------------------------------------------------------------------
def test_from_the_second_run_on_fraction_and_eta_follow_the_time() -> None:
    timings = Timings()
    first = Bench(timings)
    first.play(both())
    first.meter.finished()

    second = Bench(timings, GRAPH | {"37": GRAPH["37"] | {"inputs": {"unet_name": "b"}}, "6": _text("a dog")})
    assert WHOLE == second.meter.estimate()
    start = second.clock.time
    for after, type_, data in both():
        progress = second.say(type_, after, **data)
        passed = second.clock.time - start
        if progress is not None and passed:
            assert abs(progress.fraction - min(0.99, passed / WHOLE)) < 0.001
            assert abs(progress.eta - (WHOLE - passed)) < 0.02
    assert 0.0 == second.meter.estimate()


def test_the_first_steps_of_a_run_do_not_outweigh_earlier_runs() -> None:
    timings = Timings()
    for seconds in (1.0, 5.0):
        bench = Bench(timings, _other())
        bench.say("executing", node="57")
        for value in range(1, 101):
            told = bench.say("progress", seconds, node="57", value=value, max=100)
            if seconds == 5.0 and value == 2:
                assert 98 * 2.0 == told.eta  # one step of 5 s, and three as learned
            if seconds == 5.0 and value == 90:
                assert 10 * 4.8 < told.eta < 10 * 5.0
        bench.meter.finished()


def test_time_alone_moves_a_node_without_steps() -> None:
    timings = Timings()
    first = Bench(timings)
    first.play(both())
    first.meter.finished()

    bench = Bench(timings, _other())
    script = both()
    at = next(
        index for index, (_, type_, data) in enumerate(script) if type_ == "executing" and data["node"] == "8"
    )
    bench.play(script[: at + 1])
    assert 6.0 == bench.told[-1].eta
    assert bench.meter.tick() is None
    bench.clock.time += 3.0
    later = bench.meter.tick()
    assert (3.0, "VAEDecode") == (later.eta, later.stage)
    assert 37 / WHOLE == later.fraction
    bench.clock.time += 60.0
    assert 2.0 == bench.meter.tick().eta  # slower than ever: what is left is the next node's time


def test_cached_nodes_are_done_and_are_foreseen() -> None:
    timings = Timings()
    first = Bench(timings)
    first.play(both())
    first.meter.finished()

    same_weights = Bench(timings, GRAPH | {"6": _text("a dog")})
    assert WHOLE - 3.0 == same_weights.meter.estimate()
    same_weights.say("execution_start")
    same_weights.say("execution_cached", nodes=["37"])
    assert WHOLE - 3.0 == same_weights.meter.estimate()
    assert 0.0 == same_weights.told[-1].fraction
    told_otherwise = Bench(timings, GRAPH | {"6": _text("a dog")})
    told_otherwise.say("execution_start")
    told_otherwise.say("execution_cached", nodes=[])
    assert WHOLE == told_otherwise.meter.estimate()


def test_a_prompt_that_is_cached_whole_ends_at_once() -> None:
    timings = Timings()
    bench = Bench(timings)
    bench.say("execution_start")
    bench.say("execution_cached", nodes=list(GRAPH))
    bench.say("executed", node="9", output={})
    assert 0.99 == bench.say("execution_success").fraction
    bench.meter.finished()
    assert {} == timings.seconds("a/b", "small")


def test_one_slow_run_is_forgotten() -> None:
    timings = Timings()
    for factor in (9.0, 1.0, 1.0, 7.0, 1.0):
        bench = Bench(timings)
        bench.play(both(seconds={node: taken * factor for node, taken in SECONDS.items()}))
        bench.meter.finished()
        if factor == 9.0:
            assert 9 * WHOLE == Bench(timings, _other()).meter.estimate()
        else:
            assert WHOLE == Bench(timings, _other()).meter.estimate()


def test_work_of_another_size_gives_shares_and_no_estimate() -> None:
    timings = Timings()
    first = Bench(timings)
    first.play(both())
    first.meter.finished()

    large = Bench(timings, _other(), signature="large")
    assert large.meter.estimate() is None
    for node in ("37", "6", "57", "58"):
        told = large.say("executing", 50.0, node=node)
    assert (3 + 1 + 10) / WHOLE == told.fraction


def test_quick_work_is_known_beforehand_at_any_size() -> None:
    timings = Timings()
    quick = {node: taken / 1000 for node, taken in SECONDS.items()}
    sizes = []
    for size in ("64x64", "64x80", "64x96"):
        bench = Bench(timings, signature=size)
        sizes.append(bench.meter.estimate())
        bench.play(both(seconds=quick))
        bench.meter.finished()
    assert [None, None] == sizes[:2]
    assert sizes[2] is not None
    assert WHOLE / 1000 - 0.005 <= sizes[2] <= WHOLE / 1000 + 0.005
    # While it runs, too.
    bench = Bench(timings, signature="80x80")
    told = bench.say("execution_start")
    assert told is not None
    assert told.eta is not None
    # One slow run, and it is not quick any more.
    bench = Bench(timings, signature="4096x4096")
    bench.play(both())
    bench.meter.finished()
    assert Bench(timings, signature="96x96").meter.estimate() is None


def test_a_failed_run_teaches_nothing() -> None:
    timings = Timings()
    Bench(timings).play(both()[:6])
    assert Bench(timings).meter.estimate() is None


def test_what_is_learned_is_bounded() -> None:
    timings = Timings()
    for number in range(300):
        timings.learn(f"model-{number % 7}", number, {"1": float(number)}, {})
    assert {} == timings.seconds("model-0", 0)
    assert {"1": 299.0} == timings.seconds("model-5", 299)
    assert 256 == sum(bool(timings.seconds(f"model-{number % 7}", number)) for number in range(300))


# -- what servers send ----------------------------------------------------------------------------------
def test_either_form_of_progress_alone_tells_the_same() -> None:
    final = []
    for old, new in ((True, False), (False, True), (True, True)):
        timings = Timings()
        bench = Bench(timings)
        bench.play(_run((), SECONDS, old=old, new=new))
        bench.meter.finished()
        assert monotonic(bench.told)
        assert any((2, 2, "Low noise") == (told.step, told.steps, told.stage) for told in bench.told)
        final.append({node: taken for node, taken in timings.seconds("a/b", "small").items() if node})
    assert [SECONDS] * 3 == final


def test_nodes_made_at_run_time_are_their_makers() -> None:
    graph = {"12": {"class_type": "Loop", "inputs": {}, "_meta": {"title": "All takes"}}, "9": GRAPH["9"]}
    for script in (
        [
            ("executing", {"node": "12", "display_node": "12"}),
            ("executing", {"node": "12.0.1", "display_node": "12"}),
            ("progress", {"node": "12.0.1", "value": 1, "max": 4}),
            ("executed", {"node": "12.0.1", "display_node": "12", "output": {}}),
            ("executing", {"node": "12.0.3"}),
            ("progress", {"node": "12.0.3", "value": 3, "max": 4}),
        ],
        [("progress_state", running("12.0.1", 1, 4)), ("progress_state", running("12.0.3", 3, 4, "12.0.1"))],
    ):
        timings = Timings()
        bench = Bench(timings, graph)
        for type_, data in script:
            bench.say(type_, 1.0, **data)
        assert ("All takes", 3, 4) == (bench.told[-1].stage, bench.told[-1].step, bench.told[-1].steps)
        assert monotonic(bench.told)
        assert 0.8 < bench.told[-1].fraction < 0.9  # of two passes the first is done and three quarters
        bench.say("executing", node="9", display_node="9")
        bench.meter.finished()
        assert {"12": 2} == timings.passes("a/b", "small")


def test_a_node_that_samples_twice_does_not_go_back() -> None:
    timings = Timings()
    for run in (1, 2):
        bench = Bench(timings, _other())
        bench.say("executing", node="57")
        for _ in range(2):
            for value in range(1, 11):
                bench.say("progress", 1.0, node="57", value=value, max=10)
        assert monotonic(bench.told)
        halfway = bench.told[10]
        assert 10 == halfway.step
        if run == 2:
            assert 10.0 == halfway.eta  # the second pass is foreseen
            assert 0.5 == halfway.fraction
        bench.meter.finished()


def test_a_node_that_waits_for_another_goes_on_later() -> None:
    bench = Bench(Timings())
    bench.say("executing", node="8")
    bench.say("executing", node="6")
    assert "CLIPTextEncode" == bench.told[-1].stage
    first = bench.told[-1].fraction
    bench.say("executing", node="8")
    assert "VAEDecode" == bench.told[-1].stage
    assert first == bench.told[-1].fraction  # one of two is done either way

    states = running("8")
    states["nodes"] |= running("6")["nodes"]
    bench = Bench(Timings())
    bench.say("progress_state", **running("8"))
    bench.say("executing", node="6")
    bench.say("progress_state", **states)
    assert ("CLIPTextEncode", 0.0) == (bench.told[-1].stage, bench.told[-1].fraction)
    bench.say("progress_state", **running("8", 0, 1, "6"))
    assert "VAEDecode" == bench.told[-1].stage


def test_late_and_odd_messages_do_no_harm() -> None:
    bench = Bench(Timings())
    bench.say("executing", node="57")
    bench.say("executing", node="58")
    assert bench.say("progress", node="57", value=1, max=2) is None  # it has ended
    for type_, data in (
        ("progress", {}),
        ("progress", {"value": "x", "max": None, "node": 3}),
        ("progress", {"node": "58", "value": 1, "max": 0}),
        ("progress_state", {}),
        ("progress_state", {"nodes": {"57": None, "nowhere": {"state": "running"}, "58": {}}}),
        ("executing", {"node": None}),
        ("executing", {}),
        ("executed", {}),
        ("execution_cached", {}),
        ("execution_cached", {"nodes": ["nowhere", 5]}),
        ("status", {"status": {}}),
        ("crystools.monitor", {"cpu": 3}),
    ):
        bench.say(type_, **data)
    assert "Low noise" == bench.told[-1].stage
    assert (2, 4) == (bench.say("progress", value=2, max=4).step, bench.told[-1].steps)  # the current node's
    assert monotonic(bench.told)
    bench.say("execution_success")
    assert bench.say("executing", node="57") is None
    assert bench.say("execution_success") is None
    bench.meter.finished()


def test_messages_of_others_kinds_do_not_start_it() -> None:
    timings = Timings()
    bench = Bench(timings)
    assert bench.say("status", status={}) is None
    assert not bench.meter.started()
    bench.meter.finished()
    assert {} == timings.seconds("a/b", "small")


NAMES = st.sampled_from([*GRAPH, "57.0.1", "nowhere", None])
MESSAGES = st.one_of(
    st.tuples(st.just("executing"), st.fixed_dictionaries({"node": NAMES})),
    st.tuples(
        st.just("progress"),
        st.fixed_dictionaries({"node": NAMES, "value": st.integers(0, 9), "max": st.integers(0, 9)}),
    ),
    st.tuples(
        st.just("progress_state"),
        st.builds(
            running,
            st.sampled_from([*GRAPH, "57.0.1"]),
            st.integers(0, 9),
            st.integers(0, 9),
            NAMES.filter(bool),
        ),
    ),
    st.tuples(st.just("execution_cached"), st.fixed_dictionaries({"nodes": st.lists(NAMES)})),
    st.tuples(st.just("executed"), st.fixed_dictionaries({"node": NAMES})),
    st.tuples(st.just("execution_success"), st.just({})),
)


@given(st.lists(st.lists(st.tuples(MESSAGES, st.floats(0, 100)), max_size=20), min_size=1, max_size=3))
def test_whatever_comes_the_fraction_only_grows_and_stays_below_one(runs: list) -> None:
    timings = Timings()
    for run in runs:
        bench = Bench(timings)
        for (type_, data), after in run:
            progress = bench.say(type_, after, **data)
            assert progress is None or progress.eta is None or progress.eta >= 0
        assert monotonic(bench.told)
        bench.meter.finished()


def _text(text: str) -> dict:
    return GRAPH["6"] | {"inputs": {"text": text}}


def _other() -> dict:
    """The same work with nothing that is cached."""
    return (
        GRAPH
        | {"37": GRAPH["37"] | {"inputs": {"unet_name": "b"}}, "6": _text("a dog")}
        | {"9": GRAPH["9"] | {"inputs": {"images": ["8", 0], "filename_prefix": "y"}}}
    )
