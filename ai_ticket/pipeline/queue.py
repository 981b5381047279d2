"""Whose turn it is: a queue with a lane for each client, served in fair turn by weight. Pure: it knows no time.

The order is start-time fair queueing. Each client has a tag, which a job that is served moves on by 1/weight; the
lowest tag is next, and the queue's own virtual time is the tag that was served last. Whoever begins to wait starts
there, or at its own last tag, if that is ahead: so a newcomer is behind nobody's backlog, and going away and coming
back gains nothing.
"""

from collections import OrderedDict, deque
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain, count
from math import ceil, floor

from ai_ticket.interfaces import Client, Job

REMEMBERED_LANES = 4096
"""Clients of which none waits, and that are remembered for being ahead. Beyond, all of those are forgotten at once."""

_HAIR = 1e-9
"""What sums of 1/weight may be off."""


class _Lane:
    """A client's jobs, the interactive ones before those of batches; each kind in the order in which it came."""

    __slots__ = ("batch", "interactive", "key", "tag", "turn", "weight")

    def __init__(self, client: Client, tag: float, turn: int):
        self.key = client.key
        self.weight = client.weight
        self.tag = tag
        self.turn = turn  # among equal tags the lowest is next
        self.interactive: OrderedDict[Job, None] = OrderedDict()
        self.batch: OrderedDict[Job, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.interactive) + len(self.batch)

    def jobs(self, batch: bool) -> OrderedDict[Job, None]:
        return self.batch if batch else self.interactive

    @property
    def load(self) -> float:
        """Interactive jobs by weight."""
        return len(self.interactive) / self.weight


class FairQueue:
    """Jobs that wait, in fair order. Whoever owns it decides how many may."""

    def __init__(self) -> None:
        # Each lane has one entry in `_order`. It stays there when its last job has gone, until it is no longer ahead.
        self._lanes: dict[str, _Lane] = {}
        self._waiting: dict[str, _Lane] = {}
        self._order: list[tuple[float, int, _Lane]] = []
        self._turns = count()
        self._virtual_time = 0.0
        self._size = 0
        self._interactive = 0

    def __len__(self) -> int:
        return self._size

    @property
    def interactive(self) -> int:
        """How many of the jobs are not of a batch."""
        return self._interactive

    @property
    def remembered(self) -> int:
        """Clients that take up memory."""
        return len(self._lanes)

    def push(self, job: Job) -> None:
        """Put a job at the end of its kind in its client's lane."""
        client = job.client
        lane = self._lanes.get(client.key)
        if lane is None:
            lane = self._lanes[client.key] = _Lane(client, self._virtual_time, next(self._turns))
            heappush(self._order, (lane.tag, lane.turn, lane))
        lane.weight = client.weight
        self._waiting[client.key] = lane
        lane.jobs(job.batch)[job] = None
        self._size += 1
        self._interactive += not job.batch

    def pop(self) -> Job:
        """Take the job whose turn it is; there must be one."""
        tag, _, lane = self._order[0]
        while not lane:
            heappop(self._order)
            del self._lanes[lane.key]
            tag, _, lane = self._order[0]
        self._virtual_time = tag
        lane.tag = tag + 1 / lane.weight
        lane.turn = next(self._turns)
        heapreplace(self._order, (lane.tag, lane.turn, lane))
        job, _ = (lane.interactive or lane.batch).popitem(last=False)
        self._removed(job, lane)
        return job

    def remove(self, job: Job) -> None:
        """Take out a job that waits."""
        lane = self._waiting[job.client.key]
        del lane.jobs(job.batch)[job]
        self._removed(job, lane)

    def position(self, job: Job) -> int:
        """Which in turn a job that waits is, 1 being the next, if no other client begins to wait meanwhile."""
        lane = self._waiting[job.client.key]
        ahead = len(lane.interactive) if job.batch else 0
        for other in lane.jobs(job.batch):
            if other is job:
                break
            ahead += 1
        return self._place(lane, ahead)

    def place_for(self, client: Client) -> int:
        """The position that an interactive job of this client would have."""
        lane = self._lanes.get(client.key) or _Lane(client, self._virtual_time, next(self._turns))
        return self._place(lane, len(lane.interactive))

    def beyond(self, place: int) -> list[Job]:
        """The jobs whose position is beyond this one, in order."""
        order = [
            (lane.tag, lane.turn, lane.weight, deque(chain(lane.interactive, lane.batch)))
            for lane in self._waiting.values()
        ]
        heapify(order)
        found: list[Job] = []
        for position in range(1, self._size + 1):
            tag, _, weight, jobs = order[0]
            job = jobs.popleft()
            if jobs:
                heapreplace(order, (tag + 1 / weight, next(self._turns), weight, jobs))
            else:
                heappop(order)
            if position > place:
                found.append(job)
        return found

    def displaced_by(self, client: Client) -> Job | None:
        """The job that gives way to an interactive one of this client, where there is no room for both.

        The newest of the client that has the most, by weight, if this one has fewer even then.
        """
        most = max(self._waiting.values(), key=lambda lane: lane.load, default=None)
        lane = self._waiting.get(client.key)
        load = ((0 if lane is None else len(lane.interactive)) + 1) / client.weight
        return None if most is None or load >= most.load else next(reversed(most.interactive))

    def _place(self, lane: _Lane, ahead: int) -> int:
        """The position of the job that has so many others of its lane before it."""
        start = lane.tag + ahead / lane.weight
        place = ahead + 1
        for other in self._waiting.values():
            if other is not lane:
                turns = (start - other.tag) * other.weight
                before = floor(turns + _HAIR) + 1 if other.turn < lane.turn else ceil(turns - _HAIR)
                place += min(max(before, 0), len(other))
        return place

    def _removed(self, job: Job, lane: _Lane) -> None:
        self._size -= 1
        self._interactive -= not job.batch
        if not lane:
            del self._waiting[lane.key]
            if len(self._lanes) - len(self._waiting) > REMEMBERED_LANES:
                self._lanes = dict(self._waiting)
                self._order = [(lane.tag, lane.turn, lane) for lane in self._lanes.values()]
                heapify(self._order)
