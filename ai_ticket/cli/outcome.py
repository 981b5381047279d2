"""How a command ends: its exit status, and the error that a person is told of."""

import json
from enum import IntEnum
from typing import Any


class ExitStatus(IntEnum):
    """What a script can tell from a command's end. 75 is EX_TEMPFAIL of sysexits.h, 130 a shell's word for Ctrl-C."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    TRY_LATER = 75
    INTERRUPTED = 130


class CommandError(Exception):
    """A command that failed, in the shape of the service's own error object.

    `details` may have several lines. `answer` is the service's own object, where there is one, and `http_status` is
    set where something has answered, but not with an object.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: ExitStatus = ExitStatus.FAILED,
        details: str | None = None,
        request_id: str | None = None,
        retry_after: int | None = None,
        answer: dict[str, Any] | None = None,
        http_status: int | None = None,
    ):
        self.code = code
        self.message = message
        self.status = status
        self.details = details
        self.request_id = request_id
        self.retry_after = retry_after
        self.answer = answer
        self.http_status = http_status
        super().__init__(f"{code}: {message}")

    def to_json(self) -> str:
        """The error object on one line: the service's, else one like it."""
        own = {"error": self.code, "message": self.message, "details": self.details, "request_id": self.request_id}
        return json.dumps(self.answer or own, ensure_ascii=False)
