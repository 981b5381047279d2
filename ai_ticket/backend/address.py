"""Where the model servers are: what `KOBOLDCPP_API_URL` and the variables that go with it may say, taken apart."""

import idna
from hyperlink import URL, URLParseError
from msgspec import Struct

from ai_ticket.urls import request_url

LOCAL = "local:"
MOST_SLOTS = 1024
_API_SUFFIXES = (("api", "v1"), ("api",), ("v1",))


class BackendAddress(Struct, frozen=True):
    """A model server's name for metrics and logs, and its root URL, or the model file of the bundled server.

    `url` is None for the bundled server, whose port is not known before it runs; `model_path` is then the model to
    load, or None for the bundled one.
    """

    name: str
    url: str | None
    model_path: str | None = None


class Location(Struct, frozen=True):
    """Where a model server is now, and the key that it asks for."""

    url: str
    api_key: str | None

    def __repr__(self) -> str:
        return f"Location({self.url!r})"


def parse_api_urls(text: str) -> list[list[BackendAddress]]:
    """Read all addresses: `,` between ranks, the preferred one first, `|` between the equals of a rank.

    @raise ValueError: one of them can't be read, or is named twice.
    """
    texts = [rank.split("|") for rank in text.split(",")]
    if texts == [[text]]:
        return [[parse_api_url(text)]]
    ranks = [[_one_of_several(address) for address in rank] for rank in texts]
    names = [address.name for rank in ranks for address in rank]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is named twice")
    return ranks


def _one_of_several(text: str) -> BackendAddress:
    if not text.strip():
        raise ValueError("an address between the separators is missing")
    try:
        return parse_api_url(text)
    except ValueError as error:
        raise ValueError(f"{text.strip()!r} {error}")


def parse_passwords(text: str | None, count: int) -> list[str | None]:
    """The password of each of so many servers; None where there is none.

    @raise ValueError: there are neither one nor as many as servers.
    """
    # With a single server there is nothing to separate: its password may have commas.
    return [text] if count == 1 else _one_for_each(text, count)


def parse_slots(text: str | None, count: int) -> list[int | None]:
    """The slots of each of so many servers; None for what the server says.

    @raise ValueError: there are neither one nor as many as servers, or one is not a whole number in its bounds.
    """
    return [_slots(entry) for entry in _one_for_each(text, count)]


def _slots(entry: str | None) -> int | None:
    if entry is None:
        return None
    # isdecimal, because int() takes signs, blanks and underscores too.
    if not (entry.isascii() and entry.isdecimal() and len(entry) <= 4 and 1 <= int(entry) <= MOST_SLOTS):
        raise ValueError(f"must be a whole number from 1 to {MOST_SLOTS} for all servers, or one for each")
    return int(entry)


def _one_for_each(text: str | None, count: int) -> list[str | None]:
    entries = [entry.strip() or None for entry in (text or "").split(",")]
    if len(entries) == 1:
        return entries * count
    if len(entries) != count:
        servers = "1 server" if count == 1 else f"{count} servers"
        raise ValueError(f"has {len(entries)} entries for {servers}: give one for all, or one for each, in order")
    return entries


def parse_api_url(text: str) -> BackendAddress:
    """Read one address, leaving out a trailing `/api`, `/api/v1` or `/v1`.

    @raise ValueError: it is not an http or https URL, nor `local:`.
    """
    text = text.strip()
    if text.startswith(LOCAL):
        return BackendAddress(name="local", url=None, model_path=text.removeprefix(LOCAL) or None)
    try:
        url = URL.from_text(text)
    except (URLParseError, ValueError) as error:
        raise ValueError(f"is not a URL: {error}")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("must be an http:// or https:// URL, or local:")
    if url.userinfo or url.query or url.fragment:
        raise ValueError("may not hold a user, a query or a fragment")
    if not 0 < (url.port or 0) < 65_536:
        raise ValueError("the port must be from 1 to 65535")
    try:
        request_url(text)
        url.host.encode("ascii") if ":" in url.host else idna.encode(url.host.rstrip("."), uts46=True)
    except ValueError as error:
        raise ValueError(f"not a name that a host can have: {error}")
    path = tuple(segment for segment in url.path if segment)
    for suffix in _API_SUFFIXES:
        if path[-len(suffix) :] == suffix:
            path = path[: -len(suffix)]
            break
    host = f"[{url.host}]" if ":" in url.host else url.host
    return BackendAddress(name=f"{host}:{url.port}".lower(), url=url.replace(path=path).to_text().rstrip("/"))
