"""Where the Redis or Valkey server is: what `REDIS_URL` may say. Needs none of what the `redis` extra brings."""

from urllib.parse import SplitResult, unquote, urlsplit

import idna
from msgspec import Struct

DEFAULT_PORT = 6379
MOST_DIGITS = 6  # of a database's number
LONGEST_PATH = 107  # bytes: what the kernel takes for a socket
_NO_SUCH_PORT = "the port must be from 1 to 65535"


class RedisAddress(Struct, frozen=True, kw_only=True):
    """A server, and who we are to it. `path` is that of a Unix socket; without one there is a `host`."""

    host: str = ""
    port: int = DEFAULT_PORT
    tls: bool = False
    path: str | None = None
    database: int = 0
    user: str | None = None
    password: str | None = None

    @property
    def name(self) -> str:
        """What to call it in logs: no secrets in it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"

    def __repr__(self) -> str:
        return f"RedisAddress({self.name!r})"


def parse_redis_url(text: str) -> RedisAddress:
    """Read `redis://[user:password@]host[:port][/database]`, rediss:// for TLS, or `unix:///path`.

    @raise ValueError: it is none of these; what it says holds no secret.
    """
    try:
        url = urlsplit(text.strip())
    except ValueError:
        raise ValueError("is not a URL") from None
    if url.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must be a redis://, rediss:// or unix:// URL")
    if url.query or url.fragment or (url.scheme != "unix" and "@" in url.path):
        raise ValueError("may not hold a query or a fragment; in a password, write ? as %3F, # as %23 and / as %2F")
    user, password = _login(url)
    if url.scheme == "unix":
        return RedisAddress(path=_path(url), user=user, password=password)
    return RedisAddress(
        host=_host(url),
        port=_port(url),
        tls=url.scheme == "rediss",
        database=_database(url.path.removeprefix("/")),
        user=user,
        password=password,
    )


def _login(url: SplitResult) -> tuple[str | None, str | None]:
    if "@" not in url.netloc:
        return None, None
    if not url.password:
        raise ValueError("has no password before the @: it goes after a colon, as in redis://:password@host")
    return unquote(url.username or "") or None, unquote(url.password)


def _path(url: SplitResult) -> str:
    path = unquote(url.path)
    if url.netloc.rpartition("@")[2] or not path.startswith("/") or "\0" in path:
        raise ValueError("must name the socket by its whole path, as in unix:///run/redis.sock")
    if len(path.encode()) > LONGEST_PATH:
        raise ValueError(f"the path of a socket may have {LONGEST_PATH} bytes at the most")
    return path


def _host(url: SplitResult) -> str:
    host = unquote(url.hostname or "")
    if not host:
        raise ValueError("names no host")
    try:
        host.encode("ascii") if ":" in host else idna.encode(host.rstrip("."), uts46=True)
    except ValueError:
        raise ValueError("the host is not a name that a host can have") from None
    return host


def _port(url: SplitResult) -> int:
    try:
        port = DEFAULT_PORT if url.port is None else url.port
    except ValueError:
        raise ValueError(_NO_SUCH_PORT) from None
    if port == 0:
        raise ValueError(_NO_SUCH_PORT)
    return port


def _database(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS):
        raise ValueError("the database must be a whole number, as in redis://host/0")
    return int(text)
