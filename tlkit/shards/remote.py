"""Files at a URL: what is known of them, and a copy here of those in use. Through fsspec: http(s), s3, and others.

A file comes in one stream into a folder that holds no more than a budget; memory holds a part of it at a time. A stream
that breaks off goes on where it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from tlkit import cache_folder, config
from tlkit.errors import InputLost, TlkitError

T = TypeVar("T")

TIMEOUT, TRIES, BUDGET = "TLKIT_TIMEOUT", "TLKIT_TRIES", "TLKIT_SHARD_BUDGET"
"""Environment variables, which reach decoding processes as well: seconds without an answer, attempts, bytes."""
DEFAULTS = {TIMEOUT: "30s", TRIES: "4", BUDGET: "20GB"}
READERS: dict[str, Callable[[str], Any]] = {TIMEOUT: config.seconds, TRIES: int, BUDGET: config.size}
PART = 16 * 2**20
"""Bytes that are asked for at once where a file does not come as a stream."""
UNFINISHED = ".part"
"""What the name of a copy ends in until all of it is there."""
LEFT_BEHIND = 3600.0
"""Seconds after which nobody is fetching what has not grown."""
EXTRAS = {"http": "remote", "https": "remote", "s3": "s3"}


class Unreachable(Exception):
    """A file elsewhere that does not come; the message says why, in a few words."""


@dataclass(frozen=True)
class Remote:
    """A file at a URL.

    Args:
        url: Where.
        size: In bytes.
        stamp: Changes when the file does, as far as the server tells.
    """

    url: str
    size: int
    stamp: str


def is_url(text: str) -> bool:
    """Whether a text names something by a protocol, as ``https://...`` does."""
    return "://" in text


def describe(urls: Sequence[str]) -> list[Remote]:
    """What the servers tell of files, without their content.

    Raises:
        TlkitError: Some are missing, or a server does not answer.
    """
    found = [find(urls[0])]  # a server that never answers is asked for one file, not for all at once
    with ThreadPoolExecutor(16) as pool:
        found += pool.map(find, urls[1:])
    missing = [url for url, one in zip(urls, found, strict=True) if one is None]
    if missing:
        what = "no such file" if len(urls) == 1 else f"{len(missing)} of {len(urls)} shards are missing"
        raise TlkitError(what, where=missing[0], remedy="check the address", details=missing if missing[1:] else [])
    return [one for one in found if one is not None]


def find(url: str) -> Remote | None:
    """What the server tells of a file; None where there is no such file.

    Raises:
        TlkitError: The server does not answer.
    """
    system, path = _system(url)
    try:
        told = _patiently(lambda: system.info(path))
    except FileNotFoundError:
        return None
    except Unreachable as error:
        remedy = f"check the address and the connection; {TIMEOUT}=90s would wait for longer"
        raise TlkitError(str(error), where=url, remedy=remedy) from error
    size = told.get("size")
    if size is None:
        raise TlkitError("the server does not tell the file's size", where=url, remedy="use another server")
    stamps = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "created", "Content-MD5")
    return Remote(url, int(size), " ".join(str(told[name]) for name in stamps if told.get(name)))


def local_copy(remote: Remote, where: object) -> Path:
    """A copy of the file here, fetched where there is none; the oldest others go where it needs their room.

    Raises:
        InputLost: It does not come.
        TlkitError: It is larger than the folder may become.
    """
    folder = cache_folder.default_folder() / cache_folder.SHARDS
    name = hashlib.blake2b(f"{remote.url}\n{remote.size}\n{remote.stamp}".encode(), digest_size=16).hexdigest()
    copy = folder / f"{name}.tar"
    if not _use(copy):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f"{name[:2]}.lock"):
            if not _use(copy):  # nobody else has fetched it meanwhile
                _make_room(remote.size, where)
                try:
                    _fetch(remote, copy)
                except (Unreachable, FileNotFoundError) as error:
                    reason = "it is no longer there" if isinstance(error, FileNotFoundError) else str(error)
                    remedy = "see to it, then start again, or go on with --resume"
                    path = remote.url.removeprefix(str(where))
                    raise InputLost(path, where=where, reason=reason, remedy=remedy) from error
    return copy


def _use(copy: Path) -> bool:
    """Whether a copy is there; it is then the last that would go."""
    try:
        os.utime(copy)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Copy:
    """A copy of a shard.

    Args:
        path: The file.
        bytes: Its size.
        last_used: When, in seconds since 1970.
    """

    path: Path
    bytes: int
    last_used: float


def copies() -> list[Copy]:
    """All copies that are there, the one used longest ago first; also what processes that were killed had fetched."""
    found = []
    for path in (cache_folder.default_folder() / cache_folder.SHARDS).glob("*.*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            left_behind = path.suffix == UNFINISHED and time.time() - status.st_mtime > LEFT_BEHIND
            if path.suffix == ".tar" or left_behind:
                found.append(Copy(path, status.st_size, status.st_mtime))
    return sorted(found, key=lambda copy: copy.last_used)


def remove_copies(unused_for: float = 0.0) -> int:
    """Remove those that nobody has used for so many seconds; returns their bytes. Whoever reads one keeps it open."""
    freed = 0
    for copy in copies():
        if time.time() - copy.last_used >= unused_for:
            with contextlib.suppress(OSError):  # Windows keeps what somebody reads
                copy.path.unlink()
                freed += copy.bytes
                for index in copy.path.parent.glob(f"{copy.path.stem}.*"):
                    index.unlink()
    return freed


def _make_room(needed: int, where: object) -> None:
    budget = config.size(_setting(BUDGET))
    if needed > budget:
        what = f"a shard of {needed / 1e9:.1f} GB, where copies may take {budget / 1e9:.1f} GB"
        raise TlkitError(what, where=where, remedy=f"raise {BUDGET}, or write smaller shards")
    there = copies()
    used = sum(copy.bytes for copy in there)
    for copy in there:
        if used + needed <= budget:
            return
        with contextlib.suppress(OSError):
            copy.path.unlink()
            used -= copy.bytes


def _fetch(remote: Remote, copy: Path) -> None:
    """Make a copy, attempt after attempt as long as each brings something; what came before a kill is gone on with.

    Raises:
        FileNotFoundError: It has gone.
        Unreachable: It does not come.
    """
    system, path = _system(remote.url)
    part, gives_parts = copy.with_suffix(UNFINISHED), True
    with part.open("ab") as file:

        def more() -> bool:
            nonlocal gives_parts
            have = file.tell()
            if remote.url.startswith("http"):
                headers = {"Range": f"bytes={have}-"} if have else {}
                system.get_file(path, file, callback=_Whole(file, have, remote.size), headers=headers)
            else:
                file.write(system.cat_file(path, start=have, end=min(have + PART, remote.size)))
            came = file.tell()
            if came > remote.size or (came < remote.size and not gives_parts):
                gives_parts = False
                file.seek(0)
                file.truncate()
                raise ValueError(f"{came} bytes came where {remote.size} were announced")
            if came == have:
                raise ValueError(f"nothing came after {have} of {remote.size} bytes")
            return came == remote.size

        while file.tell() < remote.size and not _patiently(more, file.tell):
            pass
        file.flush()
        os.fsync(file.fileno())
    part.replace(copy)


class _Whole:
    """Told the length of an answer before its bytes come: one that is the whole file, where its end was asked for,
    is from a server that cannot give parts, and begins at the beginning."""

    def __init__(self, file: IO[bytes], have: int, size: int) -> None:
        self.file, self.have, self.size = file, have, size

    def set_size(self, size: int | None) -> None:
        if self.have and size == self.size:
            self.file.seek(0)
            self.file.truncate()

    def relative_update(self, inc: int = 1) -> None:
        pass


def _patiently(ask: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """What ``ask`` returns, asked again after a while where the server fails; progress begins the count anew.

    Raises:
        FileNotFoundError: There is no such file.
        Unreachable: The server does not answer, or refuses.
    """
    tries, failed, before = max(1, int(_setting(TRIES))), 0, progress()
    while True:
        try:
            return ask()
        except Exception as raised:  # each file system has errors of its own
            error = _cause(raised)
            if isinstance(error, FileNotFoundError) or _is_full(error):
                raise
            if progress() > before:
                failed, before = 0, progress()
            failed += 1
            if _is_final(error) or failed >= tries:
                times = f" ({failed} attempts)" if failed > 1 else ""
                raise Unreachable(f"{_why(error)}{times}") from error
            time.sleep(min(2.0 ** (failed - 1) / 2, 30))


def _cause(error: Exception) -> Exception:
    """What went wrong: fsspec says of whatever goes wrong with a head over HTTP that there is no such file."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return error if getattr(cause, "status", None) in (404, 410) else cause
    return error


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_final(error: Exception) -> bool:
    """Whether asking again would be of no use: the server has refused."""
    status = getattr(error, "status", None)
    return isinstance(error, PermissionError) or (isinstance(status, int) and 400 <= status < 500 and status != 429)


def _why(error: Exception) -> str:
    if "timeout" in type(error).__name__.lower() or isinstance(error, TimeoutError):
        return f"no answer in {_setting(TIMEOUT)}"
    status, message = getattr(error, "status", None), " ".join(str(error).split())
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    return f"the connection fails: {message[:200] or type(error).__name__}"


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the file's path there."""
    import fsspec

    scheme, seconds = url.partition("://")[0], config.seconds(_setting(TIMEOUT))
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, connect=seconds, sock_connect=seconds, sock_read=seconds)
            options = {"client_kwargs": {"timeout": limits, "trust_env": True}}
        elif scheme == "s3":
            quick = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 1}}
            options = {"config_kwargs": quick}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        remedy = f"pip install 'tlkit[{extra}]'" if extra else "install it"
        raise TlkitError(f"{scheme}:// needs a package that is missing ({error})", where=url, remedy=remedy) from error
    except ValueError as error:
        raise TlkitError(f"unknown protocol '{scheme}'", where=url, remedy="use https:// or s3://") from error


def _setting(name: str) -> str:
    given = os.environ.get(name, "")
    if not given:
        return DEFAULTS[name]
    try:
        READERS[name](given)
    except (AssertionError, ValueError) as error:
        raise TlkitError(f"'{given}' is not understood", where=name, remedy=f"write {DEFAULTS[name]}") from error
    return given


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One thread of one process at a time; what is fetched by others at the same time has most likely another lock."""
    with lock.open("a") as file:
        with contextlib.suppress(ImportError):  # Windows: two may fetch the same
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
