"""Sample payloads in the log, to see what callers really send: few, short, and without what looks like a credential.

Hidden is, rather too much than too little:

- what follows a name with `password`, `secret`, `token`, `auth`, `cookie`, `api_key` or the like in it, as the value of
  a JSON field (also of JSON in a string), header, parameter or assignment; numbers of tokens excepted
- what follows `Bearer` or `Basic`, and the user and password in a URL
- PEM blocks, JSON Web Tokens, and keys by their well-known beginnings: `sk-`, `hf_`, `ghp_`, `AKIA`, ...
- any unbroken run of `RUN` or more characters of hexadecimal or Base64; long paths are that too

A password in prose ("it is sesame"), or one that stands before its name, can't be told from other words. What is not
UTF-8 text is not shown.
"""

import codecs
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ai_ticket.errors import DomainError, InternalError

LONGEST = 4096
"""Characters of a payload that are logged."""

RUN = 20
MINUTE = 60.0
HIDDEN = "(hidden)"

_READ = 2 * LONGEST
"""Bytes of a payload that are looked at: more would hold up the service."""

_ESCAPE = re.compile(r"(?<!\\)\\+(?:u00([0-7][0-9a-fA-F])|(/))")
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

_LETTER = re.compile(r"[A-Za-z0-9]")

_SPACE = r"(?:\s|\\+[nrt])*"
_NAME = re.compile(
    r"(?i)(?:pass(?:word|wd|phrase|code)|pwd|secret|credential|cookie|session|token|auth(?!or(?!i[sz]))"
    r"|(?:api|access|private|signing|encryption|[_-])[_-]?key)(?P<rest>[\w-]{0,40})"
    rf"(?:(?P<quoted>\\*[\"']){_SPACE}(?:[:=]+>?|,{_SPACE}\\*[\"']value\\*[\"']{_SPACE}:|,)|[ \t]*(?:=>|[:=])){_SPACE}"
)
_NO_SECRET = re.compile(r"(?:true|false|null)\b")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?![\w.])")
_STRING = re.compile(r"(?s)(\\*[\"']).*?(?:(?<!\\)\1|\Z)")
"""It ends with the same quote, escaped as often as its first."""

_REST_OF_LINE = re.compile(r"(?:(?!(?<!\\)(?:\"|\\[nr]))[^\n\r])*")
"""Up to where the line ends, or the JSON string around it does."""

_BEGIN = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf]))"
_BLOCK = re.compile(r"(?s)-----BEGIN .*?(?:-----END [^-]{0,80}-----|\Z)")
_CREDENTIALS = (
    re.compile(r"(?<=://)(?:(?!://)[^\s\"]){1,512}@"),
    re.compile(rf"(?i){_BEGIN}(?:bearer|basic)(?:\s|\\[nrt])+[^\s\"'\\,]+"),
    re.compile(
        rf"{_BEGIN}(?:(?:[spr]k|glpat|pypi|xox[a-z])[-_]|(?:hf|gh[pousr]|github_pat|npm|whsec)_"
        r"|AKIA|ASIA|AIza|ya29\.|SG\.|eyJ)[\w.=+/-]{4,}"
    ),
    re.compile(rf"[A-Za-z0-9+/=_%-]{{{RUN},}}"),
)


def payloads_a_minute(setting: str) -> int:
    """What LOG_PAYLOADS asks for: `off` is 0, `sample:N` is N.

    @raise ValueError: it is neither.
    """
    if setting.lower() == "off":
        return 0
    name, _, number = setting.partition(":")
    if name.lower() == "sample" and re.fullmatch(r"[1-9][0-9]{0,3}", number):
        return int(number)
    raise ValueError("must be off, or sample:N with N from 1 to 9999 payloads a minute")


class PayloadSampler:
    """Logs some payloads, at DEBUG."""

    _log = Logger()

    def __init__(self, a_minute: int, clock: IReactorTime, wanted: Callable[[], bool]):
        """@param wanted: whether DEBUG lines are logged."""
        self._clock = clock
        self._wanted = wanted
        self._taken: deque[float] = deque()
        self.a_minute = a_minute

    @property
    def a_minute(self) -> int:
        """How many are logged in any minute, at the most; 0: none."""
        return self._a_minute

    @a_minute.setter
    def a_minute(self, count: int) -> None:
        self._a_minute = count
        self._taken = deque(self._taken, maxlen=count)

    @contextmanager
    def sampling(self, request_id: str, route: str, body: bytes) -> Iterator[Callable[[str], None]]:
        """Sample the payload of what is done within, with its outcome: `ok`, `cancelled`, or an error's code.

        What it gives is to be told the code of an error that is not raised.
        """
        outcome = InternalError.code
        told: list[str] = []
        try:
            yield told.append
            outcome = told[-1] if told else "ok"
        except CancelledError:
            outcome = "cancelled"
            raise
        except DomainError as error:
            outcome = error.code
            raise
        finally:
            self.sample(request_id, route, body, outcome)

    def sample(self, request_id: str, route: str, body: bytes, outcome: str) -> None:
        """Log the payload of a request if it is its turn.

        @param outcome: `ok`, or the code of the error that it was answered with.
        """
        if not self._a_minute or not self._wanted():
            return
        now = self._clock.seconds()
        if len(self._taken) == self._a_minute and now - self._taken[0] < MINUTE:
            return
        self._taken.append(now)
        self._log.debug(
            "payload of {route}: {outcome}",
            route=route,
            outcome=outcome,
            request_id=request_id,
            size=len(body),
            payload=shown(body),
        )


def shown(body: bytes) -> str | None:
    """The beginning of a payload, without credentials; None if it is not text."""
    whole = len(body) <= _READ
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(body[:_READ], final=whole)
    except UnicodeDecodeError:
        return None
    if _NOT_TEXT.search(text):
        return None
    if not whole:  # its last word may be half of a credential
        text = text[: max(text.rfind(end) for end in ' \t\r\n"') + 1]
    return without_credentials(text)[:LONGEST]


def without_credentials(text: str) -> str:
    """The text with what looks like a credential hidden, and with needless JSON escapes taken out."""
    text = _BLOCK.sub(HIDDEN, _ESCAPE.sub(_unescaped, text))
    parts = []
    at = 0
    while name := _NAME.search(text, at):
        parts.append(text[at : name.end()])
        value, at = _value(text, name.end(), name)
        parts.append(value)
    text = "".join([*parts, text[at:]])
    for credential in _CREDENTIALS:
        text = credential.sub(_hidden, text)
    return text


def _hidden(found: re.Match[str]) -> str:
    return HIDDEN if _LETTER.search(found[0]) else found[0]  # a rule of dashes is no credential


def _unescaped(escape: re.Match[str]) -> str:
    if escape[2]:
        return "/"
    character = chr(int(escape[1], 16))
    if character in "\"'\\":
        return "\\" + character
    return character if character.isprintable() else " "


def _value(text: str, at: int, name: re.Match[str]) -> tuple[str, int]:
    """What to show for the value that begins here, and where it ends."""
    number = _NUMBER.match(text, at)
    kept = _NO_SECRET.match(text, at) or (number if name["rest"].lower() == "s" else None)
    if kept:
        return kept[0], kept.end()
    string = _STRING.match(text, at)
    if string:
        return f"{string[1]}{HIDDEN}{string[1]}", string.end()
    if text[at : at + 1] in ("[", "{"):  # where that ends is hard to say, if it is not well formed
        return HIDDEN, len(text)
    if name["quoted"] and number:
        return HIDDEN, number.end()
    rest = _REST_OF_LINE.match(text, at)
    return (HIDDEN, rest.end()) if rest and rest[0] else ("", at)
