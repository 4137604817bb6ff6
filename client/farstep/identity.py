"""A worker's identity: its name, its number among all workers, and its share of the data.

    me = farstep.worker()
    optimizer = farstep.optim.SGD(params, lr=0.1, worker=me, consistency=farstep.Sync(workers=me.count))
    for example in me.share(examples): ...

What is not given is read from the environment, the first variable of each row that is set:

                 farstep launch      torchrun                      srun of Slurm            else
    name         FARSTEP_WORKER      w and the rank                w and the rank           a fresh one
    rank         RANK                RANK                          SLURM_PROCID             0
    count        WORLD_SIZE          WORLD_SIZE                    SLURM_STEP_NUM_TASKS     1
    local_rank   LOCAL_RANK          LOCAL_RANK                    SLURM_LOCALID            0
    restart      FARSTEP_RESTART     TORCHELASTIC_RESTART_COUNT    SLURM_RESTART_COUNT      0

A worker with a name and no number may be one of several: it has no rank, and reading it is an error. Otherwise two of
them could silently take the same data.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Protocol, TypeVar, cast, final

from farstep.errors import invalid_option
from farstep.protocol.plain import take_pythons_own_

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MOST: Final = 10**9
"""Above it a number is a mistake."""
TORCHRUNS: Final = ("RANK", "WORLD_SIZE")
SLURMS: Final = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


class Sliceable(Protocol):
    """The argument of `Worker.share`: a list, a range, an array, a tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: Any, /) -> Any: ...


Items = TypeVar("Items", bound=Sliceable)


@final
@dataclass(frozen=True, slots=True)
class Number:
    """The number of a worker among all workers.

    Attributes:
        rank: from 0.
        count: how many workers there are.

    Raises:
        InvalidOption: a value is out of range.
    """

    rank: int
    count: int

    def __post_init__(self) -> None:
        take_pythons_own_(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 0 <= value <= MOST:
                raise invalid_option(f"Invalid {field.name}: {value!r:.80}. Must be a whole number.", field.name)
        if not self.rank < self.count:
            raise invalid_option(
                f"Invalid rank: {self.rank} of {self.count} worker{'' if self.count == 1 else 's'}, which are numbered "
                "from 0.",
                "rank",
            )


@final
@dataclass(frozen=True, slots=True, repr=False)
class Worker:
    """One worker, as it was started; made by `farstep.worker()`, and given to an optimizer as `worker=`.

    Attributes:
        name: its name in the session.
        number: its rank and the count of workers; None if it has only a name.
        local_rank: its rank among the workers of its machine.
        restart: how often it was restarted.
        named: its name was given, or follows from its rank; a fresh name differs in every run.
        session, server: the values of FARSTEP_SESSION and FARSTEP_SERVER, None if unset; an optimizer may have others.

    Raises:
        InvalidOption: the name is invalid.
    """

    name: str
    number: Number | None = None
    local_rank: int = 0
    restart: int = 0
    session: str | None = None
    server: str | None = None
    named: bool = True

    def __post_init__(self) -> None:
        take_pythons_own_(self)
        check_name(self.name, "worker")

    def __repr__(self) -> str:
        number = {} if self.number is None else {"rank": self.rank, "count": self.count}
        said = {"name": self.name, **number, "local_rank": self.local_rank, "restart": self.restart}
        said |= {"session": self.session, "server": self.server}
        said |= {} if self.named else {"named": False}
        return f"Worker({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    @property
    def rank(self) -> int:
        """This worker's number, from 0.

        Raises:
            InvalidOption: it was given a name only.
        """
        return self._numbered().rank

    @property
    def count(self) -> int:
        """The number of workers.

        Raises:
            InvalidOption: it was given a name only.
        """
        return self._numbered().count

    def share(self, items: Items) -> Items:
        """Return every `count`-th of some items, from the `rank`-th on: each item goes to exactly one worker.

        Shares differ by one item at most. A tensor is divided by rows. For items without slices, share their indices:
        `torch.utils.data.Subset(dataset, me.share(range(len(dataset))))`.

        Raises:
            InvalidOption: the items cannot be sliced; or this worker has only a name.
        """
        number = self._numbered()
        part = slice(number.rank, None, number.count)
        try:
            size = len(items)
            share = items[part]
            fits = len(share) == len(range(size)[part])
        # Errors of a slice that is not supported: torch's `Dataset` raises NotImplementedError, a map KeyError.
        except (TypeError, KeyError, AttributeError, IndexError, ValueError, NotImplementedError):
            fits = False
        if not fits:
            raise invalid_option(
                f"A {type(items).__name__} has no slices to share.",
                "items",
                "Share its indices: Subset(dataset, worker.share(range(len(dataset)))) is a data set again.",
            )
        return cast(Items, share)

    def _numbered(self) -> Number:
        if self.number is None:
            raise invalid_option(
                f"Worker {self.name!r} was given a name, but no number among all workers.",
                "rank",
                "Set RANK and WORLD_SIZE, too, or call farstep.worker(rank=..., count=...).",
            )
        return self.number


def worker(
    name: str | None = None,
    *,
    rank: int | None = None,
    count: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Worker:
    """Return this process's worker: as given here, else as `farstep launch`, torchrun or Slurm started it.

    A process without any of these is the only worker. No server is needed, and no session opened.

    Args:
        name: letters, digits, '.', '_' and '-', at most 63; each worker of a session needs its own.
        rank, count: its number, from 0, and the number of workers; both or none.
        environment: where the rest is read.

    Raises:
        InvalidOption: a name or a number is invalid, or one of a pair is missing; it names the variable.
    """
    named = name if name is not None else environment.get("FARSTEP_WORKER") or None
    if (rank is None) != (count is None):
        raise invalid_option(
            "A rank and a count say something together only.", "count" if count is None else "rank", "Give both."
        )
    told = _told(environment) if rank is None or count is None else Number(rank, count)
    fresh = told is None and named is None
    if fresh:
        told, named = Number(0, 1), fresh_name()
    if named is None:
        assert told is not None
        named = name_of_rank(told.rank, told.count)
    return Worker(
        named,
        told,
        local_rank=_first(environment, "LOCAL_RANK", "SLURM_LOCALID") or 0,
        restart=_first(environment, "FARSTEP_RESTART", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT") or 0,
        session=environment.get("FARSTEP_SESSION") or None,
        server=environment.get("FARSTEP_SERVER") or None,
        named=not fresh,
    )


def name_of_rank(rank: int, count: int) -> str:
    """Return the name of a worker by its rank; names sort as ranks do, and sync steps sum in their order."""
    return f"w{rank:0{len(str(count - 1))}}"


def fresh_name() -> str:
    """Return a new name: host, process and a random part."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32].strip("-") or "worker"
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def check_name(name: object, field: str) -> None:
    """Refuse what cannot be the name of a worker or a session.

    Raises:
        InvalidOption: the name is invalid.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise invalid_option(
            f"Invalid {field}: {name!r:.80}. A name has letters, digits, '.', '_' and '-', at most 63, and begins with "
            "a letter or a digit.",
            field,
        )


def _told(environment: Mapping[str, str]) -> Number | None:
    """Return the number that a launcher has set; None without one.

    Of Slurm's variables those of a step count: a script of sbatch is one process, whatever the job's size.
    """
    pair = TORCHRUNS
    rank, count = (_number(environment, each) for each in pair)
    if (rank is None) != (count is None):
        there, missing = pair[::-1] if rank is None else pair
        raise invalid_option(
            f"{there} is set, but {missing} is not.", missing, "Set both, or none for the only worker."
        )
    if rank is None:
        pair = SLURMS
        rank, count = (_number(environment, each) for each in pair)
    if rank is None or count is None:
        return None
    if rank >= count:
        raise invalid_option(
            f"{pair[0]} is {rank}, but {pair[1]} is {count}: ranks are numbered from 0.",
            pair[0],
            f"Give each process its own {pair[0]} below {pair[1]}.",
        )
    return Number(rank, count)


def _first(environment: Mapping[str, str], *variables: str) -> int | None:
    """Return the first of these variables that is set."""
    found: Sequence[int] = [each for name in variables if (each := _number(environment, name)) is not None]
    return found[0] if found else None


def _number(environment: Mapping[str, str], variable: str) -> int | None:
    text = environment.get(variable) or None
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > len(str(MOST)) or int(text) > MOST:
        raise invalid_option(
            f"Invalid {variable}: {text!r:.80}. Must be a whole number.", variable, "Set it, or unset it."
        )
    return int(text)
