"""Who calls, behind proxies: what a caller writes into X-Forwarded-For changes nothing."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_ticket.web.client_address import client_address, quota_key

PEER = "192.0.2.1"
JUNK = st.binary(max_size=60) | st.sampled_from(
    [b"", b" ", b"unknown", b"_hidden", b"10.0.0.1", b"::1", b"x" * 9000, b"," * 9000, b", \t" * 3000, b"\xff\xfe"]
)
ADDRESSES = st.ip_addresses().map(str)
SPACE = st.text(" \t", max_size=3)


@pytest.mark.parametrize(
    ("header", "trusted", "found"),
    [
        (None, 0, PEER),
        (None, 1, PEER),
        (b"203.0.113.9", 0, PEER),
        (b"203.0.113.9", 1, "203.0.113.9"),
        (b"203.0.113.9", 2, PEER),
        (b"6.6.6.6, 203.0.113.9", 1, "203.0.113.9"),
        (b"6.6.6.6, 203.0.113.9, 10.0.0.1", 2, "203.0.113.9"),
        (b"6.6.6.6,203.0.113.9,10.0.0.1", 3, "6.6.6.6"),
        (b"6.6.6.6, 203.0.113.9, 10.0.0.1", 4, PEER),
        # Empty entries and white space.
        (b"", 1, PEER),
        (b" , ,\t,", 1, PEER),
        (b"6.6.6.6,, \t203.0.113.9\t ,, ", 1, "203.0.113.9"),
        (b"6.6.6.6, 203.0.113.9, , 10.0.0.1", 2, "203.0.113.9"),
        # Forms of an address.
        (b"2001:DB8:0:0::9", 1, "2001:db8::9"),
        (b"[2001:db8::9]", 1, "2001:db8::9"),
        (b"[2001:db8::9]:4711", 1, "2001:db8::9"),
        (b"203.0.113.9:4711", 1, "203.0.113.9"),
        (b"::ffff:203.0.113.9", 1, "203.0.113.9"),
        (b"[::ffff:cb00:7109]:1", 1, "203.0.113.9"),
        (b"fe80::1%eth0", 1, "fe80::1"),
        (b"fe80::1%\xff<script>", 1, "fe80::1"),
        # What is none.
        (b"unknown", 1, PEER),
        (b"203.0.113.9 6.6.6.6", 1, PEER),
        (b"203.0.113.9:", 1, PEER),
        (b"203.0.113.9:port", 1, PEER),
        (b"203.0.113.9:123456", 1, PEER),
        (b"203.0.113.9%eth0", 1, PEER),
        (b"203.0.113", 1, PEER),
        (b"203.0.113.256", 1, PEER),
        (b"203.0.113.010", 1, PEER),
        (b"203.0.113.\xb9", 1, PEER),
        (b"3405803785", 1, PEER),
        (b"0xcb007109", 1, PEER),
        (b"[203.0.113.9]", 1, PEER),
        (b"[2001:db8::9", 1, PEER),
        (b"2001:db8::9]:1", 1, PEER),
        (b"[[2001:db8::9]]", 1, PEER),
        (b"2001:db8::9::1", 1, PEER),
        (b'"203.0.113.9"', 1, PEER),
        (b"for=203.0.113.9", 1, PEER),
        (b"203.0.113.9\x00", 1, PEER),
        (b"203.0.113.9\x0b", 1, PEER),
        (b"\xef\xbb\xbf203.0.113.9", 1, PEER),
        (b"fe80::1%" + b"x" * 16000, 1, PEER),
        (b"6.6.6.6, unknown", 1, PEER),
    ],
)
def test_the_nth_address_from_the_right(header: bytes | None, trusted: int, found: str) -> None:
    assert client_address(PEER, header, trusted) == found


@given(st.lists(JUNK, max_size=5), st.lists(st.tuples(SPACE, ADDRESSES, SPACE), min_size=1, max_size=16))
def test_what_stands_left_of_the_nth_entry_changes_nothing(
    spoofed: list[bytes], added: list[tuple[str, str, str]]
) -> None:
    """Whatever the caller sent, in however many headers: it is left of what the trusted proxies add."""
    entries = ["".join(entry).encode() for entry in added]
    alone = client_address(PEER, b",".join(entries), len(entries))
    assert alone == client_address(added[0][1], None, 0)
    assert client_address(PEER, b", ".join([*spoofed, *entries]), len(entries)) == alone
    assert client_address(PEER, b",".join([*spoofed, *entries]), len(entries)) == alone


@given(st.none() | st.binary(max_size=200) | st.lists(JUNK, max_size=9).map(b",".join), st.integers(0, 16), ADDRESSES)
def test_whatever_comes_the_answer_is_an_address(header: bytes | None, trusted: int, peer: str) -> None:
    found = client_address(peer, header, trusted)
    assert str(ipaddress.ip_address(found)) == found
    assert "%" not in found
    assert quota_key(found)


@pytest.mark.parametrize(
    ("peer", "found"),
    [("::ffff:192.0.2.7", "192.0.2.7"), ("fe80::1%eth0", "fe80::1"), ("2001:DB8::1", "2001:db8::1"), ("?", "?")],
)
def test_the_peer_has_one_form_too(peer: str, found: str) -> None:
    """A socket that takes both kinds shows IPv4 callers as IPv6 addresses."""
    assert client_address(peer, None, 0) == found


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("?", "?"),
    ],
)
def test_whose_quota(address: str, key: str) -> None:
    assert quota_key(address) == key


@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_one_quota_for_all_of_a_64(address: ipaddress.IPv6Address, host: int) -> None:
    if address.ipv4_mapped is not None:
        return
    neighbour = ipaddress.IPv6Address(int(address) >> 64 << 64 | host)
    other = ipaddress.IPv6Address(int(address) ^ 1 << 64)
    if neighbour.ipv4_mapped is None:
        assert quota_key(str(address)) == quota_key(str(neighbour))
    assert quota_key(str(address)) != quota_key(str(other))
