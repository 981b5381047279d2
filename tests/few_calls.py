"""A limiter whose windows never end."""

from collections import Counter

from twisted.internet.defer import Deferred, succeed

from ai_ticket.interfaces import Admission


class FewCalls:
    """A `Limiter` that admits the first calls of each client, and tells the others to come back after half the window.

    With `slow` its answers wait in `waiting` until the test fires them.
    """

    def __init__(self, limit: int = 10, window: float = 60.0, *, slow: bool = False) -> None:
        self.limit = limit
        self.window = window
        self.calls: Counter[str] = Counter()
        self.waiting: list[tuple[Deferred[Admission], Admission]] = []
        self._slow = slow

    def admit(self, client: str) -> Deferred[Admission]:
        admitted = self.calls[client] < self.limit
        self.calls[client] += admitted
        answer = Admission(admitted, self.limit - self.calls[client], self.window / 2)
        if not self._slow:
            return succeed(answer)
        waiting: Deferred[Admission] = Deferred()
        self.waiting.append((waiting, answer))
        return waiting
