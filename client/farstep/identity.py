"""Who a worker is: its name, its number among all workers, and its share of the data.

    me = farstep.worker()
    optimizer = farstep.optim.SGD(params, lr=0.1, worker=me, consistency=farstep.Sync(workers=me.count))
    for example in me.share(examples): ...

What is not said is read from the environment, the first that is there of each row:

                 farstep launch      torchrun                      srun of Slurm            else
    name         FARSTEP_WORKER      w and the rank                w and the rank           a fresh one
    rank         RANK                RANK                          SLURM_PROCID             0
    count        WORLD_SIZE          WORLD_SIZE                    SLURM_STEP_NUM_TASKS     1
    local_rank   LOCAL_RANK          LOCAL_RANK                    SLURM_LOCALID            0
    restart      FARSTEP_RESTART     TORCHELASTIC_RESTART_COUNT    SLURM_RESTART_COUNT      0

A worker that is given a name and no number may be one of several: it has no rank, and says so when it is asked for it.
Else two of them would take the same data, and nobody would notice.
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
    """What `Worker.share` takes: a list, a range, an array, a tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: Any, /) -> Any: ...


Items = TypeVar("Items", bound=Sliceable)


@final
@dataclass(frozen=True, slots=True)
class Number:
    """The place of a worker among all of them.

    Attributes:
        rank: from 0.
        count: how many workers there are.

    Raises:
        InvalidOption: there is no such place.
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
        number: its rank and how many there are; None if it was given a name only.
        local_rank: its rank among the workers of its machine.
        restart: how often it was started again.
        named: its name was given, or is that of its rank; a fresh one is another in every run.
        session, server: what FARSTEP_SESSION and FARSTEP_SERVER say, None for nothing; an optimizer may be elsewhere.

    Raises:
        InvalidOption: it is no name.
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
        """How many workers were started.

        Raises:
            InvalidOption: it was given a name only.
        """
        return self._numbered().count

    def share(self, items: Items) -> Items:
        """Return every `count`-th of some items, from the `rank`-th on: each is one worker's, and none is left out.

        Shares differ by one item at most. A tensor is divided by its rows. For what has no slices, share its indices:
        `torch.utils.data.Subset(dataset, me.share(range(len(dataset))))`.

        Raises:
            InvalidOption: the items have no slices, or ones of another kind; or this worker was given a name only.
        """
        number = self._numbered()
        part = slice(number.rank, None, number.count)
        try:
            size = len(items)
            share = items[part]
            fits = len(share) == len(range(size)[part])
        # What may come of a slice that is not taken: torch's `Dataset` says NotImplementedError, a map KeyError.
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
    """Return who this process is: what is said here, else what `farstep launch`, torchrun or Slurm says.

    A process that was told nothing is the only worker. It needs no server and opens no session.

    Args:
        name: letters, digits, '.', '_' and '-', at most 63; each worker of a session needs its own.
        rank, count: its number, from 0, and how many workers there are; both or none.
        environment: where the rest is read.

    Raises:
        InvalidOption: a name or a number that cannot be, or half of what belongs together; it names the variable.
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
    """Return the name of one of so many workers; names sort as ranks do, and sync steps sum in their order."""
    return f"w{rank:0{len(str(count - 1))}}"


def fresh_name() -> str:
    """Return a name that nobody has: host, process and a random part."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32].strip("-") or "worker"
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def check_name(name: object, field: str) -> None:
    """Refuse what cannot be the name of a worker or a session.

    Raises:
        InvalidOption: it cannot.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise invalid_option(
            f"Invalid {field}: {name!r:.80}. A name has letters, digits, '.', '_' and '-', at most 63, and begins with "
            "a letter or a digit.",
            field,
        )


def _told(environment: Mapping[str, str]) -> Number | None:
    """Return the number that a launcher says; None if there is none.

    Of Slurm's variables those of a step count: a script of sbatch by itself is one process, whatever the job has.
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
    """Return the first of these numbers that is there."""
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
