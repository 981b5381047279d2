"""JSON from callers: strict, bounded in depth, and never slower than its size warrants.

msgspec is strict by itself (no NaN, nothing after the document) but for three things that the contract wants otherwise:
invalid UTF-8 in a skipped value passes, a lone surrogate in one does not, and how deep a document may nest depends on
the interpreter.
"""

import re
import sys
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

MAX_DEPTH = 500
"""Documents nested as deep as this or less pass; those twice as deep never do (see `too_deep`)."""

LONE_SURROGATE_MARK = "\ufdd0"
"""Stands where an escaped lone surrogate was: a noncharacter, which no text has (Unicode 23.7)."""

_CHECK_DEPTH = sys.version_info >= (3, 12)
"""Up to Python 3.11 the decoder shares the interpreter's recursion limit of 1,000; later it goes ten times as deep."""

_BLOCK = 400
_MOST_BRACKETS = 65_536
_OPENERS_AND_QUOTES = bytes.maketrans(b"{}", b"[]")
_ALL_BUT_OPENERS_AND_QUOTES = bytes(set(range(256)) - set(b'[]{}"'))
_MOST_LONE_SURROGATES = 1000
"""More than a text that was cut in places has; a body with more of them is not worth the time, and is refused."""

_LONE_SURROGATE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)


class JSONError(ValueError):
    """The text is not JSON that we accept; the message says why and at which byte, without quoting it."""


def check(body: bytes) -> None:
    """Check what a typed decoder does not.

    @raise JSONError: the body is not UTF-8, or nested too deep.
    """
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JSONError(f"invalid UTF-8 (byte {error.start})")
    if _CHECK_DEPTH and too_deep(body):
        raise JSONError("nested too deep")


def mark_lone_surrogates(body: bytes) -> bytes:
    """Put LONE_SURROGATE_MARK in the place of each escaped lone surrogate, so that the rest can be decoded."""
    if b"\0" in body:  # not JSON; and below it stands for an escaped backslash, whose second half escapes nothing
        return body
    hidden = body.replace(rb"\\", b"\0\0")
    return _LONE_SURROGATE.sub(rb"\\ufdd0", hidden, count=_MOST_LONE_SURROGATES).replace(b"\0\0", rb"\\")


def decode(text: bytes | msgspec.Raw, type: type[T] | Any) -> T:
    """Decode a checked document, or a part of one.

    @raise JSONError: it is not JSON. @raise msgspec.ValidationError: it is not of the type.
    """
    try:
        return msgspec.json.decode(text, type=type)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise JSONError(str(error))
    except RecursionError:
        raise JSONError("nested too deep")


def complaint(error: msgspec.ValidationError) -> str:
    """What msgspec says, without the value that it quotes where only some are allowed."""
    text = str(error)
    if not text.startswith("Invalid enum value"):
        return text
    _, at, path = text.rpartition(" - at `$")
    return f"Not one of the allowed values{at}{path if at else ''}"


def too_deep(body: bytes) -> bool:
    """Whether brackets nest too deep, in time proportional to the size whatever the content.

    Depth is known exactly at the ends of blocks; within one it can rise by no more than the block's length. So anything
    deeper than MAX_DEPTH + _BLOCK is found, and nothing up to MAX_DEPTH is.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return False
    brackets = _brackets(body)
    depth = 0
    for start in range(0, len(brackets), _BLOCK):
        block = brackets[start : start + _BLOCK]
        depth += block.count(b"[") - block.count(b"]")
        if depth > MAX_DEPTH:
            return True
    return False


def deeper_than(text: bytes, levels: int) -> bool:
    """Whether a part of a document nests deeper than so many levels, of which there are to be few.

    It takes as many passes over the brackets, so a part with very many of them counts as deeper whatever it is.
    """
    brackets = _brackets(text)
    if len(brackets) > _MOST_BRACKETS:
        return True
    for _ in range(levels):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _brackets(body: bytes) -> bytes:
    """The brackets and braces outside of strings, all as brackets."""
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
    bare = bare.translate(_OPENERS_AND_QUOTES, _ALL_BUT_OPENERS_AND_QUOTES)
    # Of strings only their quotes are left, so an empty pair can go: what is inside and what outside stays the same.
    return b"".join(bare.replace(b'""', b"").split(b'"')[::2])
