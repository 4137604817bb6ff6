"""The average of a session's parameters: torch's `AveragedModel` with an EMA, updated at each step, is the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farstep.errors import InvalidOption
from farstep.protocol.fields import PRESENT
from tests.session.averaged import DECAY, Averaged, averages
from tests.session.failing import FailingKernels
from tests.session.writers import begun, equal, error, new_session, parameters, receipt, values
from tests.support.durability.files import restored, written


@pytest.mark.parametrize("optimizer", ["Adagrad", "Adam", "RMSprop", "ASGD"])
def test_the_average_is_torchs(optimizer: str) -> None:
    """After each step, in float32, float64 and complex, also of a parameter that had no gradient; bit for bit."""
    session = new_session(optimizer=optimizer, ema=DECAY)
    (writer,) = begun(session)
    twin = Averaged(parameters(session), optimizer, lr=0.1)
    assert equal(averages(session), parameters(session))
    for seed in range(1, 6):
        gradients: list[Tensor | None] = list(values(session, seed))
        gradients[seed % 4] = None if seed > 1 else gradients[seed % 4]
        writer.push(gradients)
        assert equal(parameters(session), twin.step(gradients))
        assert equal(averages(session), twin.averages)


def test_steps_that_are_not_taken_are_not_averaged() -> None:
    """Of accumulated and skipped pushes the average takes no notice."""
    session = new_session(ema=DECAY, accumulate=2)
    (writer,) = begun(session)
    twin = Averaged(parameters(session))
    for seed in range(3):
        given = [values(session, 2 * seed), values(session, 2 * seed + 1)]
        writer.push(given[0])
        writer.skip()
        writer.push(given[1])
        twin.step([(one + other) / 2 for one, other in zip(*given, strict=True)])
        assert equal(averages(session), twin.averages)


@pytest.mark.parametrize("read_first", [False, True])
@pytest.mark.parametrize("block", range(6))
def test_a_step_that_was_finished_later_is_averaged_once(block: int, read_first: bool) -> None:
    """Whether the retry finishes it or somebody who reads the average first."""
    kernels = FailingKernels()
    session = new_session(names=("w", "b", "scale"), kernels=kernels, ema=DECAY)
    (writer,) = begun(session)
    twin = Averaged(parameters(session))
    writer.push(values(session, 1))
    twin.step(values(session, 1))
    kernels.fault.at, name = block, writer.named()
    error(writer.push(values(session, 2))[name])
    kernels.fault.at = None
    twin.step(values(session, 2))
    if read_first:
        assert equal(averages(session), twin.averages)
    assert receipt(writer.push(values(session, 2)), name).version == 2
    assert equal(averages(session), twin.averages)
    writer.push(values(session, 3))
    twin.step(values(session, 3))
    assert equal(averages(session), twin.averages)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_file_has_the_average(steps: int) -> None:
    """A session that was exported and imported goes on averaging as it would have; before a step there is none yet."""
    session = new_session(ema=DECAY)
    (writer,) = begun(session)
    twin = Averaged(parameters(session))
    for seed in range(steps):
        writer.push(values(session, seed))
        twin.step(values(session, seed))
    file = written(session)
    assert (b'"ema/w"' in file) == bool(steps)
    again = restored(file)
    assert again.plan.policies.to_options() == {"ema": DECAY}
    assert again.nbytes() == session.nbytes()
    assert written(again) == file
    writer = begun(again)[0]
    writer.push(values(session, 9))
    twin.step(values(session, 9))
    assert equal(averages(again), twin.averages)


def test_the_average_is_counted_as_memory() -> None:
    """From the first step on it takes as much as the parameters; a session without one says nothing of it."""
    session = new_session(ema=DECAY, names=("w", "b"))
    (writer,) = begun(session)
    assert session.nbytes()["views"] == 0
    writer.push(values(session, 1))
    assert session.nbytes()["views"] == session.nbytes()["parameters"]
    assert "views" not in new_session().nbytes()


def test_parameters_that_are_added_are_averaged_from_then_on() -> None:
    """Their average begins with what they are when they come; that of the others goes on."""
    session = new_session(ema=DECAY)
    (writer,) = begun(session)
    twin = Averaged(parameters(session))
    writer.push(values(session, 1))
    twin.step(values(session, 1))
    late = torch.arange(6.0).view(2, 3)
    writer.append({"late": late})
    assert equal(averages(session), [*twin.averages, late])
    writer.push(values(session, 2))
    twin.step(values(session, 2)[:-1])
    moved = parameters(session)[-1]
    assert equal(averages(session), [*twin.averages, torch.lerp(late, moved, 1 - DECAY)])


@pytest.mark.parametrize("some", [[0, 4], [1, 3]])
def test_parameters_that_are_written_move_the_average_with_the_next_step(some: list[int]) -> None:
    """Writing is no step: the average stays until one is taken, and then follows what is there."""
    session = new_session(ema=DECAY)
    (writer,) = begun(session)
    twin = Averaged(parameters(session))
    writer.push(values(session, 1))
    twin.step(values(session, 1))
    fresh = values(session, 5)[slice(*some)]
    writer.put({"param": fresh}, segments=some)
    assert equal(averages(session), twin.averages)
    for parameter, written_one in zip(twin.parameters[slice(*some)], fresh, strict=True):
        parameter.copy_(written_one)
    writer.push(values(session, 2))
    assert equal(parameters(session), twin.step(values(session, 2)))
    assert equal(averages(session), twin.averages)


def test_the_average_can_be_written() -> None:
    """Some of it or all, alone or with parameters; written alone it changes neither these nor the version."""
    session = new_session(ema=DECAY)
    (writer,) = begun(session)
    writer.push(values(session, 1))
    before, others = parameters(session), values(session, 5)
    writer.put({"ema": others})
    assert session.version == 1
    assert equal(averages(session), others)
    assert equal(parameters(session), before)
    writer.put({"ema": before[1:2], "param": others[1:2]}, segments=[1, 2])
    assert session.version == 2
    assert equal(averages(session), [others[0], before[1], *others[2:]])
    assert equal(parameters(session), [before[0], others[1], *before[2:]])


def test_the_average_may_be_written_before_the_first_step() -> None:
    """As after a checkpoint was loaded: the first step then moves it instead of beginning it; no state comes of it."""
    session = new_session(ema=DECAY)
    (writer,) = begun(session)
    others = values(session, 5)
    before, _ = session.copy((PRESENT,))
    writer.put({"ema": others})
    after, _ = session.copy((PRESENT,))
    assert after.numbers[PRESENT].tolist() == before.numbers[PRESENT].tolist()
    writer.push(values(session, 1))
    moved = zip(others, parameters(session), strict=True)
    assert equal(averages(session), [torch.lerp(old, now, 1 - DECAY) for old, now in moved])


def test_a_session_without_an_average_has_no_such_field() -> None:
    """Whoever asks for it is told what there is."""
    session = new_session()
    begun(session)
    with pytest.raises(InvalidOption, match="has no field 'ema'"):
        session.copy(("ema",))
