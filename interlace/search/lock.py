"""One writer at a time, and a clear sentence for the second one."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from interlace.errors import UserError

HELD, HOLDER = "write.lock", "writer.json"


@contextmanager
def writing(folder: Path, wait: float = 0) -> Iterator[None]:
    """Holds the index's write lock, waiting up to `wait` seconds for it. The system releases it when the process dies.

    Raises UserError naming the process that holds it, or saying why the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / HELD, timeout=wait)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"The index at {folder} is being written by {_holder(folder)}. Wait until it has finished, or stop it."
        ) from None
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}. Choose a folder of your own.") from None
    except OSError as error:
        raise _as_user_error(error, folder) or error from None
    try:
        with disk_trouble(folder):
            who = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().strftime("%H:%M:%S")}
            (folder / HOLDER).write_text(json.dumps(who))
            yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        who = json.loads((folder / HOLDER).read_text())
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"


@contextmanager
def disk_trouble(folder: Path) -> Iterator[None]:
    """Turns "no space left" and "read-only", which LanceDB wraps in several exception types, into a UserError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if (told := _as_user_error(error, folder)) is None:
            raise
        raise told from error


def _as_user_error(error: Exception, folder: Path) -> UserError | None:
    code, text = getattr(error, "errno", None), str(error).lower()
    if (
        code in (errno.ENOSPC, errno.EDQUOT)
        or "no space left" in text
        or "os error 28" in text
        or "quota exceeded" in text
    ):
        return UserError(
            f"The disk that holds {folder} is full. What was committed before is intact; "
            "free some space and run the same command again: it continues where it stopped."
        )
    if code == errno.EROFS or "read-only file system" in text:
        return UserError(f"{folder} is on a read-only file system. Choose another folder.")
    return None
