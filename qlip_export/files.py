"""Whole files only: write aside and rename, hash, lock."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlip_export.errors import QlipError


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as a hex string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_key(*parts: object) -> str:
    """Return a short key that changes whenever any of ``parts`` (JSON-serialisable) does."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place only when the block ends without error.

    Raises:
        QlipError: The folder is not writable or the disk is full.
    """
    with explained_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        aside = Path(name)
        try:
            yield aside
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            aside.chmod(0o644)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, aside and renamed."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def explained_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into a `QlipError` that names ``path``."""
    try:
        yield
    except OSError as error:
        # The error knows its file; what fails while ``path`` is made may lie elsewhere.
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise QlipError(
                f"the disk is full while writing {path}",
                found=str(error),
                fix="free space and run the same command again; what is finished is kept",
            ) from error
        if error.errno in _ACCESS_ERRORS:
            raise QlipError(
                f"cannot write {path}" if where == path else f"cannot write {path}: no access to {where}",
                expected="a folder that exists or can be made, and is writable",
                found=str(error),
                fix="choose another -o",
            ) from error
        raise


_ACCESS_ERRORS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
)


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; call ``on_wait`` once if another process has it.

    The lock goes with the process that holds it, so a killed build leaves a file that locks nothing. The file
    is removed while it is still locked: whoever waited for it then holds a file without a name, which
    `filelock` notices (from 3.21.2 on) and tries again.
    """
    from filelock import FileLock, Timeout

    with explained_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()
