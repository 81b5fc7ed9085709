"""Which addresses may be fetched from. Pure: judges addresses, resolves nothing.

Sources: the IANA IPv4 and IPv6 special-purpose address registries (RFC 6890 and its updates) and the
metadata addresses that AWS, GCP, Azure, Alibaba and Oracle document. Python's ``is_global`` is only a second
net: what it covers differs between patch releases.
"""

import ipaddress
from collections.abc import Sequence
from typing import Final

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# The first network that holds the address names the reason, so the narrow ones stand before the wide ones.
_REFUSED: Final[tuple[tuple[IPNetwork, str], ...]] = tuple(
    (ipaddress.ip_network(network), name)
    for network, name in (
        ("169.254.169.254/32", "a cloud's metadata service"),
        ("169.254.170.0/24", "a cloud's metadata service"),
        ("168.63.129.16/32", "a cloud's metadata service"),
        ("100.100.100.200/32", "a cloud's metadata service"),
        ("192.0.0.192/32", "a cloud's metadata service"),
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared by a carrier's customers"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "reserved for documentation"),
        ("192.88.99.0/24", "a 6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "reserved for benchmarks"),
        ("198.51.100.0/24", "reserved for documentation"),
        ("203.0.113.0/24", "reserved for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
        ("fd00:ec2::/32", "a cloud's metadata service"),
        ("fd20:ce::254/128", "a cloud's metadata service"),
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "private"),
        ("ff00::/8", "multicast"),
        ("64:ff9b:1::/48", "a private translation to IPv4"),
        ("2001::/32", "a Teredo tunnel"),
        ("2001:db8::/32", "reserved for documentation"),
        ("2001::/23", "reserved"),
        ("2002::/16", "a 6to4 tunnel"),
        ("3fff::/20", "reserved for documentation"),
    )
)
_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")
"""All IPv6 unicast space that IANA has given out; whatever lies outside is refused unnamed."""
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")


def parse_address(text: str) -> IPAddress | None:
    """The address that ``text`` is, or None for a name.

    A zone (``fe80::1%eth0``) is cut off. Old forms of IPv4 (``0x7f.1``, ``2130706433``) are names here: the
    resolver turns them into an address, and that one is judged.
    """
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


def parse_networks(texts: Sequence[str]) -> tuple[IPNetwork, ...]:
    """The networks of an allow list. Raises ValueError that names the one that is none."""
    return tuple(ipaddress.ip_network(text.strip(), strict=False) for text in texts)


def effective(address: IPAddress) -> IPAddress:
    """The address that packets end at: the IPv4 one inside an IPv4-mapped or a NAT64 address (RFC 6052).

    NAT64 is judged by what it holds rather than refused: on a network with IPv6 alone, every public IPv4 host
    has such an address.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def allowed(address: IPAddress, allow: Sequence[IPNetwork]) -> bool:
    """Whether the operator's list names the address."""
    address = effective(address)
    return any(address.version == network.version and address in network for network in allow)


def why_refused(address: IPAddress, allow: Sequence[IPNetwork] = ()) -> str | None:
    """The words for why the address is no public one (``loopback``, ``private``, …); None where it may be
    fetched from.
    """
    if allowed(address, allow):
        return None
    address = effective(address)
    for network, name in _REFUSED:
        if address.version == network.version and address in network:
            return name
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_V6:
        return "reserved"
    return None if address.is_global else "not public"
