"""The fake's one model: its slot and queue, what runs on it, aborts, and figures of what it did."""

from collections import Counter, deque
from collections.abc import Callable
from math import inf
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace
from twisted.internet.interfaces import IReactorTime

from ai_ticket.backend.fake.ask import Ask
from ai_ticket.backend.fake.connection import Connection
from ai_ticket.backend.fake.jobs import Job, Outcome, Pace, Stream, Whole
from ai_ticket.backend.fake.script import Script
from ai_ticket.backend.fake.text import FAILED, NONE_YET, NOTHING, PASSAGE, Plan, pieces, plan

DEFAULT_WAITING = 9


class Settings(Struct):
    """How the fake is set up, as by KoboldCPP's options and the machine that it runs on. May be changed at any time.

    @ivar multiuser: requests at a time, the running one included; 0: none waits; 1: as many as without the option.
    @ivar parallel: generations at a time, as of `--parallelrequests`. With more than one an abort stops nothing.
    @ivar model: its name; None: none is loaded.
    @ivar text: what the model says to everything. None: a passage of its own.
    @ivar echo: it says the last message instead.
    """

    tokens_per_second: float = 70.0
    first_token_seconds: float = 0.0
    context_length: int = 2048
    multiuser: int = 10
    parallel: int = 1
    password: str | None = None
    model: str | None = "koboldcpp/fake"
    text: str | None = None
    echo: bool = False
    pace: Pace = field(default_factory=Pace)


class _Figures(Struct):
    """Of the last generation."""

    tokens: int = 0
    prompt_tokens: int = 0
    process_seconds: float = 0.0
    eval_seconds: float = 0.0
    seed: int = -1
    stop_reason: int = NONE_YET


class Engine:
    """Runs generations, one at a time unless told otherwise, in the order in which they came."""

    def __init__(self, clock: IReactorTime, settings: Settings):
        self.settings = settings
        self.outcomes: Counter[Outcome] = Counter()
        self.aborts: list[str | None] = []
        self.rejected = 0
        self._clock = clock
        self._number = 100_000
        self._restart()

    def _restart(self) -> None:
        self.jobs: list[Job] = []
        self._taken = 0
        self._queue: deque[Callable[[Callable[[], None]], None]] = deque()
        self._last: Job | None = None
        self._pending_key: str | None = None
        self._figures = _Figures()
        self._generations = 0
        self._born = self._idle_since = self._clock.seconds()

    def kill(self) -> None:
        """End all at once, and begin anew with nothing remembered."""
        for job in self.jobs:
            job.kill()
        self._restart()

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether no slot is taken. One is for a moment longer than its generation."""
        return self._taken == 0

    def enter(self, work: Callable[[Callable[[], None]], None]) -> bool:
        """Do this when it has a slot; it calls what it gets when it is done with it. False: there are too many."""
        if self._taken < self.settings.parallel:
            self._run(work)
            return True
        limit = self.settings.multiuser - 1 if self.settings.multiuser > 1 else DEFAULT_WAITING
        if self.settings.multiuser == 0 or len(self._queue) >= limit:
            self.rejected += 1
            return False
        self._queue.append(work)
        return True

    def generate(self, connection: Connection, ask: Ask, script: Script, release: Callable[[], None]) -> None:
        """Generate, and answer on the connection."""
        planned, prompt_tokens = self._plan(ask, script)

        def ended(job: Job, outcome: Outcome) -> None:
            self.jobs.remove(job)
            self.outcomes[outcome] += 1
            release()

        self._number += 1
        job = (Stream if ask.stream else Whole)(
            self._clock,
            connection,
            ask,
            plan=planned,
            script=replace(script, first_token=script.first_token or self.settings.first_token_seconds),
            pace=self.settings.pace,
            rate=script.tokens_per_second or self.settings.tokens_per_second,
            prompt_tokens=prompt_tokens,
            number=self._number,
            model=self.settings.model or "inactive",
            generated=self._measure,
            ended=ended,
        )
        self.jobs.append(job)
        self._last = job
        self._figures.stop_reason = 0
        job.begin()

    def abort(self, key: str) -> tuple[bool, bool]:
        """Abort by key, or whatever runs; whether that is a success, and whether it is done.

        A key that is not the running one's, or the last one's, is remembered while others wait: whoever brings it gets
        nothing, once. Only one is, and it is never forgotten.
        """
        self.aborts.append(key or None)
        if (not key and not self._queue) or (key and self._last is not None and key == self._last.ask.key):
            if self._last is not None and self.settings.parallel == 1:
                self._last.abort()
            return True, True
        if key and self._queue:
            self._pending_key = key
            return True, False
        return False, False

    def text_of(self, key: str) -> str:
        """What the running generation has said so far, or the last one said, for who knows its key."""
        if self._last is None or key != self._last.ask.key or (not key and self._queue):
            return ""
        return self._last.text()

    def perf(self) -> dict[str, Any]:
        """What `/api/extra/perf` says."""
        now, last = self._clock.seconds(), self._figures
        return {
            "last_process": _each(last.process_seconds, last.prompt_tokens) * 1000,
            "last_eval": _each(last.eval_seconds, last.tokens) * 1000,
            "last_token_count": last.tokens,
            "last_input_count": last.prompt_tokens,
            "last_process_time": last.process_seconds,
            "last_eval_time": last.eval_seconds,
            "last_process_speed": _speed(last.prompt_tokens, last.process_seconds),
            "last_eval_speed": _speed(last.tokens, last.eval_seconds),
            "last_seed": last.seed,
            "last_draft_success": 0,
            "last_draft_failed": 0,
            "total_gens": self._generations,
            "stop_reason": last.stop_reason,
            "total_img_gens": 0,
            "total_tts_gens": 0,
            "total_transcribe_gens": 0,
            "queue": self.waiting if self.settings.parallel == 1 else 0,
            "idle": int(self.idle),
            "hordeexitcounter": -1,
            "uptime": now - self._born,
            "idletime": now - self._idle_since,
            "quiet": False,
        }

    def _run(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._taken += 1
        self._idle_since = self._clock.seconds()
        work(self._release)

    def _release(self) -> None:
        self._taken -= 1
        if self._queue:
            self._run(self._queue.popleft())

    def _plan(self, ask: Ask, script: Script) -> tuple[Plan, int]:
        """What comes of it, and how long the prompt is."""
        if self.settings.model is None:
            return Plan([], 0, "error", FAILED), 0
        if ask.key and ask.key == self._pending_key:
            self._pending_key = None
            return NOTHING, 0
        if ask.limit <= 0:
            return NOTHING, 0
        # What does not fit is cut off the beginning, and nobody is told.
        prompt_tokens = min(len(pieces(ask.prompt)), max(0, self.settings.context_length - ask.limit))
        said = script.pieces if script.pieces is not None else pieces(self._text(ask, script))
        if script.tokens is not None and said:
            said = (said * (script.tokens // len(said) + 1))[: script.tokens]
        return plan(said, ask.limit, ask.stops, endless=ask.endless), prompt_tokens

    def _text(self, ask: Ask, script: Script) -> str:
        if script.text is not None:
            return script.text
        if self.settings.echo:
            return ask.last
        return PASSAGE if self.settings.text is None else self.settings.text

    def _measure(self, job: Job) -> None:
        tokens = job.produced()
        self._generations += 1
        self._figures = _Figures(
            tokens=tokens,
            prompt_tokens=job.prompt_tokens,
            process_seconds=job.first_token,
            eval_seconds=tokens / job.rate if job.rate != inf else 0.0,
            seed=job.ask.seed,
            stop_reason=job.plan.stop_reason if tokens == job.plan.tokens else 0,
        )


def _each(seconds: float, tokens: int) -> float:
    return seconds / tokens if tokens else 0.0


def _speed(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else 0
