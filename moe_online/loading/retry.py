"""What goes wrong while bytes are read: what may pass is tried again, a few times; what remains is a clear error."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from moe_online.errors import CheckpointError, CorruptCheckpoint

RETRIES = 5  # after the first try
FIRST_PAUSE = 0.1  # seconds before the first of them; each pause is twice the one before
TENSORSTORE_ERRORS = (ValueError, OSError, NotImplementedError)  # what it raises, whatever the cause

PASSING = {  # of disks and connections; all else, such as a file that is not there, stays as it is
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
}
AGAIN = "Copy the checkpoint again from where it was saved."  # what helps where bytes are lost
STATUS = re.compile(r"[A-Z_]+(?=: )")  # that begins tensorstore's messages
OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")  # somewhere in them, where a call of the system failed
PASSING_STATUS = {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
REFUSED_STATUS = {"ABORTED", "PERMISSION_DENIED", "UNAUTHENTICATED"}  # the first: tensorstore has tried again itself
REFUSED = re.compile(r"\[HTTP code (?!416)|ignored by server")  # 416: past the end of the file; ignored: the range
Result = TypeVar("Result")


class ShortRead(OSError):
    """A remote place has sent less than was asked for."""


def retried(action: Callable[[], Result]) -> Result:
    """Calls `action`, and again after errors that may pass, at most `RETRIES` times; the last error is raised."""
    pause = FIRST_PAUSE
    for _ in range(RETRIES):
        try:
            return action()
        except TENSORSTORE_ERRORS as error:
            if not may_pass(error):
                raise
        time.sleep(pause)
        pause *= 2
    return action()


def may_pass(error: BaseException) -> bool:
    """Whether the same read could succeed a moment later."""
    if isinstance(error, ShortRead | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in PASSING
    code = OS_ERROR.search(str(error))
    return _status(error) in PASSING_STATUS or (code is not None and int(code[1]) in PASSING)


def read_error(
    what: str, error: BaseException, *, names: Iterable[str] = (), damaged: str = "cannot be read"
) -> CheckpointError:
    """What to raise where `what` could not be read.

    Returns:
      `CorruptCheckpoint`, in which `what` is called `damaged`; or a plain `CheckpointError`, where it may be whole but
      is out of reach.
    """
    cause = first_line(error)
    if may_pass(error):
        cause += f" (tried {1 + RETRIES} times)"
    elif not _is_refused(error):
        return CorruptCheckpoint(f"{what} {damaged}: {cause}. {AGAIN}", names=names)
    return CheckpointError(
        f"{what} cannot be read: {cause}. See that its place can be reached and read, then load again.", names=names
    )


def first_line(error: BaseException) -> str:
    """What an error says, without tensorstore's copy of the whole specification."""
    lines = str(error).strip().splitlines()
    return lines[0].partition(" [tensorstore_spec=")[0].rstrip(".") if lines else type(error).__name__


def _is_refused(error: BaseException) -> bool:
    """Whether a server or the system does not give what may well be there."""
    is_refused = _status(error) in REFUSED_STATUS or REFUSED.search(str(error)) is not None
    return isinstance(error, PermissionError) or is_refused


def _status(error: BaseException) -> str | None:
    match = STATUS.match(str(error))
    return match[0] if match else None
