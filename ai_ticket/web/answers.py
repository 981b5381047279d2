"""What a caller gets of an event that was answered."""

from typing import Any

import msgspec

from ai_ticket.errors import DomainError
from ai_ticket.event import Completion, Event
from ai_ticket.interfaces import Job


def answer_fields(completion: Completion, event: Event, request_id: str) -> dict[str, Any]:
    """The fields of the answer (contract, "The answer")."""
    answer: dict[str, Any] = {
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "model": completion.model,
        "usage": msgspec.to_builtins(completion.usage),
        "request_id": request_id,
    }
    if event.metadata is not None:
        answer["metadata"] = event.metadata
    return answer


def server_timing(job: Job, now: float) -> tuple[bytes, bytes]:
    """The header that says where the time went, in milliseconds (W3C Server Timing)."""
    waited, generated = job.queue_seconds(now) * 1000, job.backend_seconds(now) * 1000
    return b"server-timing", b"queue;dur=%.1f, backend;dur=%.1f" % (waited, generated)


def facts(job: Job, outcome: Completion | DomainError | None, now: float) -> dict[str, object]:
    """What the log tells of an event's way: how long it waited and generated, where, and how many tokens that were."""
    found: dict[str, object] = {"queue": round(job.queue_seconds(now), 6)}
    if job.began_at is not None:
        found["generated"] = round(job.backend_seconds(now), 6)
    if outcome is not None and outcome.backend:
        found["backend"] = outcome.backend
    if isinstance(outcome, Completion) and outcome.usage is not None:
        found["prompt_tokens"] = outcome.usage.prompt_tokens
        found["completion_tokens"] = outcome.usage.completion_tokens
    return found
