"""Where a model server is: what `KOBOLDCPP_API_URL` may say, taken apart."""

from hyperlink import URL, URLParseError
from msgspec import Struct

LOCAL = "local:"
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


def parse_api_url(text: str) -> BackendAddress:
    """Read an address, leaving out a trailing `/api`, `/api/v1` or `/v1`.

    @raise ValueError: it is not an http or https URL, nor `local:`.
    """
    text = text.strip()
    if text.startswith(LOCAL):
        return BackendAddress(name="local", url=None, model_path=text.removeprefix(LOCAL) or None)
    if "," in text or "|" in text:
        raise ValueError("more than one server is not yet supported")
    try:
        url = URL.from_text(text)
    except (URLParseError, ValueError) as error:
        raise ValueError(f"not a URL: {error}")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("must be an http:// or https:// URL, or local:")
    if url.userinfo or url.query or url.fragment:
        raise ValueError("may not hold a user, a query or a fragment")
    path = tuple(segment for segment in url.path if segment)
    for suffix in _API_SUFFIXES:
        if path[-len(suffix) :] == suffix:
            path = path[: -len(suffix)]
            break
    host = f"[{url.host}]" if ":" in url.host else url.host
    return BackendAddress(name=f"{host}:{url.port}", url=url.replace(path=path).to_text().rstrip("/"))
