import msgspec
import pytest

from rushes.api.outputs import parse_range
from rushes.catalog.load import Catalog
from rushes.catalog.model import Price
from rushes.errors import RangeUnsatisfiable
from rushes.requests.record import Output
from rushes.worker.outputs import cost_usd


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("", None),
        ("bytes=0-", (0, 100)),
        ("bytes=0-0", (0, 1)),
        ("bytes=99-99", (99, 100)),
        ("bytes=10-1000000", (10, 100)),
        ("bytes=-1", (99, 100)),
        ("bytes=-1000", (0, 100)),
        ("bytes = 1-2", (1, 3)),
        ("bytes=2-1", None),
        ("bytes=-", None),
        ("bytes=0-1,3-4", None),
        ("bytes=\u0661-\u0662", None),
        ("items=0-1", None),
    ],
)
def test_ranges(header: str, span: tuple[int, int] | None) -> None:
    assert span == parse_range(header, 100)


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=5000-6000", "bytes=-0"])
def test_ranges_outside(header: str) -> None:
    with pytest.raises(RangeUnsatisfiable):
        parse_range(header, 100)


def test_an_empty_file_has_no_range() -> None:
    with pytest.raises(RangeUnsatisfiable):
        parse_range("bytes=0-", 0)


def test_cost() -> None:
    entry = Catalog.load().get("wan-ai/wan-2-5/text-to-image")
    assert entry is not None
    video = Output("k", "video", "video/mp4", 1, 16, 16, 81, 16.0, 81 / 16)
    for price, cost in (
        (Price(), None),
        (Price(0.1, "second"), 1.0125),
        (Price(0.1, "output"), 0.2),
    ):
        model = msgspec.structs.replace(entry.model, price=price)
        assert cost == cost_usd(model, [video, video])
