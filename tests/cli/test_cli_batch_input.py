"""The lines of a batch's input: from a file, and from a pipe as they come."""

import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred

from ai_ticket.cli import batch_input
from ai_ticket.cli.batch_input import FileLines, Line, PipedLines, Splitter, survey


@given(st.lists(st.text(alphabet='{}" x\r', max_size=5)), st.data())
def test_lines_do_not_depend_on_how_they_come(texts, data):
    """Numbers count every line, blank ones are left out, and white space around is too."""
    content = "\n".join(texts).encode()
    splitter, found, rest = Splitter(), [], content
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += splitter.feed(rest[:size])
        rest = rest[size:]
    found += splitter.end()
    expected = [Line(number, text.strip().encode()) for number, text in enumerate(texts) if text.strip()]
    assert found == expected
    assert splitter.count == content.count(b"\n") + (content[-1:] not in (b"", b"\n"))


def test_a_line_that_is_too_long(monkeypatch):
    """It is there, without its content, and is not kept in memory; those around it are whole."""
    monkeypatch.setattr(batch_input, "LONGEST_LINE", 4)
    splitter = Splitter()
    assert list(splitter.feed(b"1234\n12")) == [Line(0, b"1234")]
    assert list(splitter.feed(b"345")) == []
    assert splitter._partial == b""
    assert list(splitter.feed(b"678\n9\n12345")) == [Line(1, None), Line(2, b"9")]
    assert list(splitter.end()) == [Line(3, None)]


def test_a_survey():
    """Two inputs that differ anywhere differ in it; the file is at its start again."""
    file = io.BytesIO(b"{}\n\n{}\n \n{}")
    found = survey(file)
    assert (found.lines, found.events) == (5, 3)
    assert file.tell() == 0
    assert survey(io.BytesIO(b"{}\n\n{}\n \n[]")) != found
    assert (survey(io.BytesIO()).lines, survey(io.BytesIO()).events) == (0, 0)


@ensureDeferred
async def test_a_file_is_read_as_it_is_needed(monkeypatch):
    monkeypatch.setattr(batch_input, "_CHUNK", 4)
    file = io.BytesIO(b"1\n2\n3\n4\n5")
    lines = FileLines(file)
    assert await anext(lines) == Line(0, b"1")
    assert file.tell() == 4
    assert [line.content async for line in lines] == [b"2", b"3", b"4", b"5"]


class Readers:
    """Where a reactor has its readers."""

    def __init__(self):
        self.reading = set()

    def addReader(self, reader):
        self.reading.add(reader)

    def removeReader(self, reader):
        self.reading.discard(reader)


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    ends = {reading, writing}

    def close(end):
        os.close(end)
        ends.discard(end)

    yield reading, writing, close
    for end in ends:
        os.close(end)


def waits(lines):
    return Deferred.fromCoroutine(anext(lines))


@ensureDeferred
async def test_a_pipe(pipe):
    """Whoever waits gets what comes in turn, and nothing is read while nobody waits."""
    reading, writing, _ = pipe
    readers = Readers()
    lines = PipedLines(readers, reading)
    assert not readers.reading
    first, second = waits(lines), waits(lines)
    assert readers.reading == {lines}
    os.write(writing, b"1\n")
    lines.doRead()
    assert await first == Line(0, b"1")
    assert not second.called
    os.write(writing, b"2\n3\n4\n")
    lines.doRead()
    assert await second == Line(1, b"2")
    assert not readers.reading
    assert [await anext(lines), await anext(lines)] == [Line(2, b"3"), Line(3, b"4")]
    assert not readers.reading


@ensureDeferred
async def test_the_end_of_a_pipe(pipe):
    """It ends all who wait, after a last line without an end."""
    reading, writing, close = pipe
    readers = Readers()
    lines = PipedLines(readers, reading)
    waiting = [waits(lines) for _ in range(3)]
    os.write(writing, b"1")
    lines.doRead()
    close(writing)
    lines.doRead()
    assert await waiting[0] == Line(0, b"1")
    for ended in waiting[1:]:
        with pytest.raises(StopAsyncIteration):
            await ended
    with pytest.raises(StopAsyncIteration):
        await anext(lines)
    assert not readers.reading


@ensureDeferred
async def test_giving_up_on_a_pipe(pipe):
    """The reactor is free of it, and the next line is for the next."""
    reading, writing, _ = pipe
    readers = Readers()
    lines = PipedLines(readers, reading)
    first, second = waits(lines), waits(lines)
    first.cancel()
    with pytest.raises(CancelledError):
        await first
    os.write(writing, b"1\n")
    lines.doRead()
    assert await second == Line(0, b"1")
    third = waits(lines)
    third.cancel()
    with pytest.raises(CancelledError):
        await third
    assert not readers.reading


@ensureDeferred
async def test_a_pipe_that_cannot_be_read(pipe):
    """That is not its end."""
    _, writing, _ = pipe
    lines = PipedLines(Readers(), writing)
    waiting = waits(lines)
    lines.doRead()
    with pytest.raises(OSError, match="Bad file descriptor"):
        await waiting


@pytest.mark.parametrize("content", [b"1\n2", b"1\n2\n"])
@ensureDeferred
async def test_a_pipe_under_the_reactor(pipe, content):
    """Which tells of the end in its own way."""
    reading, writing, close = pipe
    os.write(writing, content)
    close(writing)
    assert [line.content async for line in PipedLines(reactor, reading)] == [b"1", b"2"]
