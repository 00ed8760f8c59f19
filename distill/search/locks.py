"""Locks on files, which a process that dies lets go of by that."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileLock:
    """A lock between processes: it is held as long as a process keeps the file open, and no longer."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: int | None = None

    def acquire(self, wait: bool) -> bool:
        """Take the lock, waiting for it or not; whether it was taken. Raises OSError where files cannot be locked."""
        try:
            import fcntl
        except ImportError as error:
            raise OSError(
                f"{self.path} cannot be locked: this system has no POSIX locks, which a search needs"
            ) from error
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            return False
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return True

    def release(self) -> None:
        """Let go of it, where it is held."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock in a block, once the others have let go."""
        self.acquire(wait=True)
        try:
            yield
        finally:
            self.release()
