"""The caller's IP address, behind however many proxies are trusted to tell it, and whose quota it counts for."""

import re
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

LONGEST_ENTRY = 64
"""Characters; an IPv6 address with brackets, zone and port has fewer."""

REMEMBERED = 4096
"""Addresses. To take an IPv6 address apart costs a tenth of a request."""

_WITH_PORT = re.compile(r"\[([^\[\]]*:[^\[\]]*)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")


def client_address(peer: str, forwarded_for: bytes | None, trusted: int) -> str:
    """The address that the outermost trusted proxy saw: the n-th from the right of all X-Forwarded-For headers.

    Each proxy adds the address that it was called from at the right end; what stands further to the left came from the
    caller, who can write anything there. It is not looked at.

    @param peer: the address that the connection comes from: the answer where there are fewer than n entries, or where
        the n-th is no IP address. A port after it, which some proxies write, is left out.
    @param forwarded_for: the headers' values, joined with commas. Empty entries do not count (RFC 9110, 5.6.1).
    @param trusted: how many proxies there are in front, n. 0 ignores the header.
    """
    entry = b""
    rest = forwarded_for or b""
    for _ in range(trusted):
        rest, _, entry = rest.rstrip(b", \t").rpartition(b",")
    return _entry_address(entry) or _address(peer) or peer


@lru_cache(REMEMBERED)
def quota_key(address: str) -> str:
    """Whose quota an address counts for: its own; of IPv6 the /64, from all of which one customer can call."""
    if ":" in address:
        address = _address(address) or address
    if ":" in address:
        return f"{IPv6Address(int(IPv6Address(address)) >> 64 << 64)}/64"
    return address


def _entry_address(entry: bytes) -> str | None:
    text = entry.strip(b" \t").decode("latin-1")
    if len(text) > LONGEST_ENTRY:
        return None
    with_port = _WITH_PORT.fullmatch(text)
    return _address(text if with_port is None else with_port[1] or with_port[2])


@lru_cache(REMEMBERED)
def _address(text: str) -> str | None:
    """An IP address in its usual form, without a zone, an IPv4 address in IPv6 as what it is; None if it is none."""
    try:
        found = ip_address(text)
    except ValueError:
        return None
    if isinstance(found, IPv6Address):
        return str(found.ipv4_mapped or IPv6Address(int(found)))
    return str(found)
