"""Several processes that carry out one command together, as torchrun starts them; of a single one nothing is asked.

All of them run the same code. What is written, printed and decided by a clock is the first one's alone (`on_first`,
`is_first`); what each finds out for itself is told to the others (`each`); in between they never wait for each other. A
function here is called by all of them, in the same order: one that did not take part would keep the others waiting.
`notice_lost` alone may be called at any time.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tlkit.errors import TlkitError, first_line

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=1)
"""How long the others wait for one that works alone. One that has died is noticed at once."""
LAST_WORDS = 5.0
"""Seconds that are waited for what another process has to say, once one of them is lost."""
BETWEEN_LOOKS = 1.0
"""Seconds between looks for what others have said."""


@dataclass
class _Joined:
    """What the processes talk through, once they are together."""

    group: Any = None
    store: Any = None
    asked: float = 0.0
    """When `notice_lost` last looked."""


_joined = _Joined()


class PeerLost(TlkitError):
    """Another process has ended, while this one counted on it."""

    def __init__(self) -> None:
        super().__init__("another process of this job has ended", remedy="see what it said; go on with --resume")

    def __reduce__(self) -> tuple[object, ...]:
        return PeerLost, ()


def count() -> int:
    """How many processes there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def count_here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if count() > 1 else 1


def is_first() -> bool:
    """Whether this is the one that writes and speaks."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the one of its machine that writes what only its machine has, such as the cache."""
    return count() == 1 or int(os.environ.get("LOCAL_RANK", rank())) == 0


def join(backend: str) -> None:
    """Bring the processes together, before Accelerate would; again is nothing.

    Args:
        backend: What the network's gradients are averaged by: ``gloo`` or ``nccl``.
    """
    if count() == 1 or _joined.group is not None:
        return
    import torch.distributed as dist
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    # a job that torchrun starts again finds what it stored before: addresses of processes that are gone
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, number, several = next(iter(rendezvous("env://")))
    _joined.store = PrefixStore(f"tlkit/{start}", store)
    dist.init_process_group(backend, store=_joined.store, rank=number, world_size=several)
    _joined.group = dist.new_group(backend="gloo", timeout=PATIENCE)


def leave() -> None:
    """End the connections: whoever still waits for this process is told so, and does not wait in vain."""
    if _joined.group is None:
        return
    import torch.distributed as dist

    _joined.group = None
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def gathered(value: T) -> list[T]:
    """What each process has, in their order.

    Raises:
        PeerLost: One of them has ended.
    """
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    try:
        dist.all_gather_object(found, value, group=_joined.group)
    except RuntimeError as error:
        raise _told(error) from error
    return found


def highest(value: int) -> int:
    """The highest of the processes' numbers: what one of them wants, all do.

    Raises:
        PeerLost: One of them has ended.
    """
    if count() == 1:
        return value
    import torch
    import torch.distributed as dist

    held = torch.tensor(value)
    try:
        dist.all_reduce(held, dist.ReduceOp.MAX, group=_joined.group)
    except RuntimeError as error:
        raise _told(error) from error
    return int(held)


def on_first(call: Callable[[], T]) -> T:
    """What ``call`` returns in the first process, which alone calls it; what it raises there, all raise.

    Raises:
        PeerLost: One of them has ended.
    """
    if count() == 1:
        return call()
    import torch.distributed as dist

    told: list[Any] = [None]
    if is_first():
        told = [_outcome(call)]
    try:
        dist.broadcast_object_list(told, src=0, group=_joined.group)
    except RuntimeError as error:
        raise _told(error) from error
    result: T
    result, failure = told[0]
    if failure is not None:
        raise failure
    return result


def each(call: Callable[[], T]) -> T:
    """What ``call`` returns here; where it fails in any process, all raise what the first of these raised.

    Raises:
        PeerLost: One of them has ended.
    """
    if count() == 1:
        return call()
    value, error = _outcome(call)
    for other in gathered(error):
        if other is not None:
            raise other
    result: Any = value
    return result


def _outcome(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a call returns and raises; the error as something that can be told to another process."""
    try:
        return call(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, TlkitError(first_line(error))
        return None, error


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of what all do together: consecutive, and together the whole."""
    first, last = (len(items) * number // count() for number in (rank(), rank() + 1))
    return items[first:last]


def broadcast(tensors: Sequence[Any]) -> None:
    """Give tensors the values that they have in the first process."""
    if count() == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        dist.broadcast(tensor, 0)


def job() -> str | None:
    """What torchrun calls this job, the same when it starts it again; None where nobody would."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    return name if name not in ("", "none") else f"{socket.gethostname()} {os.getppid()}"


def restarted() -> bool:
    """Whether torchrun has started this job again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


# The end of a job that fails


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process has ended."""
    if isinstance(error, PeerLost):
        return True
    if _joined.group is None or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _told(error: RuntimeError) -> BaseException:
    return PeerLost() if is_lost(error) else error


def notice_lost() -> None:
    """Raise where another process has said its last words: for one that works for long without waiting for others.

    Raises:
        PeerLost: It has; or the first one has ended, and the store with it.
    """
    if _joined.store is None or time.monotonic() - _joined.asked < BETWEEN_LOOKS:
        return
    _joined.asked = time.monotonic()
    try:
        failed = _joined.store.check(["tlkit/failed"])
    except RuntimeError as error:
        raise PeerLost from error
    if failed:
        raise PeerLost


def last_words(error: TlkitError) -> TlkitError | None:
    """Which error this process is to print as the job ends; None where another one tells what happened.

    The first process speaks for all of them: it repeats what the one that was lost had to say. Another one speaks only
    where the first does not, as it is busy or gone, and then a single one.
    """
    if count() == 1 or _joined.store is None:
        return error if is_first() else None
    for ending in (signal.SIGINT, signal.SIGTERM):  # torchrun ends what it finds alive once one of them has failed
        signal.signal(ending, signal.SIG_IGN)
    lost = isinstance(error, PeerLost)
    if is_first() and lost:
        number, text = _heard(range(1, count())) or (0, "")
        error = TlkitError(f"process {number} of {count()}: {text}") if text else error
    if is_first() or not lost:
        with contextlib.suppress(Exception):  # the store may be gone with the process that held it
            _joined.store.set(f"tlkit/failed/{rank()}", str(error))
            _joined.store.set("tlkit/failed", "")
    leave()
    if is_first():
        return error
    speaks = _heard([0]) is None and _joined.store.add("tlkit/speaks", 1) == 1
    return TlkitError(f"process {rank()} of {count()}: {error}") if speaks else None


def _heard(numbers: Sequence[int]) -> tuple[int, str] | None:
    """What one of these processes has said, and which; None where none says anything in time."""
    until = time.monotonic() + LAST_WORDS
    while time.monotonic() < until:
        for number in numbers:
            try:
                if _joined.store.check([f"tlkit/failed/{number}"]):
                    return number, _joined.store.get(f"tlkit/failed/{number}").decode()
            except Exception:  # the process that held the store is gone, and has spoken
                return number, ""
        time.sleep(0.05)
    return None
