"""Memory that runs out at any place of a step or a write: nothing half applied, and the same name works afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from farstep.errors import FarstepError, OutOfMemory, StepInterrupted
from farstep.protocol.receipt import Receipt
from farstep_service.machine import out_of_memory
from farstep_service.session import Outcomes, Session
from tests.session.writers import ASYNC, Writer, begun, equal, new_session, sync, values

TAKES = ("aten::empty", "aten::zeros", "aten::clone", "aten::cat", "aten::_to_copy", "aten::new_", "aten::full")
REFUSAL = (
    "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
)


class Exhausted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse one request for memory, as torch does where the system has none.

    Args:
        at: the number of the request.
    """

    def __init__(self, at: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = at
        self.refused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().startswith(TAKES):
            self._left -= 1
            if self._left == 0:
                self.refused = True
                raise RuntimeError(REFUSAL)
        return function(*args, **(kwargs or {}))


def contents(session: Session) -> list[torch.Tensor]:
    """Return a copy of everything that a snapshot has."""
    snapshot, _ = session.snapshot()
    elements = snapshot.contents.elements.values()
    count = len(session.plan.layout.segments)
    return [each.segment(index).clone() for each in elements for index in range(count)] + [
        each.clone() for each in snapshot.contents.numbers.values()
    ]


Write = Callable[[Writer], Outcomes]


def pushed(writer: Writer) -> Outcomes:
    return writer.push(values(writer.session, 9))


def pushed_sparsely(writer: Writer) -> Outcomes:
    rows = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2, 4), (3, 4), check_invariants=True)
    return writer.push([rows, *values(writer.session, 9)[1:]])


def written(writer: Writer) -> Outcomes:
    """Write fields that the session has no memory for as yet, among others."""
    session = writer.session
    names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema")
    return writer.put({**{name: values(session, seed) for seed, name in enumerate(names)}, "step": [3.0] * 4})


def appended(writer: Writer) -> Outcomes:
    return writer.append({"late": torch.ones(5)})


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize(
    ("write", "options"),
    [
        (pushed, {"optimizer": "Adam"}),
        (pushed, {"optimizer": "Adagrad", "ema": 0.9, "clip_norm": 0.1}),
        (pushed, {"optimizer": "SGD", "groups": ({"lr": 0.1, "momentum": 0.9},), "accumulate": 2}),
        (pushed, {"consistency": sync(1)}),
        (pushed_sparsely, {"accumulate": 3}),
        (written, {"optimizer": "Adam", "ema": 0.9}),
        (appended, {"ema": 0.9}),
    ],
)
def test_what_finds_no_memory_is_done_once_when_it_does(write: Write, options: dict[str, object], before: int) -> None:
    """At whatever request for memory a write fails, a retry of the same name leaves what one undisturbed write does."""

    def session() -> Writer:
        (writer,) = begun(new_session(**{"consistency": ASYNC, **options}))  # type: ignore[arg-type]
        for _ in range(before):
            (write if write in (pushed, pushed_sparsely) else pushed)(writer)
        return writer

    undisturbed = session()
    write(undisturbed)
    expected, refusals, at = contents(undisturbed.session), 0, 0
    while True:
        at += 1
        writer = session()
        outcome: Receipt | Exception
        name, untouched = writer.named(), (writer.session.version, contents(writer.session))
        with writer.session.hold()[0], Exhausted(at) as memory:
            try:
                outcome = write(writer)[name].result
            except (FarstepError, RuntimeError) as exc:
                outcome = exc
        if not memory.refused:
            break
        refusals += 1
        if not isinstance(outcome, Receipt | StepInterrupted):
            assert writer.session.version == untouched[0]
            assert equal(contents(writer.session), untouched[1])
            short = outcome if isinstance(outcome, OutOfMemory) else out_of_memory(outcome, "It")
            assert short is not None
            assert short.extra["asked"] == 4096
        if not isinstance(outcome, Receipt):
            assert isinstance(write(writer)[name].result, Receipt)
        assert equal(contents(writer.session), expected), f"request {at} ended with {outcome!r}"
        assert writer.session.version == undisturbed.session.version
    assert refusals > 1
