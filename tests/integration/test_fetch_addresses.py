"""Where a fetch may lead: addresses, names, redirects; against real hosts on the loopback interface."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rushes.errors import MediaError
from rushes.media.fetch import FetchPolicy, check_url, fetch
from support.fetching import HERE, PNG, refusal, resolves_to
from support.https_server import Asked, Handler, Write, answer, serve, write_authority

LOOPBACK = ("127.0.0.0/8",)


@pytest.fixture
def policy(tmp_path: Path) -> FetchPolicy:
    return FetchPolicy(allow=LOOPBACK, seconds=30, ca_file=write_authority(tmp_path))


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "fetched"


# -- addresses ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/a.png", "input_not_https"),
        ("ftp://example.com/a.png", "input_not_https"),
        ("file:///etc/passwd", "input_not_https"),
        ("gopher://example.com/", "input_not_https"),
        ("example.com/a.png", "input_not_https"),
        ("", "input_not_https"),
        ("https://", "input_url_invalid"),
        ("https:///a.png", "input_url_invalid"),
        ("https://user:secret@example.com/a.png", "input_url_invalid"),
        ("https://example.com:0/", "input_url_invalid"),
        ("https://example.com:99999/", "input_url_invalid"),
        ("https://example.com\\@127.0.0.1/", "input_url_invalid"),
        ("https://exa mple.com/", "input_url_invalid"),
        ("https://example.com/\r\nX-Evil: 1", "input_url_invalid"),
        ("https://example.com/a\x00.png", "input_url_invalid"),
        ("https://[::1", "input_url_invalid"),
        ("https://[fe80::1%25eth0]/", "input_url_invalid"),
        ("https://example.com/" + "a" * 9000, "input_url_invalid"),
        ("https://127.0.0.1/", "input_address_refused"),
        ("https://localhost/", "input_address_refused"),
        ("https://a.localhost./", "input_address_refused"),
        ("https://10.0.0.1:8443/", "input_address_refused"),
        ("https://169.254.169.254/latest/meta-data/", "input_address_refused"),
        ("https://[::1]/", "input_address_refused"),
        ("https://[::ffff:127.0.0.1]/", "input_address_refused"),
        ("https://[fd00:ec2::254]/", "input_address_refused"),
        ("https://[64:ff9b::a9fe:a9fe]/", "input_address_refused"),
        ("https://\uff11\uff12\uff17.0.0.1/", "input_address_refused"),
    ],
)
def test_refused_at_submit_without_a_look_at_the_network(url: str, reason: str) -> None:
    with pytest.raises(MediaError) as caught:
        check_url(url, FetchPolicy())

    assert reason == caught.value.reason
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://Example.COM", "https://example.com/"),
        (" https://example.com.:443/a ", "https://example.com/a"),
        ("https://example.com:8443/a?b#c", "https://example.com:8443/a?b"),
        ("https://bücher.example/ä", "https://xn--bcher-kva.example/%C3%A4"),
        ("https://example.com/a%2Fb", "https://example.com/a%2Fb"),
        ("https://[2606:4700:4700::1111]/a", "https://[2606:4700:4700::1111]/a"),
        ("HTTPS://8.8.8.8/", "https://8.8.8.8/"),
    ],
)
def test_public_addresses_pass_at_submit(url: str, target: str) -> None:
    assert target == check_url(url, FetchPolicy()).url


@pytest.mark.parametrize(
    "answers",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["fe80::1%eth0"],
        ["::ffff:192.168.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["127.0.0.1", "2606:4700:4700::1111"],
    ],
)
async def test_host_with_any_address_that_is_not_public_is_refused(dest: Path, answers: list[str]) -> None:
    resolver, asked = resolves_to(answers)
    error = await refusal("https://media.test/", dest, FetchPolicy(), resolver)

    assert error.reason == "input_address_refused"
    assert asked == ["media.test"]


@pytest.mark.parametrize("host", ["127.1", "0x7f.0.0.1", "2130706433", "0177.0.0.1"])
async def test_old_forms_of_loopback_are_refused_once_resolved(dest: Path, host: str) -> None:
    """Real resolver: it takes these for 127.0.0.1."""
    with pytest.raises(MediaError) as caught:
        await fetch(f"https://{host}/", dest, policy=FetchPolicy())

    assert caught.value.reason == "input_address_refused"


async def test_name_that_changes_its_address_stays_pinned(policy: FetchPolicy, dest: Path) -> None:
    """DNS rebinding: the second answer would lead to another server on the same port."""
    resolver, asked = resolves_to(["127.0.0.1"], ["127.0.0.2"])
    async with (
        serve(answer(PNG)) as host,
        serve(answer(b"secret"), address="127.0.0.2", port=host.port) as inside,
    ):
        await fetch(f"https://media.test:{host.port}/", dest, policy=policy, resolver=resolver)

    assert dest.read_bytes() == PNG
    assert asked == ["media.test"]
    assert [a.local for a in host.asked] == ["127.0.0.1"]
    assert inside.asked == []


async def test_redirect_to_itself_is_judged_anew(policy: FetchPolicy, dest: Path) -> None:
    """Rebinding over a redirect: the same name, now an address that is not permitted."""
    resolver, asked = resolves_to(["127.0.0.1"], ["169.254.169.254"])
    async with serve(answer(b"", "302 Found", Location="/again")) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy, resolver)

    assert error.reason == "input_address_refused"
    assert asked == ["media.test", "media.test"]


async def test_plain_http_outside_the_allowed_networks(policy: FetchPolicy, dest: Path) -> None:
    resolver, _ = resolves_to(["8.8.8.8"])
    error = await refusal("http://media.test/", dest, policy, resolver)

    assert error.reason == "input_not_https"


async def test_unknown_host(dest: Path) -> None:
    async def resolver(host: str, port: int) -> Sequence[str]:
        raise OSError(-2, "Name or service not known")

    error = await refusal("https://nowhere.test/", dest, FetchPolicy(), resolver)

    assert error.reason == "input_unreachable"
    assert "nowhere.test" in error.message


async def test_host_that_refuses_connections(policy: FetchPolicy, dest: Path) -> None:
    async with serve(answer(PNG)) as host:
        port = host.port
    error = await refusal(f"https://media.test:{port}/", dest, policy)

    assert error.reason == "input_unreachable"


@pytest.mark.parametrize("name", ["other.test", "127.0.0.2"])
async def test_certificate_must_fit_the_name(policy: FetchPolicy, dest: Path, name: str) -> None:
    async with serve(answer(PNG), names=(name,)) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy)

    assert error.reason == "input_unreachable"
    assert "certificate" in error.message
    assert host.asked == []


async def test_certificate_must_be_trusted(policy: FetchPolicy, dest: Path) -> None:
    async with serve(answer(PNG)) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, FetchPolicy(allow=LOOPBACK))

    assert "certificate" in error.message


# -- redirects ------------------------------------------------------------------------------------------------
def hops(count: int) -> Handler:
    """Redirects that often, then the picture."""

    async def handle(asked: Asked, write: Write) -> None:
        left = int(asked.path.strip("/") or count)
        then = answer(PNG) if left == 0 else answer(b"", "302 Found", Location=f"/{left - 1}")
        await then(asked, write)

    return handle


async def test_three_redirects_are_followed(policy: FetchPolicy, dest: Path) -> None:
    resolver, asked = resolves_to(["127.0.0.1"])
    async with serve(hops(3)) as host:
        await fetch(f"https://media.test:{host.port}/", dest, policy=policy, resolver=resolver)

    assert dest.read_bytes() == PNG
    assert [a.path for a in host.asked] == ["/", "/2", "/1", "/0"]
    assert len(asked) == 4


async def test_a_fourth_redirect_is_not(policy: FetchPolicy, dest: Path) -> None:
    async with serve(hops(4)) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy)

    assert error.reason == "input_too_many_redirects"
    assert len(host.asked) == 4


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("https://10.0.0.1/", "input_address_refused"),
        ("https://169.254.169.254/latest/meta-data/", "input_address_refused"),
        ("//[::1]/", "input_address_refused"),
        ("http://8.8.8.8/", "input_not_https"),
        ("file:///etc/passwd", "input_not_https"),
        ("https://user:pw@media.test/", "input_url_invalid"),
        ("https://[::1", "input_url_invalid"),
    ],
)
async def test_redirects_to_where_an_address_may_not_lead(
    policy: FetchPolicy, dest: Path, location: str, reason: str
) -> None:
    async with serve(answer(b"", "302 Found", Location=location)) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy)

    assert error.reason == reason
    assert "media.test" in error.message


async def test_redirect_without_a_location_goes_round_until_the_limit(policy: FetchPolicy, dest: Path) -> None:
    async with serve(answer(b"", "302 Found")) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy)

    assert error.reason == "input_too_many_redirects"


async def test_hosts_do_not_share_connections(policy: FetchPolicy, tmp_path: Path) -> None:
    """Two names on one address: each has its own handshake."""
    async with serve(answer(PNG), names=("a.test", "b.test")) as host:
        for name in ("a.test", "b.test"):
            await fetch(f"https://{name}:{host.port}/", tmp_path / name, policy=policy, resolver=HERE)

    assert [a.server_name for a in host.asked] == ["a.test", "b.test"]
