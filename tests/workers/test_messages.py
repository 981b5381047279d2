"""What goes between the processes arrives as it was."""

import msgspec
import pytest

from ai_ticket import errors
from ai_ticket.backend.server import NoSuchEndpoint
from ai_ticket.errors import DomainError, InternalError
from ai_ticket.settings import Settings
from ai_ticket.web.faults import NotFound
from ai_ticket.workers.message import Fault
from ai_ticket.workers.messages import InForce, Outlook, PassedPort, Pem, Start

KINDS = [
    each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, DomainError) and each is not DomainError
]


def sent(error: DomainError) -> DomainError:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(Fault.of(error)), type=Fault).error()


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_the_same_at_the_other_end(kind: type[DomainError]) -> None:
    error = kind("what exactly")
    error.retry_after = 2.5
    error.message = "For a person."
    error.after_first_token = True
    error.backend = "a:1"
    found = sent(error)
    assert type(found) is kind
    assert (found.code, found.message, found.details, found.retry_after, found.after_first_token, found.backend) == (
        kind.code,
        "For a person.",
        "what exactly",
        2.5,
        True,
        "a:1",
    )


def test_a_kind_that_one_room_knows_is_the_one_it_is_of() -> None:
    assert type(sent(NoSuchEndpoint("404"))) is errors.ApiClientError


def test_a_kind_that_is_of_none_is_internal() -> None:
    assert type(sent(NotFound())) is InternalError


def test_the_settings_are_the_same_at_the_other_end() -> None:
    start = Start(
        worker=1,
        reactor="twisted.internet.epollreactor",
        settings=Settings(koboldcpp_password="secret", shutdown_delay_seconds=0.5, otel_traces_exporter="none"),
        ports=[PassedPort("https", 4, True)],
        in_force=InForce("INFO", 0, [], [], Pem(b"c", b"k"), 4096),
        backends=[],
        outlook=Outlook(17, True),
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(start), type=Start) == start
