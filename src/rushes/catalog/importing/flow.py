"""How the nodes of a graph hang together: which of them run, in which order, and what feeds what."""

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Final, Literal

from rushes.catalog.importing.nodes import SCALARS, Nodes, Port, Target

Pole = Literal["positive", "negative"]

_FIRST: Final = ("latent_image", "latent", "samples", "latents")
"""Inputs by which one sampler goes on where another stopped: what they lead to comes first."""


class Flow:
    """The part of a graph that ComfyUI would run: the nodes that save something, and all that feeds them."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        ends = [id_ for id_ in nodes if nodes.is_output(id_)]
        self.ends = tuple(ends or self._loose_ends())
        self.order = tuple(self._ordered())
        """Every node that runs, each behind those that feed it; of two samplers the one that begins is first."""
        self.consumers: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
        """By node: who takes its outputs, as (node, input, number of the output)."""
        for id_ in self.order:
            for name, (source, output) in nodes.links(id_):
                self.consumers[source].append((id_, name, output))

    def _loose_ends(self) -> list[str]:
        fed = {link[0] for id_ in self.nodes for _, link in self.nodes.links(id_)}
        return [id_ for id_ in self.nodes if id_ not in fed]

    def _ordered(self) -> Iterator[str]:
        seen: set[str] = set()
        for end in self.ends:
            stack = [(end, False)]
            while stack:
                id_, left = stack.pop()
                if left:
                    yield id_
                elif id_ not in seen:
                    seen.add(id_)
                    stack.append((id_, True))
                    links = sorted(self.nodes.links(id_), key=lambda one: one[0] not in _FIRST)
                    stack += [(source, False) for _, (source, _) in reversed(links) if source not in seen]

    def is_value(self, id_: str) -> bool:
        """Whether a node only holds plain values for others: a primitive, a constant."""
        if any(True for _ in self.nodes.links(id_)):
            return False
        outputs = self.nodes.outputs(id_)
        if outputs:
            return all(type_ in SCALARS for type_ in outputs)
        return not self.nodes.info(id_) and self.nodes.class_of(id_).startswith("Primitive")

    def makes_latents(self, id_: str) -> bool:
        """Whether a node gives a sampler something to work on."""
        return "LATENT" in self.nodes.outputs(id_) or any(
            name in _FIRST for _, name, _ in self.consumers.get(id_, ())
        )

    def origin(self, id_: str, name: str) -> Target | None:
        """Where a plain value is kept: in the input itself, or in the primitive that it is connected to.

        None where it is computed.
        """
        link = self.nodes.link(id_, name)
        if link is None:
            return (id_, name) if name in self.nodes.inputs(id_) else None
        source = link[0]
        plain = list(self.nodes.inputs(source))
        return (source, plain[0]) if self.is_value(source) and len(plain) == 1 else None

    def uses(self, target: Target) -> list[Target]:
        """The inputs that :meth:`origin` leads from to ``target``."""
        id_, name = target
        fed = [(user, input_) for user, input_, _ in self.consumers.get(id_, ()) if self.is_value(id_)]
        return fed or [(id_, name)]

    def ports(self, target: Target) -> list[Port]:
        """All that takes the value of ``target``: itself, and what a primitive feeds."""
        return [self.nodes.port(*one) for one in dict.fromkeys((target, *self.uses(target)))]

    def poles(self) -> dict[str, set[Pole]]:
        """Of every node behind a ``positive`` or ``negative`` input, which of the two it is behind."""
        sure: dict[str, set[Pole]] = defaultdict(set)
        guided: dict[str, set[Pole]] = defaultdict(set)
        for id_ in self.order:
            for name, (source, _) in self.nodes.links(id_):
                if name == "positive":
                    self._mark(source, "positive", sure)
                elif name == "negative":
                    self._mark(source, "negative", sure)
                elif name == "conditioning":  # of a guider; or of a node on the way, which is surely marked
                    self._mark(source, "positive", guided)
        return {**guided, **sure}

    def _mark(self, start: str, pole: Pole, found: dict[str, set[Pole]]) -> None:
        waiting = deque([start])
        while waiting:
            id_ = waiting.popleft()
            if pole in found[id_]:
                continue
            found[id_].add(pole)
            links = dict(self.nodes.links(id_))
            both = [name for name in ("positive", "negative") if name in links]
            waiting += [links[name][0] for name in links if not both or name == pole]
