"""The channel between processes: messages whole, in order, and not without bounds."""

import socket
from typing import Any

import pytest
from linked import connect, result_of
from twisted.internet.defer import CancelledError
from twisted.internet.testing import StringTransport

from ai_ticket.interfaces import Admission
from ai_ticket.workers import channel as module
from ai_ticket.workers.channel import Channel, Questions, frame, from_parent, from_worker, read_one
from ai_ticket.workers.message import Message
from ai_ticket.workers.messages import Admit, Admitted, Outlook, Ping, Pong, Ready


class End:
    """One end; `received` is what came, `lost` how often it was told that it is closed."""

    def __init__(self, decoder: Any = from_worker) -> None:
        self.received: list[Message] = []
        self.lost = 0
        self.channel = Channel(decoder, self.received.append, self._lost)

    def _lost(self) -> None:
        self.lost += 1


SOME = [Ready(), Admit(1, "quota", "a" * 300), Pong(1, 2)]


@pytest.mark.parametrize("size", [1, 3, 4, 5, 1000])
def test_messages_arrive_whole_and_in_order_however_the_bytes_come(size: int) -> None:
    end = End()
    end.channel.makeConnection(StringTransport())
    data = b"".join(map(frame, SOME))
    for begin in range(0, len(data), size):
        end.channel.dataReceived(data[begin : begin + size])
    assert end.received == SOME


def test_the_end_of_what_came_together_is_told() -> None:
    """Not after each message, and not only when all of them are whole."""
    seen: list[object] = []

    def take(message: Message) -> None:
        assert channel.reading
        seen.append(message)

    def read() -> None:
        assert not channel.reading
        seen.append(None)

    channel = Channel(from_worker, take, lambda: None, read)
    channel.makeConnection(StringTransport())
    data = b"".join(map(frame, SOME))
    channel.dataReceived(data[:-1])
    channel.dataReceived(data[-1:])
    assert seen == [*SOME[:2], None, SOME[2], None]


@pytest.mark.expects_logged_failure
def test_what_can_not_be_told_costs_no_channel() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    channel = Channel(from_worker, lambda _: None, lambda: None, broken)
    transport = StringTransport()
    channel.makeConnection(transport)
    channel.dataReceived(frame(SOME[0]))
    assert not transport.disconnecting


def test_both_ways() -> None:
    worker, parent = End(from_parent), End()
    connect(worker.channel, parent.channel)
    worker.channel.send(Ready())
    parent.channel.send(Outlook(5, True))
    assert parent.received == [Ready()]
    assert worker.received == [Outlook(5, True)]


def test_the_end_is_told_once_at_both_ends_and_nothing_is_sent_any_more() -> None:
    worker, parent = End(from_parent), End()
    connect(worker.channel, parent.channel)
    parent.channel.close()
    assert (worker.lost, parent.lost) == (1, 1)
    worker.channel.send(Ready())
    parent.channel.close()
    assert (worker.lost, parent.lost) == (1, 1)


def test_who_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_UNREAD", 1000)
    end = End()
    transport = StringTransport()
    end.channel.makeConnection(transport)
    end.channel.send(Admit(1, "quota", "x" * 2000))
    assert not transport.disconnecting, "it was read"
    end.channel.pauseProducing()
    end.channel.send(Admit(2, "quota", "x" * 800))
    end.channel.resumeProducing()
    end.channel.pauseProducing()
    end.channel.send(Admit(3, "quota", "x" * 800))
    assert not transport.disconnecting
    end.channel.send(Admit(4, "quota", "x" * 800))
    assert transport.disconnecting


def test_a_frame_that_is_too_large_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_FRAME", 1000)
    end = End()
    transport = StringTransport()
    end.channel.makeConnection(transport)
    end.channel.dataReceived((1001).to_bytes(4, "big"))
    assert transport.disconnecting


@pytest.mark.expects_logged_failure
def test_a_message_that_can_not_be_taken_leaves_the_others_alone() -> None:
    taken = []

    def take(message: Message) -> None:
        if isinstance(message, Admit):
            raise RuntimeError("a bug")
        taken.append(message)

    channel = Channel(from_worker, take, lambda: None)
    channel.makeConnection(StringTransport())
    channel.dataReceived(b"".join(map(frame, SOME)))
    assert taken == [Ready(), Pong(1, 2)]


def test_one_is_read_before_there_is_a_reactor_and_nothing_behind_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame(Ready()) + frame(Pong(1, 2)))
        assert read_one(ours, from_worker) == Ready()
        assert ours.recv(1000) == frame(Pong(1, 2))
        theirs.close()
        with pytest.raises(EOFError):
            read_one(ours, from_worker)


class TestQuestions:
    def test_answers_find_their_questions(self) -> None:
        asked: list[Any] = []
        questions = Questions(asked.append)
        first, second = (questions.ask(lambda number, who=who: Admit(number, "quota", who)) for who in "ab")
        assert [(each.number, each.client) for each in asked] == [(1, "a"), (2, "b")]
        questions.answered(2, "for b")
        questions.answered(1, "for a")
        assert (result_of(first), result_of(second)) == ("for a", "for b")

    def test_who_no_longer_wants_to_know(self) -> None:
        questions = Questions(lambda message: None)
        asking = questions.ask(lambda number: Admit(number, "quota", "a"))
        asking.cancel()
        questions.answered(1, Admitted(1, Admission(True, 1, 0.0)))
        assert isinstance(result_of(asking), CancelledError)

    def test_none_is_left_without_an_answer(self) -> None:
        questions = Questions(lambda message: None)
        asking = [questions.ask(lambda number: Ping(1.0, 0, False)) for _ in range(2)]
        questions.fail(ValueError("gone"))
        assert [str(result_of(each)) for each in asking] == ["gone", "gone"]
