"""Which engines a manifest names for a model, in which order, and what it may say of them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.catalog.load import load_model
from rushes.catalog.model import Model
from rushes.catalog.routes import (
    DAY_MINUTES,
    Route,
    allows,
    effective_routes,
    is_local,
    parse_hours,
    remotes_of,
    routed,
    within,
)
from rushes.errors import ManifestError
from rushes.requests.record import RemoteState

HEAD = 'name = "M"\noutput = "image"\nrequired = ["p"]\n'
INPUT = '[[inputs]]\nname = "p"\ntitle = "P"\ntype = "string"\nrole = "prompt"\ndefault = "a fox"\n'


def load(root: Path, routes: str) -> Model:
    folder = root / "me" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(HEAD + INPUT + routes, "utf-8")
    return load_model(folder, root)


def model(*routes: Route) -> Model:
    return Model(
        id="me/mine",
        name="M",
        description="",
        categories=(),
        output="image",
        inputs=(),
        required=(),
        folder=Path("/nowhere"),
        routes=routes,
    )


def remote(name: str, kind: str = "fal", *, models: tuple[str, ...] = ("me/mine",)) -> RemoteState:
    return RemoteState(name=name, kind=kind, models=models, capacity=8)


# -- the manifest -------------------------------------------------------------------------------------------
def test_a_manifest_lists_routes_in_order(tmp_path: Path) -> None:
    routes = load(
        tmp_path,
        """
[[routes]]
engine = "comfyui"
[[routes]]
engine = "my.engines:make"
[[routes]]
engine = "other-box"
queue_eta_above = 60
accounts = ["film-*", "me"]
max_cost_usd = 0.5
hours = "20:00-06:00"
""",
    ).routes

    wanted = Route(
        "other-box",
        queue_eta_above=60,
        accounts=("film-*", "me"),
        max_cost_usd=0.5,
        hours="20:00-06:00",
    )
    assert (Route("comfyui"), Route("my.engines:make"), wanted) == routes
    assert () == load(tmp_path, "").routes


@pytest.mark.parametrize(
    ("routes", "key", "said"),
    [
        ('[[routes]]\nengine = "fal"\nhour = "1:00-2:00"', "routes[0].hour", "did you mean hours?"),
        ("[[routes]]\nqueue_eta_above = 60", "routes[0]", "engine"),
        ('[[routes]]\nengine = "Fal"', "routes[0].engine", "'Fal' is no engine: write local, draft"),
        ('[[routes]]\nengine = ""', "routes[0].engine", "is no engine"),
        ('[[routes]]\nengine = "local"\nhours = "1:00-2:00"', "routes[0].hours", "conditions are for remotes"),
        ('[[routes]]\nengine = "draft"\nmax_cost_usd = 1', "routes[0].max_cost_usd", "draft runs here"),
        ('[[routes]]\nengine = "wan"\naccounts = ["a"]', "routes[0].accounts", "take it out"),
        ('[[routes]]\nengine = "a.b:c"\nqueue_eta_above = 0', "routes[0].queue_eta_above", "a.b:c runs here"),
        (
            '[[routes]]\nengine = "fal"\n[[routes]]\nengine = "wan"',
            "routes[1]",
            "wan stands behind the remote fal",
        ),
        ('[[routes]]\nengine = "fal"\n[[routes]]\nengine = "fal"', "routes[1]", "twice"),
        ('[[routes]]\nengine = "fal"\nqueue_eta_above = -1', "routes[0].queue_eta_above", "seconds, 0 or more"),
        (
            '[[routes]]\nengine = "fal"\nqueue_eta_above = nan',
            "routes[0].queue_eta_above",
            "seconds, 0 or more",
        ),
        ('[[routes]]\nengine = "fal"\nmax_cost_usd = inf', "routes[0].max_cost_usd", "US dollars, 0 or more"),
        ('[[routes]]\nengine = "fal"\naccounts = ["a", " "]', "routes[0].accounts", "a pattern is empty"),
        ('[[routes]]\nengine = "fal"\naccounts = "a"', "routes[0].accounts", "Expected `array`"),
        ('[[routes]]\nengine = "fal"\nhours = "8-10"', "routes[0].hours", 'write them as in "20:00-06:00"'),
        ('[[routes]]\nengine = "fal"\nhours = "08:00-24:01"', "routes[0].hours", "00:00 to 24:00"),
        ('[[routes]]\nengine = "fal"\nhours = "08:60-09:00"', "routes[0].hours", "00:00 to 24:00"),
        (
            '[[routes]]\nengine = "fal"\nhours = "08:00-08:00"',
            "routes[0].hours",
            "leave it out for the whole day",
        ),
        (
            '[[routes]]\nengine = "fal"\nhours = "00:00-24:00"',
            "routes[0].hours",
            "leave it out for the whole day",
        ),
        ('routes = "fal"', "routes", "Expected `array`"),
    ],
)
def test_what_is_wrong_with_routes_is_named(tmp_path: Path, routes: str, key: str, said: str) -> None:
    text = routes if routes.startswith("[[") else ""
    folder = tmp_path / "me" / "mine"
    folder.mkdir(parents=True)
    head = HEAD if text else f"{HEAD}{routes}\n"
    (folder / "model.toml").write_text(head + INPUT + text, "utf-8")
    with pytest.raises(ManifestError) as caught:
        load_model(folder, tmp_path)
    assert (key, str(folder / "model.toml")) == (caught.value.key, caught.value.file)
    assert said in caught.value.problem


@pytest.mark.parametrize(
    ("engine", "local"),
    [
        ("local", True),
        ("draft", True),
        ("comfyui", True),
        ("wan", True),
        ("noop", True),
        ("my.module:factory", True),
        ("fal", False),
        ("wan-box", False),
    ],
)
def test_which_engines_run_here(engine: str, local: bool) -> None:
    assert local is is_local(engine)


# -- conditions ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hours", "minute", "inside"),
    [
        ("", 0, True),
        ("08:00-18:00", 479, False),
        ("08:00-18:00", 480, True),
        ("08:00-18:00", 1079, True),
        ("08:00-18:00", 1080, False),
        ("20:00-06:00", 1199, False),
        ("20:00-06:00", 1200, True),
        ("20:00-06:00", 0, True),
        ("20:00-06:00", 359, True),
        ("20:00-06:00", 360, False),
        ("22:00-24:00", 1439, True),
        ("22:00-24:00", 0, False),
        (" 8:30 - 9:00 ", 510, True),
    ],
)
def test_hours(hours: str, minute: int, inside: bool) -> None:
    assert inside is within(hours, minute)


MINUTES = st.integers(0, DAY_MINUTES - 1)


@given(MINUTES, MINUTES, MINUTES)
def test_hours_and_the_hours_between_them_are_the_whole_day(start: int, end: int, minute: int) -> None:
    def text(first: int, last: int) -> str:
        return f"{first // 60:02}:{first % 60:02}-{last // 60:02}:{last % 60:02}"

    if start == end:
        with pytest.raises(ValueError, match="same time"):
            parse_hours(text(start, end))
        return
    assert (start, end) == parse_hours(text(start, end))
    assert within(text(start, end), minute) is not within(text(end, start), minute)


@pytest.mark.parametrize(
    ("patterns", "account", "may"),
    [
        ((), "anyone", True),
        (("film-*",), "film-1", True),
        (("film-*",), "Film-1", False),
        (("film-*", "me"), "me", True),
        (("film-?",), "film-12", False),
    ],
)
def test_accounts(patterns: tuple[str, ...], account: str, may: bool) -> None:
    assert may is allows(Route("fal", accounts=patterns), account)


# -- remotes ------------------------------------------------------------------------------------------------
def test_a_name_wins_over_a_kind_and_a_kind_means_all_of_it() -> None:
    first, second, other = remote("one"), remote("two"), remote("three", "replicate")
    assert (second,) == remotes_of("two", (first, second, other))
    assert (first, second) == remotes_of("fal", (first, second, other))
    named_so = remote("fal")
    assert (named_so,) == remotes_of("fal", (first, named_so))
    assert () == remotes_of("runcomfy", (first, second))


def test_remotes_that_routes_lead_to_stand_once() -> None:
    first, second, other = remote("one"), remote("two"), remote("three", "replicate")
    routes = (Route("comfyui"), Route("two"), Route("fal"))
    assert (second, first) == routed(routes, (first, second, other))


FAL, BOX = remote("fal"), remote("box", "openai-video")
ELSEWHERE = remote("fal", models=("me/other",))


@pytest.mark.parametrize(
    ("routes", "remotes", "overflow", "wanted"),
    [
        ((), (), 0, (Route("local"), Route("draft"))),
        ((), (FAL, BOX), 0, (Route("local"), Route("fal"), Route("box"))),
        (
            (),
            (BOX, FAL),
            30,
            (Route("local"), Route("box", queue_eta_above=30), Route("fal", queue_eta_above=30)),
        ),
        ((), (ELSEWHERE,), 30, (Route("local"), Route("draft"))),
        ((Route("comfyui"), Route("fal")), (FAL, BOX), 30, (Route("comfyui"), Route("fal"))),
        ((Route("comfyui"), Route("fal")), (BOX,), 30, (Route("comfyui"), Route("fal"), Route("draft"))),
        ((Route("fal"),), (ELSEWHERE,), 0, (Route("fal"), Route("draft"))),
        ((Route("draft"), Route("fal")), (), 0, (Route("draft"), Route("fal"))),
        ((Route("comfyui"),), (FAL,), 0, (Route("comfyui"), Route("draft"))),
    ],
)
def test_the_routes_that_hold(
    routes: tuple[Route, ...], remotes: tuple[RemoteState, ...], overflow: float, wanted: tuple[Route, ...]
) -> None:
    assert wanted == effective_routes(model(*routes), remotes, overflow)


# -- the documentation --------------------------------------------------------------------------------------
PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_key_of_a_route_is_documented() -> None:
    keys = [
        line.split("`")[1] for line in section("Keys of `[[routes]]`").splitlines() if line.startswith("| `")
    ]
    assert list(Route.__struct_fields__) == keys


def test_the_documented_routes_work(tmp_path: Path) -> None:
    text = section("Routes").partition("```toml\n")[2].partition("```")[0]
    assert ["comfyui", "runcomfy", "fal"] == [route.engine for route in load(tmp_path, text).routes]
