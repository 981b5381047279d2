"""What the parent and its workers tell each other. No text of an event is in it, and no token.

Text of an answer is where its caller asks for what has come so far, and his question comes to another worker.
"""

from msgspec import Struct

from ai_ticket.backend.address import Location
from ai_ticket.interfaces import Admission, BackendState, Client
from ai_ticket.settings import Settings
from ai_ticket.tokens import Token
from ai_ticket.web.site import Tally
from ai_ticket.workers.message import Fault, Message
from ai_ticket.workers.messages_of_generations import AboutGenerations, AnswersAboutGenerations


class Sample(Struct, frozen=True, array_like=True):
    """A value of a metric. `exemplar` is its labels, its value and its time."""

    name: str
    labels: dict[str, str]
    value: float
    exemplar: tuple[dict[str, str], float, float | None] | None = None


class Family(Struct, frozen=True, array_like=True):
    """A metric and its samples, as prometheus_client's registry gives them."""

    name: str
    kind: str
    what: str
    samples: list[Sample]


# From a worker to the parent.


class Ready(Message, frozen=True):
    """It serves."""


class Admit(Message, frozen=True):
    """May a call of this client go on? `limiter` is the quota's or the one of invalid tokens."""

    number: int
    limiter: str
    client: str


class AskRoom(Message, frozen=True):
    """Would an event of this client be taken in?"""

    number: int
    client: Client
    deadline: float


class Submit(Message, frozen=True):
    """An event's way through the pipeline begins. `stream`: its caller is told its place while it waits.

    `key`: as `Event` has it.
    """

    number: int
    client: Client
    timeout: float
    deadline: float | None
    batch: bool
    stream: bool
    key: str | None


class Cancel(Message, frozen=True):
    """Its caller no longer wants it. Its attempt, if there was one, has been stopped."""

    number: int


class Attempted(Message, frozen=True):
    """How the attempt at it has ended; without a fault the caller has the answer already."""

    number: int
    fault: Fault | None = None


class Samples(Message, frozen=True):
    """The answer to `AskSamples`."""

    number: int
    families: list[Family]


class AskMetrics(Message, frozen=True):
    """What are the metrics of the whole service, for this Accept header?"""

    number: int
    accept: str


class Pong(Message, frozen=True):
    """Its reactor turns, and it has so many connections of callers, and uses so many bytes of memory."""

    connections: int
    memory: int


class Stopping(Message, frozen=True):
    """It was told to stop, with so many requests under way."""

    in_flight: int


class Stopped(Message, frozen=True):
    """It has finished, or cut, what was under way."""

    tally: Tally


FromWorker = (
    Ready
    | Admit
    | AskRoom
    | Submit
    | Cancel
    | Attempted
    | Samples
    | AskMetrics
    | Pong
    | Stopping
    | Stopped
    | AboutGenerations
    | AnswersAboutGenerations
)


# From the parent to a worker.


class Pem(Struct, frozen=True, array_like=True):
    """A certificate chain and its key, as their files have them."""

    certificate: bytes
    key: bytes


class InForce(Message, frozen=True):
    """All that SIGHUP can change in a worker. `payloads`: how many it may log a minute.

    `memory_limit`: in bytes, of all processes together; None: there is none.
    """

    log_level: str
    payloads: int
    configured_tokens: list[Token]
    file_tokens: list[Token]
    pem: Pem
    memory_limit: int | None


class Learnt(Message, frozen=True):
    """What is known of a backend, and where a bundled one is now. Backends are numbered in order of rank."""

    backend: int
    state: BackendState
    location: Location | None


class Outlook(Message, frozen=True):
    """How things are in the pipeline: its `batch_window`, and whether anyone's event would be taken in.

    That holds for events with half of REQUEST_TIMEOUT_SECONDS left or more.
    """

    batch_window: int
    roomy: bool


class PassedPort(Struct, frozen=True, array_like=True):
    """A port that a worker inherits, by the name of its endpoint. `ours`: the service has bound it itself."""

    name: str
    fd: int
    ours: bool


class Start(Message, frozen=True):
    """The first message: what a worker is, and all it needs to know. `reactor` is the module of the parent's."""

    worker: int
    reactor: str
    settings: Settings
    ports: list[PassedPort]
    in_force: InForce
    backends: list[Learnt]
    outlook: Outlook


class Admitted(Message, frozen=True):
    """The answer to `Admit`."""

    number: int
    admission: Admission


class Room(Message, frozen=True):
    """The answer to `AskRoom`."""

    number: int
    fault: Fault | None


class Attempt(Message, frozen=True):
    """An event has a slot of this backend until its deadline. Its turn came at `began_at`."""

    number: int
    backend: int
    deadline: float
    began_at: float


class Ended(Message, frozen=True):
    """An event has failed for good: what was under way for it is to stop."""

    number: int
    fault: Fault


class Place(Message, frozen=True):
    """An event that waits has this place in the queue."""

    number: int
    place: int


class AskSamples(Message, frozen=True):
    """What are the worker's metrics?"""

    number: int


class Metrics(Message, frozen=True):
    """The answer to `AskMetrics`."""

    number: int
    text: bytes
    content_type: str


class Ping(Message, frozen=True):
    """Does the reactor turn? And so many connections of callers the workers have each, on average.

    `memory`: bytes that the other processes use. `lagging`: the parent's own event loop is late.
    """

    connections: float
    memory: int
    lagging: bool


class Stop(Message, frozen=True):
    """The service ends: go through all phases of it, and say how it went."""


class Hurry(Message, frozen=True):
    """Cut what is under way at once."""


FromParent = (
    Start
    | InForce
    | Learnt
    | Outlook
    | Admitted
    | Room
    | Attempt
    | Ended
    | Place
    | AskSamples
    | Metrics
    | Ping
    | Stop
    | Hurry
    | AboutGenerations
    | AnswersAboutGenerations
)
