import pytest

from rushes.engines.draft import fonts
from rushes.engines.draft.card import card
from rushes.engines.draft.plan import Plan, clean
from rushes.engines.draft.typeset import fit, ink


def plan(prompt: str, width: int = 320, height: int = 180, seed: int = 0, negative: str = "") -> Plan:
    return Plan("card", width, height, 1, 16.0, seed, clean(prompt), clean(negative), "Any model")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Puppy",
        "x" * 2048,
        "word " * 500,
        "一只狐狸站在岩石上。" * 80,
        "狐が岩の上に立っている。" * 40,
        "Größe, Straße — élève, œuvre « déjà »",
        "مرحبا بالعالم",
        "שלום עולם",
        "नमस्ते दुनिया",
        "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301\u0301\u0301",
        "\ud800 half a surrogate \x00\x1b[31m\u202e reversed",
        "\U0010ffff\ufffe\u0378",
        "\u0301",
        "line\nbreaks\r\nand\ttabs",
    ],
)
def test_any_text_makes_a_card(prompt: str) -> None:
    assert (180, 320, 3) == card(plan(prompt)).shape


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (16, 200), (200, 16), (135, 175)])
def test_any_size_makes_a_card(size: tuple[int, int]) -> None:
    assert (size[1], size[0], 3) == card(plan("A fox at dawn", *size, negative="blur")).shape


def test_the_same_plan_is_the_same_card_and_all_else_is_another() -> None:
    first = card(plan("A fox", seed=1))
    assert (first == card(plan("A fox", seed=1))).all()
    for other in (plan("A fox", seed=2), plan("A fix", seed=1), plan("A fox", seed=1, negative="blur")):
        assert (first != card(other)).any()


def test_words_are_set_large_and_within_the_box() -> None:
    short, long = fit("A fox", 400, 200, 80, 10), fit("word " * 200, 400, 200, 80, 10)
    assert short.size > 2 * long.size
    for text in (short, long):
        assert text.width <= 400 * 1.03
        assert text.height <= 200
        assert ink(text).max() > 0.9


def test_what_has_no_room_ends_in_an_ellipsis() -> None:
    text = fit("word " * 2000, 200, 60, 40, 10)
    assert text.lines[-1].endswith("…")
    assert text.height <= 60


def test_no_line_begins_with_a_closing_sign() -> None:
    text = fit("狐が、岩の上に、立って、いる。" * 5, 90, 900, 20, 20)
    assert len(text.lines) > 3
    assert not any(line[0] in "、。" for line in text.lines)


def test_without_any_font_of_the_machine_latin_is_still_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = (fonts.writer, fonts.font, fonts._files, fonts._missing, fonts._has)
    monkeypatch.setattr(fonts, "_FOLDERS", ())
    for function in cached:
        function.cache_clear()
    try:
        written = "".join(piece for piece, _ in fonts.runs("Straße déjà — œuvre"))
        assert written == "Strasse deja - oeuvre"
    finally:
        monkeypatch.undo()
        for function in cached:
            function.cache_clear()


def test_a_light_named_in_the_prompt_colours_the_card() -> None:
    night, golden = (card(plan(f"a house at {time}")).mean(axis=(0, 1)) for time in ("midnight", "golden hour"))
    assert night[2] > night[0]
    assert golden[0] > golden[2]


def test_gradients_show_no_bands() -> None:
    sky = card(plan("", 400, 300))[30:90, 340:380].astype(int)
    flat = (sky[:, 1:] == sky[:, :-1]).all(axis=(1, 2))
    assert not flat.any()
