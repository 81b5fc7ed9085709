"""The text encoder's work is done once for each prompt, in any script."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import msgspec
import torch

from rushes.engines.wan.denoise import Denoiser, Stop
from rushes.engines.wan.memory import Placement, settle
from rushes.engines.wan.prompts import TOKENS, Embeddings
from support.tiny_diffusers import TEXT_WIDTH, Kind
from support.wan_running import SMALL, fresh

Tiny = Callable[[Kind], Path]
SCRIPTS = (
    "一只猫走在街上",
    "一只狗走在街上",
    "кошка на улице",
    "قطة في الشارع",
    "거리의 고양이",
    "ทะเล",
    "🐈🌊",
    "cafe\u0301 naïve",
)


@contextmanager
def encoded(loaded: Any) -> Iterator[list[str]]:
    """What the text encoder is asked for, up to now."""
    asked: list[str] = []
    tokenizer = loaded.pipe.tokenizer

    def note(_module: Any, args: Any, named: Any) -> None:
        tokens = named.get("input_ids", args[0] if args else None)[0]
        asked.append(tokenizer.decode([token for token in tokens.tolist() if token > 1]).strip())

    handle = loaded.pipe.text_encoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield asked
    finally:
        handle.remove()


def test_a_prompt_is_encoded_once(tiny: Tiny) -> None:
    loaded = fresh(tiny("text"))
    denoiser = Denoiser(loaded, Embeddings())
    other = msgspec.structs.replace(SMALL, prompt="a dog in the kitchen", seed=1)

    made = []
    with encoded(loaded) as asked:
        for plan in (SMALL, msgspec.structs.replace(SMALL, seed=2), other, SMALL):
            made.append(denoiser.run(plan, Stop(), lambda *_: None))

    assert [SMALL.prompt, SMALL.negative_prompt, other.prompt] == asked
    assert torch.equal(made[0], made[3])


def test_without_guidance_the_negative_prompt_is_not_read(tiny: Tiny) -> None:
    loaded = fresh(tiny("text-two-experts"))
    denoiser = Denoiser(loaded, Embeddings())
    plan = msgspec.structs.replace(SMALL, guidance=1.0, guidance_2=1.0)

    with encoded(loaded) as asked:
        denoiser.run(plan, Stop(), lambda *_: None)
        assert [plan.prompt] == asked
        denoiser.run(msgspec.structs.replace(plan, guidance_2=2.0), Stop(), lambda *_: None)

    assert [plan.prompt, plan.negative_prompt] == asked


def test_what_was_not_used_for_longest_goes_first(tiny: Tiny) -> None:
    loaded, embeddings = fresh(tiny("text")), Embeddings(kept=2)
    with encoded(loaded) as asked:
        for prompt in ("cat", "dog", "cat", "sea", "cat", "dog"):
            embeddings.get(loaded, prompt, None)
    assert ["cat", "dog", "sea", "dog"] == asked


def test_one_prompt_is_kept_even_where_both_do_not_fit(tiny: Tiny) -> None:
    loaded = fresh(tiny("text"))
    prompt, negative = Embeddings(kept=1).get(loaded, "cat", "dog")
    expected = loaded.pipe.encode_prompt("cat", "dog", max_sequence_length=TOKENS)
    assert torch.equal(expected[0], prompt)
    assert negative is not None
    assert torch.equal(expected[1], negative)


def test_another_models_embeddings_are_not_used(tiny: Tiny) -> None:
    embeddings = Embeddings()
    first, second = fresh(tiny("text")), fresh(tiny("text"))
    with torch.no_grad():
        second.pipe.text_encoder.shared.weight.mul_(2)
    one = embeddings.get(first, "cat", None)[0]
    with encoded(second) as asked:
        two = embeddings.get(second, "cat", None)[0]
    assert ["cat"] == asked
    assert not torch.equal(one, two)


def test_every_script_says_something_of_its_own(tiny: Tiny) -> None:
    loaded, embeddings = fresh(tiny("text")), Embeddings()
    found = {text: embeddings.get(loaded, text, "灯")[0] for text in SCRIPTS}

    for text, embedding in found.items():
        assert (1, TOKENS, TEXT_WIDTH) == embedding.shape
        assert torch.equal(loaded.pipe.encode_prompt(text, "灯", max_sequence_length=TOKENS)[0], embedding)
    for left, right in combinations(found.values(), 2):
        assert not torch.equal(left, right)

    denoiser = Denoiser(loaded, embeddings)
    cat, dog = (
        denoiser.run(msgspec.structs.replace(SMALL, prompt=text), Stop(), lambda *_: None)
        for text in SCRIPTS[:2]
    )
    assert not torch.equal(cat, dog)


def test_long_and_empty_prompts(tiny: Tiny) -> None:
    loaded, embeddings = fresh(tiny("text")), Embeddings()
    long, empty = embeddings.get(loaded, "a cat in the street " * 400, "")
    assert (1, TOKENS, TEXT_WIDTH) == long.shape
    assert empty is not None
    assert (1, TOKENS, TEXT_WIDTH) == empty.shape
    assert 0 == empty[0, 1:].count_nonzero()


def test_an_encoder_that_waits_comes_only_where_it_is_needed(tiny: Tiny) -> None:
    loaded, plain = fresh(tiny("text")), fresh(tiny("text"))
    settle(loaded, Placement.TEXT_WAITS)
    came: list[Any] = []
    move = loaded.pipe.text_encoder.to
    loaded.pipe.text_encoder.to = lambda where: came.append(torch.device(where)) or move(where)
    embeddings = Embeddings()

    first = embeddings.get(loaded, "a cat", "a dog")
    times = len(came)
    again = embeddings.get(loaded, "a cat", "a dog")

    assert times > 0
    assert times == len(came)
    assert loaded.pipe.text_encoder.device == torch.device("cpu")
    for expected, one, two in zip(Embeddings().get(plain, "a cat", "a dog"), first, again, strict=True):
        assert expected is not None
        assert one is not None
        assert two is not None
        assert torch.equal(expected, one)
        assert torch.equal(expected, two)
