"""URLs in the form that treq takes without parsing them again for each request."""

from hyperlink import URL


class _IPv6URL(URL):
    """A URL whose host is an IPv6 address: hyperlink would have it encoded like a name, and fail.

    See https://github.com/python-hyper/hyperlink/issues/68; treq asks for that encoding in every request.
    """

    def to_uri(self) -> URL:
        return self


def request_url(text: str) -> URL:
    """A URL ready for requests.

    @raise ValueError: it is not a URL (hyperlink's `URLParseError` is one).
    """
    url = URL.from_text(text)
    return _IPv6URL.from_text(text) if ":" in url.host else url.to_uri()
