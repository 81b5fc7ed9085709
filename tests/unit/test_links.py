from hypothesis import given
from hypothesis import strategies as st

from rushes.media.links import sign, verify

SECRET = bytes(range(32))
KEY = "outputs/0190/1/0.mp4"


def parts(query: str) -> tuple[int, str]:
    fields = dict(pair.split("=", 1) for pair in query.split("&"))
    return int(fields["expires"]), fields["signature"]


def test_link_opens_its_file_until_it_ends() -> None:
    expires, signature = parts(sign(SECRET, KEY, 1000))

    assert expires == 1000
    assert verify(SECRET, KEY, expires, signature, now=999.9)
    assert not verify(SECRET, KEY, expires, signature, now=1000)


def test_link_does_not_fit_another_file_end_or_secret() -> None:
    expires, signature = parts(sign(SECRET, KEY, 1000))

    assert not verify(SECRET, KEY + "x", expires, signature, now=0)
    assert not verify(SECRET, KEY, expires + 1, signature, now=0)
    assert not verify(bytes(32), KEY, expires, signature, now=0)


def test_digits_cannot_move_between_end_and_key() -> None:
    _, signature = parts(sign(SECRET, "1/a", 100))

    assert not verify(SECRET, "/a", 1001, signature, now=0)


@given(st.text(max_size=80))
def test_no_other_text_is_a_signature(text: str) -> None:
    _, signature = parts(sign(SECRET, KEY, 1000))

    assert (text == signature) == verify(SECRET, KEY, 1000, text, now=0)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**40))
def test_query_needs_no_escaping(secret: bytes, expires: int) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=&")

    assert set(sign(secret, KEY, expires)) <= allowed
