"""What `REDIS_URL` may say."""

import pytest

from ai_ticket.limit.address import RedisAddress, parse_redis_url

SECRET = "hush-Zq81"


@pytest.mark.parametrize(
    ("url", "address", "name"),
    [
        ("redis://cache", RedisAddress(host="cache"), "cache:6379"),
        (" redis://cache/ ", RedisAddress(host="cache"), "cache:6379"),
        ("REDIS://cache:7000/3", RedisAddress(host="cache", port=7000, database=3), "cache:7000"),
        ("redis://[::1]:7000", RedisAddress(host="::1", port=7000), "[::1]:7000"),
        ("redis://bücher.example", RedisAddress(host="bücher.example"), "bücher.example:6379"),
        ("redis://:p%40ss%2F@cache", RedisAddress(host="cache", password="p@ss/"), "cache:6379"),
        ("redis://me:pass@cache", RedisAddress(host="cache", user="me", password="pass"), "cache:6379"),
        ("rediss://cache:7000", RedisAddress(host="cache", port=7000, tls=True), "cache:7000"),
        ("unix:///run/redis.sock", RedisAddress(path="/run/redis.sock"), "/run/redis.sock"),
        ("unix://:pass@/run/a%20b", RedisAddress(path="/run/a b", password="pass"), "/run/a b"),
    ],
)
def test_what_is_understood(url: str, address: RedisAddress, name: str) -> None:
    parsed = parse_redis_url(url)
    assert parsed == address
    assert parsed.name == name


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "must be a redis"),
        ("cache:6379", "must be a redis"),
        (f"http://:{SECRET}@cache", "must be a redis"),
        (f"redis://:{SECRET}@", "names no host"),
        ("redis:///0", "names no host"),
        (f"redis://{SECRET}@cache", "no password before the @"),
        (f"redis://cache:{SECRET}", "the port must be"),
        (f"redis://:{SECRET}@cache:0", "the port must be"),
        (f"redis://:{SECRET}@cache:65536", "the port must be"),
        (f"redis://:a#{SECRET}@cache", "query or a fragment"),
        (f"redis://:a?{SECRET}@cache", "query or a fragment"),
        (f"redis://:a/{SECRET}@cache", "query or a fragment"),
        (f"redis://:{SECRET}@[cache", "is not a URL"),
        (f"redis://:{SECRET}@ca che", "not a name that a host can have"),
        (f"redis://:{SECRET}@cache/first", "the database must be"),
        (f"redis://:{SECRET}@cache/1/2", "the database must be"),
        (f"redis://:{SECRET}@cache/-1", "the database must be"),
        (f"redis://:{SECRET}@cache/{'9' * 5000}", "the database must be"),
        ("unix://run/redis.sock", "by its whole path"),
        ("unix:", "by its whole path"),
        ("unix:///" + "x" * 107, "107 bytes"),
    ],
)
def test_what_is_not(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_redis_url(url)
    assert SECRET not in str(caught.value)


def test_it_does_not_show_its_password() -> None:
    assert SECRET not in repr(parse_redis_url(f"redis://me:{SECRET}@cache"))
