"""From ComfyUI's messages about one prompt to how far it is, and how long it will yet take. Pure: the clock
is given.

ComfyUI tells which node runs (``executing``, ``progress_state``) and how many steps of it are done
(``progress``, ``progress_state``; newer servers send only the latter), nothing of time. Time is learned: how
many seconds each node took when the same model last did work of the same size. Until then samplers, which
take nearly all of the time, weigh more than other nodes, and their steps' rate gives the rest.
"""

import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final

from rushes.catalog.workflow import Graph
from rushes.requests.record import Progress

_MOST: Final = 0.99
"""The fraction of a prompt that has not ended."""
_SAMPLER_WEIGHT: Final = 30.0
"""What a sampler counts among nodes of which no time is known; the others count 1."""
_ALMOST: Final = 0.95
"""How far a node without steps gets by its learned time alone."""
_LEARNED_STEPS: Final = 3.0
"""How many steps of a run what was learned counts as."""
_KEPT_RUNS: Final = 3
_QUICK_SECONDS: Final = 0.5
_QUICK_RUNS: Final = (2, 8)
"""A model whose last so many runs (at least, at most) were all this short is taken to be quick at any size."""
_KEPT_WORKS: Final = 256
_READ: Final = frozenset(
    {
        "execution_start",
        "execution_cached",
        "executing",
        "executed",
        "progress",
        "progress_state",
        "execution_success",
    }
)
"""The messages that say how far a prompt is."""
_SAMPLED: Final = frozenset({"steps", "latent_image", "samples"})
"""One of these inputs tells a node that samples from one that only says how (``KSamplerSelect``)."""
_STARTING: Final = "starting"
_AROUND: Final = ""
"""In place of a node's id: the time before the first node."""


class _Work:
    """What is known of one model's work of one size, by node."""

    def __init__(self) -> None:
        self.seconds: dict[str, deque[float]] = {}
        self.passes: dict[str, int] = {}


class Timings:
    """What was learned of the time that nodes take, for one ComfyUI. Not kept beyond the process."""

    def __init__(self) -> None:
        self._works: OrderedDict[tuple[str, Hashable], _Work] = OrderedDict()
        self._latest: dict[str, Hashable] = {}
        self._totals: dict[str, deque[float]] = {}
        self._held: frozenset[int] = frozenset()

    def quick(self, model: str) -> float | None:
        """Seconds of the longest of the model's last runs where all of them were quick, whatever their size; else
        None. For short work of ever new sizes, which would otherwise never be known beforehand.
        """
        totals = self._totals.get(model, ())
        longest = max(totals, default=_QUICK_SECONDS)
        return longest if len(totals) >= _QUICK_RUNS[0] and longest < _QUICK_SECONDS else None

    def seconds(self, model: str, signature: Hashable) -> dict[str, float]:
        """Seconds by node of this very work; empty where it was never seen.

        The lower median of the last runs: the first run's share of loading weights goes after the second, and
        one slow run changes nothing.
        """
        work = self._works.get((model, signature))
        return {node: statistics.median_low(taken) for node, taken in work.seconds.items()} if work else {}

    def passes(self, model: str, signature: Hashable) -> dict[str, int]:
        """How often the nodes of this work went through their steps."""
        work = self._works.get((model, signature))
        return work.passes if work else {}

    def shares(self, model: str) -> dict[str, float]:
        """Seconds by node of the model's latest work of another size: their proportions are of use."""
        return self.seconds(model, self._latest[model]) if model in self._latest else {}

    def learn(
        self, model: str, signature: Hashable, seconds: Mapping[str, float], passes: Mapping[str, int]
    ) -> None:
        """Add a run that went well. Nodes that did not run (cached ones) keep what is known of them."""
        key = (model, signature)
        work = self._works.setdefault(key, _Work())
        self._works.move_to_end(key)
        for node_id, taken in seconds.items():
            work.seconds.setdefault(node_id, deque(maxlen=_KEPT_RUNS)).append(taken)
        work.passes.update(passes)
        self._totals.setdefault(model, deque(maxlen=_QUICK_RUNS[1])).append(sum(seconds.values()))
        self._latest[model] = signature
        while len(self._works) > _KEPT_WORKS:
            (old_model, old), _ = self._works.popitem(last=False)
            if self._latest.get(old_model) == old:
                del self._latest[old_model]

    def hold(self, prints: Mapping[str, int]) -> None:
        """Note the graph that ran last. ComfyUI keeps its results, and of no earlier one's."""
        self._held = frozenset(prints.values())

    def holds(self, print_: int) -> bool:
        """Whether ComfyUI probably has the result of a node with this fingerprint."""
        return print_ in self._held


class _Steps:
    """The steps of one node: one pass over 1 … max, or several, as nodes have that sample more than once."""

    def __init__(self, usual_passes: int) -> None:
        self.source = ""
        self.value = self.most = 0.0
        self.passes = 0
        self._usual = usual_passes
        self.first = self.last = (0.0, 0.0)
        """Step and time of the pass's first and last message: before the first lies the loading of weights."""

    def update(self, source: str, value: float, most: float, now: float) -> None:
        if not self.passes or source != self.source or most != self.most or value < self.value:
            self.source, self.most = source, most
            self.passes += 1
            self.first = self.last = (value, now)
        elif value != self.value:
            self.last = (value, now)
        self.value = value

    @property
    def rate(self) -> float | None:
        """Seconds a step in this pass; None before the second step."""
        steps = self.last[0] - self.first[0]
        return (self.last[1] - self.first[1]) / steps if steps > 0 else None

    @property
    def fraction(self) -> float:
        """Where the number of passes is not known, the last one is taken to be running."""
        done = self.passes - 1 + min(1.0, self.value / self.most)
        return done / max(self.passes, self._usual)

    def left(self, now: float, learned: float | None) -> float | None:
        """Seconds until the node's last step, None before the second step of a pass. ``learned`` are the
        seconds of the whole node: the first few steps of a run say less than earlier runs do.
        """
        rate = self.rate
        if rate is None:
            return None
        passes = max(self.passes, self._usual)
        if learned is not None:
            seen = self.last[0] - self.first[0]
            rate = (rate * seen + learned / (passes * self.most) * _LEARNED_STEPS) / (seen + _LEARNED_STEPS)
        steps = self.most - self.value + (passes - self.passes) * self.most
        return max(0.0, steps * rate - min(rate, now - self.last[1]))


class Meter:
    """Reads the messages of one prompt. Nodes are the graph's: what one of them makes at run time is its own.

    ``signature`` is what the time depends on, such as size, frames and steps. ``now`` answers monotonic
    seconds. For one thread at a time.
    """

    def __init__(
        self, graph: Graph, *, timings: Timings, model: str, signature: Hashable, now: Callable[[], float]
    ) -> None:
        self._graph, self._timings, self._now = graph, timings, now
        self._model, self._signature = model, signature
        self._prints = _fingerprints(graph)
        self._learned: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._began = False
        self._node = _AROUND
        self._since = 0.0
        """When the current node's time was last added to ``_spent``."""
        self._spent: dict[str, float] = {}
        self._done: set[str] = set()
        self._running: set[str] = set()
        """The nodes that run by the last ``progress_state``: more than one where some wait for others."""
        self._cached: set[str] = set()
        self._told_cached = False
        self._steps: dict[str, _Steps] = {}
        self._fraction = 0.0
        self._ended = False
        self._last: Progress | None = None

    def started(self) -> bool:
        """Whether ComfyUI has begun with this prompt."""
        return self._began

    def estimate(self) -> float | None:
        """Seconds until the prompt's end if it runs on, or began, now; None where nothing is known."""
        if self._ended:
            return 0.0
        if not self.started():
            self._learned = self._timings.seconds(self._model, self._signature)
            return self._left() if self._learned else self._timings.quick(self._model)
        left = self._left()
        quick = self._timings.quick(self._model) if left is None else None
        return left if quick is None else max(0.0, quick - sum(self._spent.values()))

    def message(self, type_: str, data: Mapping[str, Any]) -> Progress | None:
        """Take one message of this prompt. Answers what is new to tell; None where nothing is."""
        if self._ended or type_ not in _READ:
            return None
        if not self._began:
            self._began, self._since = True, self._now()
            self._learned = self._timings.seconds(self._model, self._signature)
            self._shares = self._learned or self._timings.shares(self._model)
        self._read(type_, data)
        return self.tick()

    def tick(self) -> Progress | None:
        """What time alone has changed since the last answer: many nodes say nothing while they run. None before
        the beginning, and where nothing is new.
        """
        if not self._began:
            return None
        self._account()
        self._fraction = max(self._fraction, min(_MOST, self._measure()))
        eta = self.estimate()
        steps = None if self._ended else self._steps.get(self._node)
        progress = Progress(
            fraction=round(self._fraction, 4),
            stage=self._title(),
            step=int(steps.value) if steps else None,
            steps=int(steps.most) if steps else None,
            eta=None if eta is None else round(eta, 2),
        )
        if progress == self._last:
            return None
        self._last = progress
        return progress

    def finished(self) -> None:
        """The prompt ended well: learn from it."""
        if not self._began:
            return
        self._account()
        self._ended = True
        self._timings.hold(self._prints)
        if self._spent.keys() - {_AROUND}:  # else nothing was heard of its nodes, or all were cached
            passes = {node: steps.passes for node, steps in self._steps.items()}
            self._timings.learn(self._model, self._signature, self._spent, passes)

    # -- messages -----------------------------------------------------------------------------------------
    def _read(self, type_: str, data: Mapping[str, Any]) -> None:
        match type_:
            case "execution_cached":
                self._on_cached(data)
            case "executing":
                node = self._known(data.get("display_node"), data.get("node"))
                if node is not None:
                    self._enter(node)
            case "executed":
                node_id = data.get("node")
                # Of a node made at run time only a part of its maker has ended.
                if isinstance(node_id, str) and node_id in self._graph:
                    self._done.add(node_id)
            case "progress":
                node = self._known(data.get("display_node"), data.get("node"))
                self._step(data, data.get("node"), node or self._node)
            case "progress_state":
                self._on_progress_state(data)
            case "execution_success":
                self._account()
                self._done.update(self._graph)
                self._fraction = _MOST
                self._ended = True

    def _on_cached(self, data: Mapping[str, Any]) -> None:
        self._told_cached = True
        for node_id in data.get("nodes") or ():
            if (node := self._known(node_id)) is not None:
                self._cached.add(node)
                self._done.add(node)

    def _on_progress_state(self, data: Mapping[str, Any]) -> None:
        nodes = data.get("nodes")
        running: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for node_id, state in nodes.items() if isinstance(nodes, Mapping) else ():
            if not isinstance(state, Mapping):
                continue
            node = self._known(state.get("display_node_id"), state.get("real_node_id"), node_id)
            if node is None:
                continue
            if state.get("state") == "running":
                # Of a node and those that it made, the one with steps is the one to follow.
                if node not in running or _most(state) > 1:
                    running[node] = (node_id, state)
            elif state.get("state") == "finished" and node_id == node:
                self._done.add(node)
        self._running = set(running)
        for node, (node_id, state) in running.items():
            self._done.discard(node)
            self._step(state, node_id, node)
        if running and self._node not in running:
            self._enter(next(reversed(running)))

    # -- state --------------------------------------------------------------------------------------------
    def _known(self, *names: Any) -> str | None:
        """The first of the names that is a node of the graph, or was made by one (``12.0.3`` by ``12``)."""
        for name in names:
            if isinstance(name, str):
                if name in self._graph:
                    return name
                if (maker := name.partition(".")[0]) in self._graph:
                    return maker
        return None

    def _enter(self, node: str) -> None:
        self._account()
        if self._node not in (_AROUND, node) and self._node not in self._running:
            self._done.add(self._node)
        self._node = node
        self._done.discard(node)  # a node that finds that it needs another input runs again after that one

    def _step(self, data: Mapping[str, Any], source: Any, node: str) -> None:
        value, most = data.get("value"), _most(data)
        if most <= 1 or node == _AROUND or node in self._done or not isinstance(value, int | float):
            return
        if node not in self._steps:
            usual = self._timings.passes(self._model, self._signature).get(node, 1)
            self._steps[node] = _Steps(usual)
        source = source if isinstance(source, str) else node
        self._steps[node].update(source, float(value), most, self._now())

    def _account(self) -> None:
        now = self._now()
        if not self._ended:
            self._spent[self._node] = self._spent.get(self._node, 0.0) + max(0.0, now - self._since)
        self._since = now

    def _title(self) -> str:
        node = self._graph.get(self._node)
        if node is None:
            return _STARTING
        return str((node.get("_meta") or {}).get("title") or node.get("class_type") or self._node)

    # -- how far ------------------------------------------------------------------------------------------
    def _measure(self) -> float:
        """The done share of the work that is not cached."""
        whole = done = 0.0
        for node_id in self._graph:
            if node_id in self._cached:
                continue
            weight = self._weight(node_id)
            whole += weight
            done += weight * self._done_of(node_id)
        return done / whole if whole else 0.0

    def _weight(self, node_id: str) -> float:
        if self._shares:
            # A node that has never run, though others have, is not on the way to any output.
            return max(self._shares.get(node_id, 0.0), 0.001 if node_id in self._spent else 0.0)
        return _SAMPLER_WEIGHT if node_id in self._steps or self._samples(node_id) else 1.0

    def _done_of(self, node_id: str) -> float:
        if node_id in self._done:
            return 1.0
        if (steps := self._steps.get(node_id)) is not None:
            return steps.fraction
        learned = self._learned.get(node_id)
        return min(_ALMOST, self._spent.get(node_id, 0.0) / learned) if learned else 0.0

    def _samples(self, node_id: str) -> bool:
        node = self._graph[node_id]
        inputs = node.get("inputs") or {}
        return "sampler" in str(node.get("class_type", "")).lower() and not _SAMPLED.isdisjoint(inputs)

    # -- how long -----------------------------------------------------------------------------------------
    def _left(self) -> float | None:
        """Seconds left by what was learned and by the rates of steps; None where neither says anything."""
        parts = list(self._parts())
        if not self._learned and not parts:
            return None
        return sum(parts)

    def _parts(self) -> Iterator[float]:
        pace = self._latest_steps()
        if _AROUND in self._learned and self._node == _AROUND:
            yield max(0.0, self._learned[_AROUND] - self._spent_on(_AROUND))
        for node_id in self._graph:
            if node_id in self._done or self._is_held(node_id):
                continue
            steps = self._steps.get(node_id)
            by_rate = steps.left(self._now(), self._learned.get(node_id)) if steps else None
            if by_rate is not None:
                yield by_rate
            elif node_id in self._learned:
                yield max(0.0, self._learned[node_id] - self._spent_on(node_id))
            elif pace is not None and steps is None and self._samples(node_id):
                planned = self._planned_steps(node_id)
                yield (pace.rate or 0.0) * (pace.most if planned is None else planned)

    def _spent_on(self, node_id: str) -> float:
        spent = self._spent.get(node_id, 0.0)
        if self._began and node_id == self._node and not self._ended:
            spent += max(0.0, self._now() - self._since)
        return spent

    def _is_held(self, node_id: str) -> bool:
        """Cached, or probably so as long as ComfyUI has not said."""
        if self._told_cached:
            return node_id in self._cached
        return node_id not in self._spent and self._timings.holds(self._prints[node_id])

    def _latest_steps(self) -> _Steps | None:
        """Those of the sampler that ran last, at a known rate: the next one's is likely the same."""
        timed = [steps for steps in self._steps.values() if steps.rate is not None]
        return max(timed, key=lambda steps: steps.last[1]) if timed else None

    def _planned_steps(self, node_id: str) -> float | None:
        """Steps that a sampler will take, by its inputs; None where they are linked."""
        inputs = self._graph[node_id].get("inputs") or {}
        steps = inputs.get("steps")
        if not isinstance(steps, int):
            return None
        start, end = inputs.get("start_at_step", 0), inputs.get("end_at_step", steps)
        start = start if isinstance(start, int) else 0
        end = end if isinstance(end, int) else steps
        return float(max(0, min(steps, end) - start))


def _most(state: Mapping[str, Any]) -> float:
    most = state.get("max")
    return float(most) if isinstance(most, int | float) else 0.0


def _fingerprints(graph: Graph) -> dict[str, int]:
    """A number for each node by which ComfyUI would know its result again: of its class, its values and, in
    their place, the numbers of the nodes that it is linked to (``CacheKeySetInputSignature`` does the like).
    """
    made: dict[str, int] = {}

    def of(node_id: str) -> int:
        if node_id not in made:
            made[node_id] = 0  # a loop ends here; ComfyUI refuses such a graph
            node = graph[node_id]
            parts = [
                (name, of(value[0]), value[1]) if _links(value, graph) else (name, repr(value), None)
                for name, value in sorted((node.get("inputs") or {}).items())
            ]
            made[node_id] = hash((node_id, node.get("class_type"), *parts))
        return made[node_id]

    return {node_id: of(node_id) for node_id in graph}


def _links(value: Any, graph: Graph) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in graph
