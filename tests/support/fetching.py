"""What the tests of the guarded fetch share: a picture to fetch, resolvers, and a fetch that is refused."""

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from rushes.errors import MediaError
from rushes.media.fetch import FetchPolicy, Resolver, fetch


def _picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()


PNG = _picture()


def resolves_to(*answers: Sequence[str]) -> tuple[Resolver, list[str]]:
    """A resolver that gives these answers one after the other, and the names it was asked for."""
    asked: list[str] = []

    async def resolver(host: str, _: int) -> Sequence[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return resolver, asked


HERE, _ = resolves_to(["127.0.0.1"])
"""Every name is this machine."""


async def refusal(
    url: str, dest: Path, policy: FetchPolicy, resolver: Resolver = HERE, **options: object
) -> MediaError:
    """The error of a fetch that must fail, and leave no file."""
    with pytest.raises(MediaError) as caught:
        await fetch(url, dest, policy=policy, resolver=resolver, **options)  # type: ignore[arg-type]
    assert not dest.exists()
    return caught.value
