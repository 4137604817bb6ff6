"""What every policy that changes gradients keeps to, in sessions by themselves, embedded and on a server.

The formulas of the table are the oracle, on the mean of the workers' gradients. Two rows are of policies that farstep
does not have and that are registered here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import farstep
from farstep.errors import FarstepError, InvalidOption, NonFinite, OptionsDiffer
from farstep.protocol.policies import ClipNorm, Policies, default_options, policies, register, unregister
from farstep.protocol.receipt import Receipt
from farstep.settings import resolve
from tests.policies.table import ROWS, TOYS, Facts, Row, names, toys
from tests.session.writers import Twin, begun, equal, error, new_session, parameters, receipt, sync, values
from tests.support.client.twins import drawn, some_rows
from tests.support.client.twins import parameters as to_optimize
from tests.support.service.plain import plain_server

REAL = ("w", "b")
SHAPES: list[tuple[int, ...]] = [(7, 5), (5,), (2, 3, 4)]
every_row = pytest.mark.parametrize("row", ROWS, ids=names(ROWS))


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """Make the policies of the table known here."""
    with toys():
        yield


@pytest.fixture(scope="module")
def url(registered: None) -> Iterator[str]:
    """Run a server in this process, which then knows what is registered here."""
    with plain_server() as running:
        yield running


@pytest.fixture(params=["embedded", "server"])
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Name a place for a private session."""
    there = {"server": request.getfixturevalue("url")} if request.param == "server" else {}
    return {"kernel": "reference", **there}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Add up with one thread on both sides: how a sum is cut decides how it is rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(ours: Sequence[Tensor], theirs: Sequence[Tensor], facts: Facts, expected: Facts, *rows: Row) -> None:
    """Compare parameters and facts with what formulas led to."""
    if all(row.exact for row in rows):
        assert equal(ours, theirs)
        assert facts == expected
    else:
        torch.testing.assert_close(list(ours), list(theirs), rtol=1e-5, atol=1e-6)
        assert facts == pytest.approx(expected, rel=1e-5)


def test_every_policy_has_a_row() -> None:
    """A policy that is added without a row in the table is not tested, so it is refused here."""
    given = {name for row in ROWS for name in row.options}
    assert {name for kind in policies() if kind.changes_gradients for name in kind.defaults()} <= given


@every_row
def test_the_mean_of_the_workers_gradients_is_what_the_formula_takes(row: Row) -> None:
    """A step of two workers is torch's along it, and every receipt has the facts."""
    session = new_session(names=REAL, consistency=sync(2), **row.written)
    writers = begun(session, "w0", "w1")
    twin = Twin(parameters(session))
    for seed in range(0, 8, 2):
        given = [values(session, seed + index) for index in range(2)]
        called = [writer.named() for writer in writers]
        writers[0].push(given[0])
        outcomes = writers[1].push(given[1])
        writers[0].last += 1
        gradients, expected = row.after([(one + other) / 2 for one, other in zip(*given, strict=True)])
        theirs = twin.step(gradients)
        for name in called:
            check(parameters(session), theirs, dict(receipt(outcomes, name).facts), expected, row)


@every_row
def test_an_optimizer_takes_it_as_an_argument(row: Row, place: dict[str, Any]) -> None:
    """Its reports have the facts, the caller's gradients stay as they are, and a copy goes on with it."""
    here, there = to_optimize(drawn(0, SHAPES)), to_optimize(drawn(0, SHAPES))
    ours = farstep.optim.Adagrad(here, lr=0.1, **place, **row.options)
    theirs = torch.optim.Adagrad(there, lr=0.1, foreach=False)
    for seed in range(1, 4):
        given = drawn(seed, SHAPES)
        gradients, expected = row.after([each.clone() for each in given])
        for p, q, gradient, changed in zip(here, there, given, gradients, strict=True):
            p.grad, q.grad = gradient.clone(), changed
        ours.step()
        theirs.step()
        assert ours.last_step is not None
        check(here, there, dict(ours.last_step.facts), expected, row)
        assert equal([p.grad for p in here if p.grad is not None], given)
    copied = copy.deepcopy(ours)
    assert copied._membership.settings.policies == ours._membership.settings.policies != Policies()


@every_row
def test_sparse_gradients_are_those_that_they_stand_for(row: Row) -> None:
    """Rows that are named twice are added up first, and rows that are missing stay so."""
    session = new_session(names=REAL, **row.written)
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    rows = some_rows(values(session, 1)[0], 1)
    twice = torch.sparse_coo_tensor(
        torch.cat([rows.indices(), rows.indices()], 1),
        torch.cat([rows.values(), rows.values()]),
        rows.shape,
        check_invariants=True,
    )
    dense = values(session, 2)[1]
    name = writer.named()
    found = receipt(writer.push([twice, dense]), name)
    (changed, other), expected = row.after([2 * rows.values(), dense.clone()])
    there = torch.sparse_coo_tensor(rows.indices(), changed, rows.shape, check_invariants=True)
    check(parameters(session), twin.step([there, other]), dict(found.facts), expected, row)


@every_row
def test_complex_parameters_are_taken_or_refused_when_the_session_is_made(row: Row) -> None:
    """A policy that does not go with them names the parameter, also when it comes with a param group."""
    if row.takes_complex:
        (writer,) = begun(new_session(names=("w", "z"), **row.written))
        name = writer.named()
        assert receipt(writer.push(values(writer.session, 1)), name).applied
        return
    with pytest.raises(InvalidOption, match="'z', whose gradients are complex"):
        new_session(names=("w", "z"), **row.written)
    (writer,) = begun(new_session(names=("w",), **row.written))
    with pytest.raises(InvalidOption, match="'z', whose gradients are complex"):
        writer.append({"z": torch.ones(3, dtype=torch.complex64)})


@every_row
def test_a_value_out_of_range_is_refused_on_the_side_that_reads_it(row: Row) -> None:
    """By the optimizer before anything is sent, and by a server that is asked for it."""
    option, value, words = row.wrong
    wrong: dict[str, Any] = {**row.options, option: value}
    with pytest.raises(InvalidOption, match=f"{option}.*{words}") as found:
        resolve(wrong, {})  # type: ignore[arg-type]  # options of toys, too
    assert (found.value.side, found.value.field) == ("client", option)
    with pytest.raises(InvalidOption, match=f"{option}.*{words}") as found:
        Policies.from_options(wrong)
    assert (found.value.side, found.value.field) == ("server", option)


@every_row
def test_what_is_written_is_read_again(row: Row) -> None:
    """Options travel as a document that names the policies asked for and no others; a worker with others is refused."""
    asked = Policies.of(row.options)
    assert asked.to_options() == row.written
    assert Policies.from_options(asked.to_options()) == asked
    assert asked.difference(Policies.of(asked.options())) is None
    assert asked.options().keys() == default_options().keys()
    first = next(name for name in default_options() if name in row.options)
    assert asked.difference(Policies()) == f"its {first} is {row.options[first]!r}, not {default_options()[first]!r}"


@every_row
def test_a_worker_that_asks_for_another_one_is_refused(row: Row, url: str) -> None:
    """Policies belong to what a session is, and the refusal names the difference."""
    place: Any = {"server": url, "session": f"differing-{row.name}".replace("=", "."), "consistency": farstep.Async()}
    (p,) = to_optimize(drawn(0, [(3,)]))
    farstep.optim.SGD([p], lr=0.1, worker="w0", **place, **row.options)
    with pytest.raises(OptionsDiffer, match=f"its {next(iter(row.options))} is"):
        farstep.optim.SGD([p], lr=0.1, worker="w1", **place)


@every_row
@pytest.mark.parametrize("nonfinite", ["refuse", "skip"])
def test_a_sum_that_overflows_makes_no_step(row: Row, nonfinite: str) -> None:
    """NaN and Inf are found before a policy changes anything, whether or not it looks for them itself."""
    session = new_session(names=REAL, consistency=sync(2), nonfinite=nonfinite, **row.written)
    writers = begun(session, "w0", "w1")
    before = [each.clone() for each in parameters(session)]
    large = [torch.full((3, 4), 3e38), torch.zeros(5)]
    name = writers[0].named()
    writers[0].push(large)
    outcomes = writers[1].push(large)
    if nonfinite == "skip":
        assert (receipt(outcomes, name).reason, receipt(outcomes, name).facts) == ("nonfinite", ())
    else:
        assert isinstance(error(outcomes[name]), NonFinite)
    assert equal(parameters(session), before)
    assert session.version == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [pair for pair in combinations(ROWS, 2) if set(pair[0].options).isdisjoint(pair[1].options)],
    ids=lambda row: row.name,
)
@pytest.mark.parametrize("rounds", [1, 2])
def test_policies_act_one_after_the_other(first: Row, second: Row, rounds: int) -> None:
    """In the order of their table, on the mean of the rounds that are accumulated."""
    session = new_session(names=REAL, accumulate=rounds, **first.written, **second.written)
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    for seed in range(3):
        given = [values(session, 10 * seed + index) for index in range(rounds)]
        for own in given:
            name = writer.named()
            found = receipt(writer.push(own), name)
        mean = [sum(each[1:], start=each[0]) / rounds for each in zip(*given, strict=True)]
        halfway, one = first.after(mean)
        gradients, other = second.after(list(halfway))
        check(parameters(session), twin.step(gradients), dict(found.facts), {**one, **other}, first, second)


@every_row
def test_a_step_without_gradients_is_taken(row: Row) -> None:
    """Nothing is changed then, and what is said of nothing is finite."""
    session = new_session(names=REAL, **row.written)
    (writer,) = begun(session)
    name = writer.named()
    found = receipt(writer.push([None, None]), name)
    assert (found.applied, found.version) == (True, 1)
    assert all(math.isfinite(value) for _, value in found.facts)


@every_row
def test_an_optimizer_that_searches_along_gradients_refuses_it(row: Row, place: dict[str, Any]) -> None:
    """L-BFGS takes gradients for what the objective's are."""
    (p,) = to_optimize(drawn(0, [(3,)]))
    with pytest.raises(InvalidOption, match=f"{next(iter(row.options))} does not go with LBFGS"):
        farstep.optim.LBFGS([p], **place, **row.options)


@every_row
def test_what_is_looked_at_does_not_change_meanwhile(row: Row) -> None:
    """Gradients in memory that a worker shares are copied where a policy looks at them before it changes them."""
    session = new_session(names=REAL, nonfinite="allow", **row.written)
    looks = any(kind.looks for kind in policies() if set(kind.defaults()) & set(row.options))
    assert session.plan.looks_at_gradients == looks


def test_a_registered_policy_is_known_until_it_is_removed() -> None:
    """To optimizers, to sessions, and to those who read receipts of it."""
    before = Receipt(1, 0, facts=(("grad_norm", 2.0), ("grad_rms", 1.5)))
    assert Receipt.from_header(before.to_header()) == before
    for kind in TOYS:
        with pytest.raises(ValueError, match="already"):
            register(kind)
    with pytest.raises(ValueError, match="'clip_norm' already"):
        register(ClipNorm)


def test_a_policy_that_is_not_registered_is_unknown(unregistered: None) -> None:
    """Its option is no argument and of no session, and its facts are left out of receipts."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'sign'"):
        resolve({"sign": True}, {})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(FarstepError, match="Unknown option 'sign' of a policy"):
        new_session(names=REAL, sign=True)
    header = Receipt(1, 0, facts=(("grad_norm", 2.0), ("grad_rms", 1.5))).to_header()
    assert Receipt.from_header(header).facts == (("grad_norm", 2.0),)


@pytest.fixture
def unregistered() -> Iterator[None]:
    """Take the toys away for one test."""
    for kind in TOYS:
        unregister(kind)
    yield
    for kind in TOYS:
        register(kind)
