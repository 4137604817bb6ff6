"""Trainings with every codec on the wire, bit by bit those of torch along gradients that went through the formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

import farstep
from farstep.errors import InvalidRequest, NonFinite, Unavailable
from farstep.http_link import HttpLink
from farstep.overlap import STREAMED
from farstep.protocol.codecs import Wire
from farstep.settings import RemoteOptions
from tests.codecs.table import ROWS, TOYS, Row, names, toys
from tests.support.client.overlapping import Both
from tests.support.client.rounding import at, like
from tests.support.client.twins import check_parameters, drawn, parameters, some_rows
from tests.support.faults import Network, faulty
from tests.support.service.plain import plain_server

SHAPES: list[tuple[int, ...]] = [(70, 9), (5,), (), (0, 3), (2, 3, 4), (131,)]
LARGE: list[tuple[int, ...]] = [(1200, 900), (33,), (1100, 1001), (5, 7)]
FRESH = count()
FEEDBACK = next(row for row in ROWS if row.codec.residual)
every_codec = pytest.mark.parametrize("row", ROWS, ids=names(ROWS))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Run a server in this process, which then knows the codecs that are registered here."""
    with toys(), plain_server() as running:
        yield running


@pytest.fixture
def network(url: str) -> Iterator[Network]:
    with faulty(int(url.rpartition(":")[2])) as between:
        yield between


class Trained:
    """An optimizer with a codec on its wire beside torch's, whose gradients go through the formula here.

    What the formula leaves out is added to the next gradient where the codec says so.
    """

    def __init__(
        self, url: str, row: Row, start: Sequence[Tensor], *, name: str = "Adagrad", wire: Wire | None = None, **of: Any
    ) -> None:
        option = row.codec.option
        self.wire, self.row = wire or Wire(gradients=option, parameters=option), row
        self.here, self.there = parameters(start), parameters(start)
        self.place = at({"server": url, "session": f"codec-{next(FRESH)}", "kernel": "reference"}, **of)
        self.ours = getattr(farstep.optim, name)(self.here, lr=0.1, wire=self.wire, **self.place)
        plain = {} if name == "SparseAdam" else {"foreach": False}
        self.theirs = getattr(torch.optim, name)(self.there, lr=0.1, **plain)
        self.left = [torch.zeros(p.shape) for p in start]

    def after(self, tensor: Tensor) -> Tensor:
        return self.row.after(tensor.reshape(-1)).view(tensor.shape) if tensor.dtype is torch.float32 else tensor

    def set(self, gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(self.here, gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()

    def follow(self, gradients: Sequence[Tensor | None]) -> None:
        """Take torch's step, as the session took ours."""
        feedback = self.row.codec.residual
        for index, (q, gradient) in enumerate(zip(self.there, gradients, strict=True)):
            q.grad = gradient
            if gradient is None or not self.wire.gradients:
                continue
            wanted = gradient + self.left[index] if feedback and gradient.dtype is torch.float32 else gradient
            q.grad = self.after(wanted)
            if feedback and gradient.dtype is torch.float32:
                self.left[index] = wanted - q.grad
        self.theirs.step()

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        self.set(gradients)
        self.ours.step()
        self.follow(gradients)

    def check(self) -> None:
        """Compare what is here, and what the session has: another worker brings it as it is."""
        expected = [q.detach() for q in self.there]
        check_parameters(self.here, [self.after(q) for q in expected] if self.wire.parameters else expected)
        assert self.ours._membership.link.edited([p.data_ptr() for p in self.here]) == []
        full = parameters(torch.zeros_like(q) for q in self.there)
        type(self.ours)(full, lr=0.1, **self.place).close()
        check_parameters(full, self.there)

    def close(self) -> None:
        assert self.ours.last_step is not None
        self.ours.close()


@every_codec
@pytest.mark.parametrize("way", ["both", "gradients", "parameters"])
def test_a_training_is_torchs_along_what_arrived(url: str, row: Row, way: str) -> None:
    """With float64 and bfloat16 parameters between; exactly the announced bytes travel."""
    start = [*drawn(0, SHAPES), *drawn(1, [(9, 3)], torch.float64), *drawn(2, [(6,)], torch.bfloat16)]
    option = row.codec.option
    wire = Wire(gradients=option if way != "parameters" else None, parameters=option if way != "gradients" else None)
    both = Trained(url, row, start, wire=wire)
    for seed in range(1, 7):
        both.step(like(both.here, seed))
    both.check()
    encoded = sum(row.nbytes(p.numel()) for p in start if p.dtype is torch.float32) + 27 * 8 + 6 * 2
    full = sum(p.nbytes for p in start)
    report = both.ours.last_step
    assert report is not None
    assert report.bytes_sent == (encoded if wire.gradients else full)
    assert report.bytes_received == (encoded if wire.parameters else full)
    both.close()


@every_codec
def test_a_large_training_is_torchs_too(url: str, row: Row) -> None:
    """Gradients are encoded while they are sent, where the codec has blocks."""
    both = Trained(url, row, drawn(0, LARGE))
    for seed in range(1, 4):
        both.step(like(both.here, seed))
    both.check()
    both.close()


@pytest.mark.parametrize("row", [ROWS[0], *TOYS], ids=names([ROWS[0], *TOYS]))
def test_a_push_begins_during_backward_where_its_codec_allows_it(url: str, row: Row) -> None:
    """Units are encoded as they become final; a codec without blocks, or with feedback, is pushed in step()."""
    wire = Wire(gradients=row.codec.option)
    streamed, whole = Both(url, wire=wire), Both(url, wire=wire, overlap=False)
    streams = row.codec.block is not None and not row.codec.residual
    assert streamed.train(4) == (["", *[STREAMED] * 3] if streams else [""] * 4)
    whole.train(4)
    check_parameters([*streamed.here.parameters()], [*whole.here.parameters()])
    streamed.ours.close()
    whole.ours.close()


@every_codec
def test_missing_gradients_and_edits(url: str, row: Row) -> None:
    """A parameter without a gradient is not stepped, and one that was edited replaces the session's in full."""
    both = Trained(url, row, drawn(0, SHAPES))
    both.step(like(both.here, 1))
    for seed in range(2, 6):
        both.step([None if (seed + index) % 2 else g for index, g in enumerate(like(both.here, seed))])
    both.check()
    (edited,) = drawn(5, [SHAPES[0]])
    both.here[0].data.copy_(edited)
    both.there[0].data.copy_(edited)
    both.step(like(both.here, 9))
    both.check()
    assert both.ours.pull() == both.ours.version
    both.check()
    both.close()


@every_codec
@pytest.mark.parametrize("name", ["Adagrad", "SparseAdam"])
def test_sparse_gradients(url: str, row: Row, name: str) -> None:
    """Their values are encoded, in one piece and without feedback; their indices are not."""
    both = Trained(url, row, drawn(0, [(12, 30)]), name=name)
    for seed in range(1, 5):
        (dense,) = like(both.here, seed)
        gradient = some_rows(dense, seed)
        both.here[0].grad = gradient.clone()
        values = both.after(gradient.values())
        both.there[0].grad = torch.sparse_coo_tensor(
            gradient.indices(), values, gradient.shape, check_invariants=True
        ).coalesce()
        both.ours.step()
        both.theirs.step()
        report = both.ours.last_step
        assert report is not None
        assert report.bytes_sent == gradient.indices().nbytes + row.nbytes(values.numel())
    both.check()
    both.close()


@every_codec
def test_a_group_that_is_added_late(url: str, row: Row) -> None:
    """It travels in full, and the next steps encode it with the others; what was left out before is kept."""
    both = Trained(url, row, drawn(0, SHAPES))
    both.step(like(both.here, 1))
    start = drawn(9, [(300,), (4, 4)])
    here, there = parameters(start), parameters(start)
    both.ours.add_param_group({"params": here})
    both.theirs.add_param_group({"params": there})
    both.here, both.there = [*both.here, *here], [*both.there, *there]
    both.left += [torch.zeros(p.shape) for p in start]
    for seed in range(2, 5):
        both.step(like(both.here, seed))
    check_parameters(both.here, [both.after(q.detach()) for q in both.there])
    both.ours.close()


@every_codec
def test_workers_of_a_sync_session_each_with_its_codec(url: str, row: Row) -> None:
    """The mean is that of what arrived, whatever each of them chose."""
    (start,) = drawn(0, [(40, 5)])
    place: RemoteOptions = {"server": url, "session": f"codec-{next(FRESH)}", "kernel": "reference", "timeout_s": 30}
    (q,) = parameters([start])
    theirs = torch.optim.Adagrad([q], lr=0.1, foreach=False)
    models = [parameters([start]) for _ in range(2)]
    wires = [Wire(gradients=row.codec.option), Wire()]
    workers = [
        farstep.optim.Adagrad(
            model, lr=0.1, **at(place, wire=wire, worker=f"w{index}", consistency=farstep.Sync(workers=2))
        )
        for index, (model, wire) in enumerate(zip(models, wires, strict=True))
    ]
    with ThreadPoolExecutor(2) as threads:
        first, second = like([q], 1)[0], like([q], 2)[0]
        models[0][0].grad, models[1][0].grad = first.clone(), second.clone()
        q.grad = (row.after(first.reshape(-1)).view(q.shape) + second) / 2
        list(threads.map(lambda worker: worker.step(), workers))
        theirs.step()
    for model, worker in zip(models, workers, strict=True):
        check_parameters(model, [q])
        worker.close()


@every_codec
def test_what_is_not_finite_is_refused_by_the_server(url: str, row: Row) -> None:
    """With the name of the codec that it came in; the next step is right, whatever had been left out of this one."""
    both = Trained(url, row, drawn(0, SHAPES))
    for seed in range(1, 3):
        both.step(like(both.here, seed))
    gradients = like(both.here, 3)
    gradients[0][4, 3] = float("nan")
    both.set(gradients)
    with pytest.raises(NonFinite, match=f"holds NaN or Inf, as it came in {row.codec.name}"):
        both.ours.step()
    for seed in range(4, 7):
        both.step(like(both.here, seed))
    both.check()
    both.close()


@every_codec
def test_a_lost_answer_is_repeated_with_the_same_bytes(row: Row, network: Network) -> None:
    """Applied once, and what was left out of it is added once."""
    both = Trained(network.url, row, drawn(0, SHAPES))
    both.step(like(both.here, 1))
    network.cut_response(after=100)
    both.step(like(both.here, 2))
    report = both.ours.last_step
    assert report is not None
    assert report.duplicate
    network.cut_request(after=300)
    both.step(like(both.here, 3))
    both.step(like(both.here, 4))
    both.check()
    both.close()


GIVEN_UP = [(row, SHAPES) for row in (ROWS[0], TOYS[0], FEEDBACK)] + [(FEEDBACK, LARGE)]


@pytest.mark.parametrize(("row", "shapes"), GIVEN_UP, ids=["bfloat16", "blocks8", "feedback", "large"])
@pytest.mark.parametrize("applied", [True, False], ids=["applied", "dropped"])
@pytest.mark.parametrize("again", [True, False], ids=["same", "another"])
def test_a_step_that_was_given_up(
    row: Row, network: Network, shapes: list[tuple[int, ...]], applied: bool, again: bool
) -> None:
    """The same gradients again are the same push; before another one the server says what counts, residuals too."""
    both = Trained(network.url, row, drawn(0, shapes), timeout_s=1.0)
    both.step(like(both.here, 1))
    first = like(both.here, 2)
    both.set(first)
    if applied:
        network.cut_response(after=40, then_down=True)
    else:
        network.down = True
    with pytest.raises(Unavailable):
        both.ours.step()
    network.down = False
    if again:
        both.step(first)
    else:
        if applied:
            both.follow(first)
        both.step(like(both.here, 3))
    report = both.ours.last_step
    assert report is not None
    assert report.duplicate == (applied and again)
    if not again:
        assert report.earlier in (("applied",) if applied else ("dropped", None))  # None: never all there to be sent
    both.step(like(both.here, 4))
    both.check()
    both.close()


@pytest.mark.parametrize("row", [ROWS[0], FEEDBACK], ids=["bfloat16", "feedback"])
def test_an_unanswered_step_before_an_edit(row: Row, network: Network) -> None:
    """The edit is written first, so it is what learns that the step was applied."""
    both = Trained(network.url, row, drawn(0, SHAPES), timeout_s=1.0, wire=Wire(gradients=row.codec.option))
    both.step(like(both.here, 1))
    first = like(both.here, 2)
    both.set(first)
    network.cut_response(after=40, then_down=True)
    with pytest.raises(Unavailable):
        both.ours.step()
    network.down = False
    both.follow(first)
    (edited,) = drawn(5, [SHAPES[0]])
    both.here[0].data.copy_(edited)
    both.there[0].data.copy_(edited)
    both.step(like(both.here, 3))
    both.step(like(both.here, 4))
    both.check()
    both.close()


@every_codec
def test_rounds_that_are_accumulated_count(url: str, row: Row) -> None:
    """A round before the last changes no parameter, and what was left out of it is still late, not lost."""
    both = Trained(url, row, drawn(0, SHAPES), accumulate=2)
    total = [torch.zeros_like(p) for p in both.there]
    for seed in range(1, 5):
        gradients = like(both.here, seed)
        both.set(gradients)
        both.ours.step()
        for index, gradient in enumerate(gradients):
            wanted = gradient + both.left[index] if row.codec.residual else gradient
            arrived = both.after(wanted)
            both.left[index] = wanted - arrived
            total[index] = arrived if seed % 2 else (total[index] + arrived) / 2
        if seed % 2 == 0:
            for q, mean in zip(both.there, total, strict=True):
                q.grad = mean.clone()
            both.theirs.step()
    both.check()
    both.close()


def test_feedback_makes_small_gradients_count(url: str) -> None:
    """What a block's scale swallows is late with feedback, and lost without."""
    reached = {}
    for row in ROWS:
        if row.codec.option in ("blocks8", "blocks8-feedback"):
            both = Trained(url, row, [torch.zeros(64)], name="SGD", wire=Wire(gradients=row.codec.option))
            gradient = torch.full((64,), 1e-3)
            gradient[0] = 1.0
            for _ in range(100):
                both.step([gradient])
            both.check()
            reached[row.codec.option] = -both.here[0][1].item()
            both.close()
    assert reached["blocks8"] == 0.0
    assert reached["blocks8-feedback"] == pytest.approx(0.1 * 100 * 1e-3, rel=0.1)


def test_a_server_that_does_not_know_a_codec_refuses_it(url: str) -> None:
    """By its name, with the names of those that it knows, and nothing has happened."""
    (p,) = parameters([torch.zeros(70)])
    optimizer = farstep.optim.SGD([p], lr=0.1, server=url, wire=Wire(gradients="blocks8"))
    link = optimizer._membership.link
    assert isinstance(link, HttpLink)
    link._buffers.wire_gradients = "blocks9"
    p.grad = torch.ones(70)
    with pytest.raises(InvalidRequest, match=r"'blocks9'; there are bfloat16\b.*\bblocks8\b"):
        optimizer.step()
    assert optimizer.version == 0
    optimizer.close()


def test_a_step_that_is_skipped_leaves_nothing(url: str) -> None:
    """The session skips a gradient with NaN: its receipt says so, and what was left out of it is forgotten."""
    both = Trained(url, FEEDBACK, drawn(0, SHAPES), nonfinite="skip")
    both.step(like(both.here, 1))
    gradients = like(both.here, 2)
    gradients[0][4, 3] = float("nan")
    both.set(gradients)
    both.ours.step()
    report = both.ours.last_step
    assert report is not None
    assert not report.applied
    for seed in range(3, 6):
        both.step(like(both.here, seed))
    both.check()
    both.close()


def test_a_worker_that_joins_anew_begins_with_nothing_left_out(url: str) -> None:
    """What it pushes from then on is no continuation of what it had pushed."""
    both = Trained(url, FEEDBACK, drawn(0, SHAPES))
    both.step(like(both.here, 1))
    assert any(left.count_nonzero() for left in both.left)
    both.ours.rejoin()
    both.left = [torch.zeros_like(left) for left in both.left]
    both.step(like(both.here, 2))
    both.check()
    both.close()
