"""Which models slots may take, what the draft engine leaves to others, and for how long it remembers them."""

from pathlib import Path

import pytest

from rushes.catalog.load import Catalog
from rushes.catalog.model import Model
from rushes.catalog.routes import Route
from rushes.catalog.routing import may_claim
from rushes.requests.ids import WorkerId
from rushes.requests.record import RemoteState, WorkerRecord
from rushes.worker.share import REMEMBERED_SECONDS, Share

T2I = "wan-ai/wan-2-5/text-to-image"
OTHER = "community/wan-2-1/fusionx/image-to-video"


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


def gpu(*models: str, id_: str = "gpu", slots: int = 1, engine: str = "wan") -> WorkerRecord:
    return WorkerRecord(WorkerId(id_), "afar", 1, slots, models, engine, "")


def remote(*models: str, id_: str = "front") -> WorkerRecord:
    state = RemoteState("fal", "fal", models, 8)
    return WorkerRecord(WorkerId(id_), "afar", 1, 0, (), "draft", "", remotes=(state,))


def may(share: Share) -> tuple[bool, bool]:
    return share.may_take(T2I), share.may_take(OTHER)


def test_alone_it_takes_all(catalog: Catalog) -> None:
    share = Share("draft", catalog)
    share.see([gpu(T2I, slots=0), gpu(T2I, engine="draft")], (), 0.0)
    assert (True, True) == may(share)
    assert not share.may_take("no/such")


@pytest.mark.parametrize(
    ("first", "later"), [(gpu(T2I, OTHER), gpu(OTHER)), (remote(T2I, OTHER), remote(OTHER))]
)
def test_the_latest_word_of_a_worker_counts(catalog: Catalog, first: WorkerRecord, later: WorkerRecord) -> None:
    """One that still loads its engine lists every model."""
    share = Share("draft", catalog)
    share.see([first], (), 0.0)
    assert (False, False) == may(share)
    share.see([later], (), 1.0)
    assert (True, False) == may(share)


@pytest.mark.parametrize("worker", [gpu(T2I), remote(T2I)])
def test_one_that_is_gone_is_remembered_and_then_forgotten(catalog: Catalog, worker: WorkerRecord) -> None:
    share = Share("draft", catalog)
    share.see([worker], (), 0.0)
    share.see([], (), REMEMBERED_SECONDS)
    assert (False, True) == may(share)
    share.see([], (), REMEMBERED_SECONDS + 1)
    assert (True, True) == may(share)


def test_remotes_of_its_own_worker(catalog: Catalog) -> None:
    share = Share("draft", catalog)
    share.see([], (RemoteState("fal", "fal", (T2I,), 8),), 0.0)
    assert (False, True) == may(share)
    share.see([], (RemoteState("fal", "fal", (), 8),), 1.0)
    assert (True, True) == may(share)


def test_one_of_two_that_serve_it_leaves(catalog: Catalog) -> None:
    share = Share("draft", catalog)
    share.see([gpu(T2I), gpu(T2I, id_="gpu2")], (), 0.0)
    share.see([gpu(T2I, id_="gpu2")], (), REMEMBERED_SECONDS + 1)
    assert (False, True) == may(share)


@pytest.mark.parametrize(
    ("engine", "routes", "others", "remotes", "may"),
    [
        # without routes: every engine of the model's own, and draft pictures where there is nothing else
        ("comfyui", (), (), ("fal",), True),
        ("wan", (), ("comfyui",), (), True),
        ("draft", (), (), (), True),
        ("draft", (), ("draft",), (), True),
        ("draft", (), ("comfyui",), (), False),
        ("draft", (), (), ("fal",), False),
        # with routes: those that they name
        ("comfyui", ("local", "fal"), (), (), True),
        ("comfyui", ("comfyui",), (), (), True),
        ("comfyui", ("wan", "fal"), (), (), False),
        ("comfyui", ("fal",), (), (), False),
        ("my.engine:make", ("local",), (), (), True),
        ("my.engine:make", ("my.engine:make",), (), (), True),
        ("my.engine:make", ("wan",), (), (), False),
        # draft pictures where they are asked for, or where nothing else may
        ("draft", ("draft", "fal"), ("comfyui",), ("fal",), True),
        ("draft", ("comfyui", "fal"), (), ("fal",), False),
        ("draft", ("comfyui", "fal"), ("comfyui",), (), False),
        ("draft", ("comfyui", "fal"), ("wan",), (), True),
        ("draft", ("local", "fal"), ("wan",), (), False),
        ("draft", ("fal",), (), (), True),
    ],
)
def test_what_slots_may_take(
    engine: str, routes: tuple[str, ...], others: tuple[str, ...], remotes: tuple[str, ...], may: bool
) -> None:
    model = Model(
        id="me/mine",
        name="M",
        description="",
        categories=(),
        output="image",
        inputs=(),
        required=(),
        folder=Path("/nowhere"),
        routes=tuple(map(Route, routes)),
    )
    assert may is may_claim(engine, model, others, remotes)
