"""Who may write in a log's directory, and what of it is there already."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from dit_fast.errors import LogError
from dit_fast.log import CONSTANTS, MANIFEST, chunk_number, query_number

LOCK = ".lock"

# file systems without locks: the Recorder goes on without
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[int] = set()


class Claim:
    """The right to write in a directory, which is made: an advisory lock on its file `.lock`, held until `release` or until
    the process dies.

    LogError where another process holds it, or where the directory cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self._file = path / LOCK
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._fd = _lock(self._file)
        except OSError as error:
            raise _unwritable(path, error) from error
        _held.add(self._fd)

    def release(self) -> None:
        """Give the directory back; the lock's file is removed first, while nobody else can hold it."""
        with contextlib.suppress(OSError):
            self._file.unlink()
        _held.discard(self._fd)
        os.close(self._fd)


def prepare(path: Path, overwrite: bool, resume: bool) -> bool:
    """Whether the directory holds a log to go on with; else it holds none afterwards.

    A log there is refused by LogError, deleted (overwrite; its own files alone) or gone on with (resume).
    """
    try:
        files = log_files(path)
        names = {file.name for file in files}
        if resume and MANIFEST in names:
            return True
        if resume and any(chunk_number(name) for name in names):
            raise LogError(f"{path} holds chunks of a log but no {MANIFEST}; restore it, or pass overwrite=True to delete them")
        if files and not (overwrite or resume):
            raise LogError(
                f"{path} holds a log already; choose another path, pass resume=True to go on with it, "
                "or overwrite=True to delete that log"
            )
        for file in files:  # the manifest first: without it the rest is no log
            file.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error
    return False


def log_files(path: Path) -> list[Path]:
    """The files of a log, finished or not: the manifest first; in a directory that need not hold one."""
    files = [file for file in path.iterdir() if _is_own(file.name.removeprefix(".").removesuffix(".partial"))]
    return sorted(files, key=lambda file: (file.name != MANIFEST, file.name))


def _is_own(name: str) -> bool:
    return name in (MANIFEST, CONSTANTS) or chunk_number(name) is not None or query_number(name) is not None


def _lock(file: Path) -> int:
    """An open descriptor of the lock's file, locked."""
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return fd
            holder = os.read(fd, 20).decode(errors="replace").strip()
            os.close(fd)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise LogError(
                f"another process{f' ({holder})' if holder else ''} writes a log in {file.parent}; "
                "wait for its end or choose another path"
            ) from error
        # whoever held it before may have removed the file between our open and our lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(file)):
                with contextlib.suppress(OSError):  # for the message above alone
                    os.ftruncate(fd, 0)
                    os.write(fd, str(os.getpid()).encode())
                return fd
        os.close(fd)


def _unwritable(path: Path, error: OSError) -> LogError:
    return LogError(f"cannot write a log at {path}: {error.strerror or error}")


def _let_go() -> None:
    """In a forked child, such as a loader's worker: it would hold the lock beyond its parent's death."""
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
