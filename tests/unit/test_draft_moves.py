import random

import pytest

from rushes.engines.draft.moves import Move, read


def axes(prompt: str, seed: int = 1) -> dict[str, int]:
    """The axes that move, each with its sign."""
    move = read(prompt, random.Random(seed))
    amounts = {name: getattr(move, name) for name in Move.__struct_fields__}
    return {name: (amount > 0) - (amount < 0) for name, amount in amounts.items() if amount}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("The camera slowly dollies in from a low angle", {"depth": 1}),
        ("The camera slowly dolly zooms out as she smiles", {"depth": -1}),
        ("Dolly out.", {"depth": -1}),
        ("zoom in on the eye", {"depth": 1}),
        ("slow zoom-out", {"depth": -1}),
        ("the camera pulls back to reveal the city", {"depth": -1}),
        ("camera pushes in", {"depth": 1}),
        ("the camera slowly moves closer", {"depth": 1}),
        ("pan left over the sea", {"pan": -1}),
        ("The camera pans slowly to the right", {"pan": 1}),
        ("pan from right to left", {"pan": -1}),
        ("tilt up to the sky", {"tilt": 1}),
        ("camera tilts down", {"tilt": -1}),
        ("crane up over the roofs", {"crane": 1}),
        ("truck left along the wall", {"truck": -1}),
        ("orbit right around the statue", {"orbit": 1}),
        ("pan left, then zoom in", {"pan": -1, "depth": 1}),
        ("static shot of a door that zooms in", {}),
        ("locked-off camera", {}),
    ],
)
def test_words_choose_the_move(prompt: str, expected: dict[str, int]) -> None:
    assert expected == axes(prompt)


def test_handheld_adds_a_shake_to_the_move() -> None:
    assert {"truck", "depth", "shake"} == set(axes("tracking shot, dollies in, slight handheld shake"))


@pytest.mark.parametrize(
    "prompt",
    ["an egg in a frying pan on the left", "two trucks left the city", "she pulls back her hair", "Japan"],
)
def test_things_in_the_picture_are_not_moves(prompt: str) -> None:
    assert [axes("", seed) for seed in range(30)] == [axes(prompt, seed) for seed in range(30)]


def test_the_seed_chooses_where_no_word_does() -> None:
    chosen = [tuple(sorted(axes("a quiet lake", seed).items())) for seed in range(40)]
    assert len(set(chosen)) > 4
    assert all(chosen)


def test_a_reference_is_orbited() -> None:
    assert read("a toy robot", random.Random(3), orbit=True).orbit != 0


def test_adverbs_change_the_amount() -> None:
    slow, plain, fast = (read(f"{word} zoom in", random.Random(1)).depth for word in ("slow", "a", "rapid"))
    assert slow < plain < fast
