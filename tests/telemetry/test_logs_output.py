"""A reader of the log that does not read holds nobody up; what it misses is counted, and all else stays in order."""

import errno
import os
import pty
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_log import Reader

from ai_ticket.telemetry.logs_output import Descriptor, Output, standard_output


def told(count: int) -> bytes:
    return b"%d dropped\n" % count


class TestOutput:
    def test_lines_go_straight_to_a_reader_that_reads(self) -> None:
        reader = Reader()
        output = Output(reader, told)
        output.write(b"one\n")
        assert reader.data == b"one\n"
        assert not output.behind

    def test_lines_wait_for_a_reader_that_does_not(self) -> None:
        reader = Reader()
        output = Output(reader, told)
        reader.room = 6
        output.write(b"one\n")
        output.write(b"two\n")
        output.write(b"three\n")
        assert reader.data == b"one\ntw"
        assert output.behind
        assert reader.waits == []
        reader.room = None
        output.flush()
        assert reader.data == b"one\ntwo\nthree\n"
        assert not output.behind

    def test_the_backlog_is_bounded_and_what_was_dropped_is_told_in_its_place(self) -> None:
        reader = Reader()
        output = Output(reader, told, limit=8)
        reader.room = 0
        for line in (b"one\n", b"two\n", b"three\n", b"4\n"):
            output.write(line)
        reader.room = None
        output.flush()
        output.write(b"five\n")
        assert reader.data == b"one\ntwo\n2 dropped\nfive\n"

    def test_a_reader_that_is_gone(self) -> None:
        reader = Reader()
        output = Output(reader, told)
        reader.error = OSError(errno.EPIPE, "gone")
        output.write(b"one\n")
        output.write(b"two\n")
        reader.error = None
        output.flush()
        assert reader.data == b"2 dropped\n"

    def test_a_disk_that_fills_up_within_a_line_leaves_the_next_line_whole(self) -> None:
        reader = Reader()
        output = Output(reader, told)
        reader.room = 2
        output.write(b"one\n")
        reader.error = OSError(errno.ENOSPC, "full")
        output.flush()
        reader.error, reader.room = None, None
        output.write(b"two\n")
        output.write(b"three\n")
        assert reader.data == b"on\n2 dropped\nthree\n"

    def test_a_line_from_within_a_write_comes_after_it(self) -> None:
        class Talkative(Reader):
            def write(self, data: bytes) -> int:
                if data == b"one\n":
                    output.write(b"two\n")
                return super().write(data)

        reader = Talkative()
        output = Output(reader, told)
        output.write(b"one\n")
        assert reader.data == b"one\ntwo\n"

    def test_settling_waits_for_the_reader(self) -> None:
        reader = Reader()
        output = Output(reader, told)
        reader.room = 0
        output.write(b"one\n")
        reader.when_waited_for = lambda: setattr(reader, "room", None)
        output.settle(5)
        assert reader.data == b"one\n"
        reader.room = 0
        output.write(b"later\n")
        assert reader.data == b"one\nlater\n"

    def test_settling_gives_up(self) -> None:
        reader = Reader()
        output = Output(reader, told)
        reader.room = 0
        output.write(b"one\n")
        output.settle(5)
        assert len(reader.waits) == 1

    @given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 60))
    def test_whatever_the_reader_does_each_line_is_there_in_order_or_counted(
        self, rooms: list[int], limit: int
    ) -> None:
        reader = Reader()
        output = Output(reader, told, limit)
        for number, room in enumerate(rooms):
            reader.room = room
            output.write(b"line %d\n" % number)
        reader.room = None
        output.flush()
        found = reader.data.decode().splitlines()
        numbers = [int(line.split()[1]) for line in found if line.startswith("line")]
        dropped = sum(int(line.split()[0]) for line in found if line.endswith("dropped"))
        assert numbers == sorted(set(numbers))
        assert len(numbers) + dropped == len(rooms)

    def test_threads_do_not_mix_lines_up(self) -> None:
        reader = Reader()
        output = Output(reader, told)
        threads = [
            threading.Thread(target=lambda name=name: [output.write(b"%d\n" % name * 3) for _ in range(200)])
            for name in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines = reader.data.split(b"\n")[:-1]
        assert len(lines) == 2400
        assert all(lines[at] == lines[at + 1] == lines[at + 2] for at in range(0, 2400, 3))


@pytest.fixture(params=["pipe", "terminal", "socket", "pipe that can't be opened again"])
def stalled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Both ends of something whose reader does not read."""
    if request.param == "terminal":
        reading, writing = pty.openpty()
    elif request.param == "socket":
        reading, writing = (end.detach() for end in socket.socketpair())
    else:
        reading, writing = os.pipe()
    if request.param.endswith("again"):

        def refuse(*_: object) -> int:
            raise PermissionError

        monkeypatch.setattr(os, "open", refuse)
    yield reading, writing
    os.close(reading)
    os.close(writing)


class TestDescriptor:
    def test_it_refuses_what_would_block(self, stalled: tuple[int, int]) -> None:
        reading, writing = stalled
        stream = Descriptor(writing)
        stream.unblock()
        taken = 0
        with pytest.raises(BlockingIOError):
            for _ in range(10_000):
                taken += stream.write(b"x" * 1000)
        assert taken > 1000
        assert not stream.wait(0)
        assert os.get_blocking(writing)  # as those expect who share it
        while taken > 0:
            taken -= len(os.read(reading, 65536))
        assert stream.wait(10)
        assert stream.write(b"y" * 1000) > 0
        stream.close()

    def test_a_file_is_written_where_others_left_off(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        path.write_text("before\n")
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            stream = Descriptor(file.fileno())
            stream.unblock()
            assert stream.write(b"one\n") == 4
            os.write(file.fileno(), b"another\n")
            assert stream.write(b"two\n") == 4
        assert path.read_text() == "before\none\nanother\ntwo\n"

    def test_a_reader_that_is_gone_is_an_error(self) -> None:
        reading, writing = os.pipe()
        stream = Descriptor(writing)
        stream.unblock()
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            stream.write(b"one\n")
        stream.close()
        os.close(writing)

    def test_colours_are_for_terminals_whose_users_want_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        (reading, terminal), (pipe_end, pipe) = pty.openpty(), os.pipe()
        assert Descriptor(terminal).coloured
        assert not Descriptor(pipe).coloured
        monkeypatch.setenv("NO_COLOR", "")
        assert Descriptor(terminal).coloured
        monkeypatch.setenv("NO_COLOR", "1")
        assert not Descriptor(terminal).coloured
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "dumb")
        assert not Descriptor(terminal).coloured
        for fd in (reading, terminal, pipe_end, pipe):
            os.close(fd)

    def test_a_process_without_standard_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.__stdout__", None)
        assert standard_output().write(b"one\n") == 4
