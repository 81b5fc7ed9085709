import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.media.addresses import (
    allowed,
    effective,
    parse_address,
    parse_networks,
    why_refused,
)

PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "93.184.216.34",
    "100.63.255.255",
    "100.128.0.1",
    "172.15.255.255",
    "172.32.0.1",
    "2606:4700:4700::1111",
    "2a00:1450:4001:800::200e",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
]
REFUSED = [
    ("0.0.0.0", "unspecified"),
    ("10.1.2.3", "private"),
    ("100.64.0.1", "shared by a carrier's customers"),
    ("127.0.0.1", "loopback"),
    ("127.255.255.254", "loopback"),
    ("169.254.1.1", "link-local"),
    ("169.254.169.254", "a cloud's metadata service"),
    ("169.254.170.2", "a cloud's metadata service"),
    ("168.63.129.16", "a cloud's metadata service"),
    ("100.100.100.200", "a cloud's metadata service"),
    ("192.0.0.192", "a cloud's metadata service"),
    ("172.16.0.1", "private"),
    ("172.31.255.255", "private"),
    ("192.168.1.1", "private"),
    ("192.0.2.1", "reserved for documentation"),
    ("198.19.0.1", "reserved for benchmarks"),
    ("224.0.0.1", "multicast"),
    ("240.0.0.1", "reserved"),
    ("255.255.255.255", "reserved"),
    ("::", "unspecified"),
    ("::1", "loopback"),
    ("fc00::1", "private"),
    ("fd12:3456::1", "private"),
    ("fd00:ec2::254", "a cloud's metadata service"),
    ("fe80::1", "link-local"),
    ("fe80::1%eth0", "link-local"),
    ("ff02::1", "multicast"),
    ("2001:db8::1", "reserved for documentation"),
    ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "a Teredo tunnel"),
    ("2002:7f00:1::", "a 6to4 tunnel"),
    ("2002:808:808::", "a 6to4 tunnel"),
    ("::ffff:127.0.0.1", "loopback"),
    ("::ffff:a9fe:a9fe", "a cloud's metadata service"),
    ("64:ff9b::7f00:1", "loopback"),
    ("64:ff9b::169.254.169.254", "a cloud's metadata service"),
    ("64:ff9b:1::1", "a private translation to IPv4"),
    ("::127.0.0.1", "reserved"),
    ("100::1", "reserved"),
    ("5f00::1", "reserved"),
]


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = parse_address(text)
    assert found is not None
    return found


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_are_fetched_from(text: str) -> None:
    assert why_refused(address(text)) is None


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_other_addresses_are_refused_with_the_reason(text: str, reason: str) -> None:
    assert reason == why_refused(address(text))


@pytest.mark.parametrize("text", ["example.com", "127.1", "0x7f.0.0.1", "2130706433", "", "1.2.3.4.5", "[::1]"])
def test_what_is_no_address_is_a_name(text: str) -> None:
    assert parse_address(text) is None


@given(st.ip_addresses(v=4))
def test_ipv4_is_judged_alike_in_every_wrapping(inner: ipaddress.IPv4Address) -> None:
    mapped = ipaddress.IPv6Address(0xFFFF << 32 | int(inner))
    translated = ipaddress.IPv6Address(0x64FF9B << 96 | int(inner))

    assert inner == effective(mapped) == effective(translated)
    assert why_refused(inner) == why_refused(mapped) == why_refused(translated)


@given(st.ip_addresses())
def test_what_passes_is_global_by_python_too(any_: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if why_refused(any_) is None:
        assert effective(any_).is_global


def test_operator_permits_private_networks() -> None:
    networks = parse_networks(["10.0.0.0/8", "fd12::/16", "127.0.0.1"])

    assert why_refused(address("10.9.9.9"), networks) is None
    assert why_refused(address("::ffff:10.9.9.9"), networks) is None
    assert why_refused(address("fd12::5"), networks) is None
    assert why_refused(address("127.0.0.1"), networks) is None
    assert why_refused(address("127.0.0.2"), networks) == "loopback"
    assert why_refused(address("192.168.0.1"), networks) == "private"
    assert not allowed(address("8.8.8.8"), networks)


def test_a_network_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.0/40"):
        parse_networks(["10.0.0.0/40"])
