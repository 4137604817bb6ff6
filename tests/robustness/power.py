"""A session whose server dies or loses its power: what the disk has then, brought back, and trained to its end.

    a life          three workers, in this process, on a storage that logs all that is done to it (`PowerStorage`)
    a loss          the power fails after some operation: what was synced is there, what was not may be
    a death         the process ends after some operation: all that was written is there
    another life    the session is recovered from that disk, every push is sent again, workers in any order in a round

Whatever the disk has, the session comes back at a version that there was, with the bits of that version; it knows every
write that was answered before the loss, with its receipt; and the training ends with the bits of the first life.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast, final

import torch

from farstep.errors import FarstepError, StateRolledBack
from farstep.protocol.consistency import Sync, to_options
from farstep.protocol.durability import Durability, Journal, to_document
from farstep.protocol.memory import tensor_memory
from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.keeping.recovery import Progress, Recovered, recover
from farstep_service.kernels import Kernels
from farstep_service.kernels.kernel import Call, Kernel, KernelSource
from farstep_service.kernels.kernel import Progress as StepProgress
from farstep_service.kernels.reference import ReferenceKernel
from farstep_service.layout import SegmentSpec
from farstep_service.optimizers.rule import AnyRule, KernelName, KernelSignature
from farstep_service.plan import Plan
from farstep_service.session import Session
from farstep_service.sessions.actor import Actor
from farstep_service.sessions.vault import Vault
from farstep_service.settings import Settings
from tests.support.durability.power import PowerStorage

WORKERS: Final = ("w0", "w1", "w2")
STEPS: Final = 6
ROUNDS: Final = 2 * STEPS
"""As every second one accumulates only."""
ELEMENTS: Final = 24
JOURNAL_BYTES: Final = 12_000
"""The largest journal: a snapshot takes its place every few rounds."""
ENOUGH: Final = 5
"""So many broken promises end a run."""
T = TypeVar("T")


class Inline(Executor):
    """Do work at once, so that the operations of a life have one order."""

    def submit(self, work: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **options))
        except BaseException as error:
            done.set_exception(error)
        return done


class Coarse(Kernel):
    """A kernel whose last bits are others than the reference kernel's, as a compiled one's may be."""

    name = "fused"

    def __init__(self, rule: AnyRule) -> None:
        self._reference = ReferenceKernel(rule)

    def execute(self, calls: Sequence[Call], progress: StepProgress) -> None:
        self._reference.execute(calls, progress)
        for call in calls:
            call.out.mul_(1 + 2.0**-20)


class Improving(KernelSource):
    """Choose the reference kernel for first steps and a coarse one afterwards, as a server that compiles one does.

    Args:
        first: how many steps that is.
    """

    def __init__(self, first: int) -> None:
        self._left = first

    def prepare(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> None:
        """Do nothing."""

    def choose(
        self, rule: AnyRule, forms: frozenset[KernelSignature], device: torch.device, wanted: KernelName | None
    ) -> Kernel:
        self._left -= wanted is None
        coarse = wanted == "fused" or (wanted is None and self._left < 0)
        return Coarse(rule) if coarse else ReferenceKernel(rule)

    def reference(self, rule: AnyRule) -> Kernel:
        return ReferenceKernel(rule)


@dataclass
class Sent:
    """One push of a life.

    Attributes:
        told_at: how many operations the storage had done when it was answered.
        receipt: its answer.
    """

    head: PushHead
    told_at: int = 0
    receipt: Receipt | None = None

    @property
    def fingerprint(self) -> str:
        """Return what its body is known by."""
        return f"{self.head.name}"


@dataclass
class Life:
    """What happened to a session, and how the disk came about.

    Attributes:
        began_at: how many operations the storage had done when the first parameters were answered.
        sent: every push in its order.
        bits: the contents of each version.
        ended: the options that were in force at the end.
        improving: whether its server went over to another kernel.
    """

    level: Durability
    storage: PowerStorage
    improving: bool = False
    began_at: int = 0
    sent: list[Sent] = field(default_factory=list)
    bits: dict[int, list[bytes]] = field(default_factory=dict)
    ended: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Losses:
    """What became of losses of power.

    Attributes:
        states: how many disks were tried.
        told: how many answered pushes they had to know.
        rolled_back: how many sessions came back at an older version, and said so.
        wrong: what was not as promised.
    """

    states: int = 0
    told: int = 0
    rolled_back: int = 0
    wrong: list[str] = field(default_factory=list)


def live(level: Durability, directory: str, *, improving: bool = False) -> Life:
    """Let a session live on a storage.

    Args:
        level: how it is kept.
        directory: an empty one, which says who owns the storage.
        improving: its server goes over to another kernel on the way.
    """
    return asyncio.run(_live(Life(level, PowerStorage(), improving), directory))


async def _live(life: Life, directory: str) -> Life:
    vault = Vault(Settings(data_dir=directory, max_journal_bytes=JOURNAL_BYTES), time.monotonic)
    storage: Any = life.storage
    vault.directory.storage = vault._storage = storage
    vault._disk = cast(Any, Inline())
    kernels = Improving(STEPS // 2) if life.improving else Kernels("reference")
    session = Session(_plan(life.level), incarnation="first", kernels=kernels, device="cpu")
    keeper = await vault.create(session)
    actor = Actor(session, Inline(), time.monotonic, keeper=keeper)
    for worker in WORKERS:
        await actor.join(worker, 1)
    head = PutHead(WriteName(WORKERS[0], 1, 1), session.incarnation, ("param",), initial=True)
    intake = actor.begin_put(head, session.plan.layout.nbytes)
    _fill(intake.views, 0)
    await actor.put(head, intake, "first")
    life.began_at = _now(life.storage)
    life.bits[0] = _bits(session)
    for number in range(1, ROUNDS + 1):
        pushes = [asyncio.create_task(_push(life, actor, worker, number)) for worker in WORKERS[:2]]
        if number % 4 == 3 and isinstance(life.level, Journal):
            while not session.position(WORKERS[1])[2]:
                await asyncio.sleep(0)
            await keeper.snapshot()  # while two of three wait at the barrier
        await asyncio.gather(*pushes, _push(life, actor, WORKERS[2], number))
        life.bits[session.version] = _bits(session)
    life.ended = _options(session)
    await asyncio.gather(*keeper._tasks)
    assert keeper.place.last > 3, "there were no snapshots in this life"
    return life


def _plan(level: Durability) -> Plan:
    return Plan.build(
        name="s",
        optimizer="Adam",
        groups=[{"lr": 0.1}],
        segments=[SegmentSpec(f"p{index}", (ELEMENTS,), "float32", 0) for index in range(2)],
        consistency=to_options(Sync(workers=len(WORKERS), deadline_s=600.0, lease_s=3600.0)),
        nonfinite="refuse",
        kernel="reference",
        policy={"accumulate": 2, "ema": 0.9, "clip_norm": 1.0},
        durability=to_document(level),
    )


async def _push(life: Life, actor: Actor, worker: str, number: int) -> None:
    sent = Sent(_head(worker, number, actor.incarnation))
    life.sent.append(sent)
    intake = actor.begin_push(sent.head, actor.plan.layout.nbytes)
    _fill(intake.views, _seed(sent.head))
    answer = await actor.push(sent.head, intake, sent.fingerprint)
    sent.receipt, sent.told_at = answer.receipt, _now(life.storage)


def _head(worker: str, number: int, incarnation: str) -> PushHead:
    first = 1 if worker == WORKERS[0] else 0  # which has sent the first parameters
    groups: Mapping[int, Mapping[str, Any]] = {0: {"lr": 0.1 * 0.9**number}} if number % 3 == 0 else {}
    return PushHead(WriteName(worker, 1, number + first), incarnation, (number - 1) // 2, groups=groups)


def _seed(head: PushHead) -> int:
    return 1000 * WORKERS.index(head.name.worker) + head.name.sequence


def _fill(views: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for view in views:
        view[:] = tensor_memory(torch.randn(len(view) // 4, generator=generator))


def _bits(session: Session) -> list[bytes]:
    """Return every tensor and number of a version."""
    return [bytes(view) for view in session.snapshot()[0].contents.memory()]


def _options(session: Session) -> list[dict[str, Any]]:
    """Return the options that are in force, which may change between two versions."""
    return [group.to_options() for group in session.groups]


def _now(storage: PowerStorage) -> int:
    storage.observe()
    return len(storage.log)


# -- and another life ------------------------------------------------------------------------------------------------


@final
class _Everything(random.Random):
    """Let all that was written arrive, in its order."""

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return (start if stop is None else stop) - 1

    def sample(self, *_: Any, **__: Any) -> list[Any]:
        return []


def lose_power(life: Life, *, seed: int, states: int) -> Losses:
    """Let the power fail so many times, anywhere in a life, and compare what comes back."""
    rng, losses = random.Random(seed), Losses()
    while losses.states < states and len(losses.wrong) < ENOUGH:
        cut = rng.randint(life.began_at, _now(life.storage))
        _try(life, life.storage.crash(rng, cut), cut, rng, losses)
    return losses


def end_process(life: Life, *, seed: int) -> Losses:
    """Let the process end after each operation of a life, and compare what comes back."""
    rng, losses = random.Random(seed), Losses()
    for cut in range(life.began_at, _now(life.storage) + 1):
        disk = _left_behind(life, cut)
        _try(life, disk, cut, rng, losses)
        if len(losses.wrong) == ENOUGH:
            break
    return losses


def damage_gradients(life: Life) -> Session:
    """Flip a bit of the gradients of the last push where the disk has them, and return the session that comes back.

    Raises:
        DamagedJournal: the damage was noticed.
    """
    disk, sent = _left_behind(life, None), life.sent[-1]
    gradients = bytearray(2 * 4 * ELEMENTS)  # of both tensors, which arrive in one piece
    _fill([gradients], _seed(sent.head))
    for file in disk.files.values():
        if file.memory is not None and (at := file.memory.find(gradients)) >= 0:
            file.memory[at] ^= 1
            return _recovered(life, disk).session
    raise AssertionError("the disk does not have the gradients")


def _left_behind(life: Life, cut: int | None) -> PowerStorage:
    """Return the disk of a process that ended after so many operations; None: after all."""
    disk = life.storage.crash(_Everything(), cut)
    disk._boot = life.storage.boot
    return disk


def _recovered(life: Life, disk: PowerStorage) -> Recovered:
    (folder,) = disk.names("sessions")
    kernels = cast(Any, (lambda _: Improving(2 * STEPS)) if life.improving else Kernels)
    return recover(disk, f"sessions/{folder}", Progress(0.0), kernels=kernels, device="cpu")


def _try(life: Life, disk: PowerStorage, cut: int, rng: random.Random, losses: Losses) -> None:
    losses.states += 1
    try:
        _recover(life, disk, cut, rng, losses)
    except Exception as error:  # whatever keeps a session from coming back
        losses.wrong.append(f"cut at {cut}: {type(error).__name__}: {error}")


def _recover(life: Life, disk: PowerStorage, cut: int, rng: random.Random, losses: Losses) -> None:
    recovered = _recovered(life, disk)
    session = recovered.session
    if session.initialised and _bits(session) != life.bits.get(session.version):
        raise AssertionError(f"it came back at version {session.version} with bits that it never had")
    if session.incarnation != life.sent[0].head.incarnation:
        _check_announced(life, session)
        _check_again(life, disk, session)
        losses.rolled_back += 1
        return
    told = [each for each in life.sent if each.receipt and each.told_at <= cut]
    losses.told += len(told)
    if life.improving:  # the steps that are left would be taken by another kernel now
        return
    for first in range(0, len(life.sent), len(WORKERS)):
        for sent in rng.sample(life.sent[first : first + len(WORKERS)], len(WORKERS)):
            contribution = session.contribution(sent.head)
            _fill(contribution.allocate(), _seed(sent.head))
            outcomes = session.push(sent.head, contribution, sent.fingerprint, recovered.now)
            outcome = outcomes.get(sent.head.name)
            if sent in told and (outcome is None or not outcome.duplicate or outcome.result != sent.receipt):
                raise AssertionError(f"{sent.head.name} was answered with {sent.receipt}, and comes to {outcome} now")
    last = max(life.bits)
    if session.version != last or _bits(session) != life.bits[last] or _options(session) != life.ended:
        raise AssertionError(f"the training ends at version {session.version} with other bits")


def _check_announced(life: Life, session: Session) -> None:
    """See that a session that went back says so to its workers, which only a level that may lose steps does."""
    if isinstance(life.level, Journal) and life.level.sync != "os":
        raise AssertionError("it came back as another one, although nothing may be lost")
    try:
        session.check(life.sent[-1].head.name, life.sent[-1].head.incarnation)
    except StateRolledBack:
        return
    except FarstepError as error:
        raise AssertionError(f"a worker is told {error.code} of a session that went back") from error
    raise AssertionError("a write to a session that went back is taken")


def _check_again(life: Life, disk: PowerStorage, session: Session) -> None:
    """See that a session that went back, and whose process dies before anything happens, still says so."""
    died = disk.crash(_Everything())
    died._boot = disk.boot
    again = _recovered(life, died).session
    if again.version != session.version:
        raise AssertionError(f"it came back at version {session.version}, and then at {again.version}")
    if isinstance(life.level, Journal) and again.incarnation != session.incarnation:
        raise AssertionError("it came back as a third one, although nothing had happened")
    _check_announced(life, again)
