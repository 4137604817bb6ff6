"""Options that say what a session does around each step, embedded and on a server, beside torch doing it by hand.

Gradients of the caller are never changed: what is clipped or summed is so in the session.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import farstep
from farstep.conversation import Conversation
from farstep.errors import InvalidOption, NonFinite, OptionsDiffer
from farstep.optim import LBFGS, SGD, Adagrad
from farstep.settings import RemoteOptions
from tests.support.client.carrying import Counting
from tests.support.client.twins import Twins, check_equal, check_parameters, check_states, drawn, parameters
from tests.support.client.workers import Reference, Worker, synced, together
from tests.support.service.servers import RunningServer

NAMES = ["Adagrad", "SGD", "Adam", "Muon"]


@pytest.mark.promise(
    "`clip_norm` and `clip_value` clip the mean of all gradients with torch's bits.",
    area="NaN, clipping and averages",
)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_clipping_by_norm_is_torchs(name: str, norm_type: float, place: RemoteOptions, one_thread: None) -> None:
    """Parameters, state and the norm that is reported have the bits of `clip_grad_norm_` before torch's own step."""
    twins = Twins(name, {"lr": 0.1}, {**place, "clip_norm": 0.7, "clip_norm_type": norm_type})
    for seed in range(1, 5):
        gradients = [gradient * (1e-3 if seed == 2 else 1) for gradient in twins.drawn(seed)]
        twins.give(gradients)
        norm = clip_grad_norm_([p for p in twins.there if p.numel()], 0.7, norm_type, foreach=False)
        twins.ours.step()
        twins.theirs.step()
        twins.check()
        assert twins.ours.last_step is not None
        assert twins.ours.last_step.grad_norm == norm.item()
        check_equal([p.grad for p in twins.here if p.grad is not None], gradients)


@pytest.mark.promise(
    "`clip_norm` and `clip_value` clip the mean of all gradients with torch's bits.",
    area="NaN, clipping and averages",
)
@pytest.mark.parametrize("name", NAMES)
def test_clipping_by_value_is_torchs(name: str, place: RemoteOptions, one_thread: None) -> None:
    """The bits are those of `clip_grad_value_`, and no norm is reported."""
    twins = Twins(name, {"lr": 0.1}, {**place, "clip_value": 0.3})
    for seed in range(1, 5):
        gradients = twins.drawn(seed)
        twins.give(gradients)
        clip_grad_value_(twins.there, 0.3, foreach=False)
        twins.ours.step()
        twins.theirs.step()
        twins.check()
        check_equal([p.grad for p in twins.here if p.grad is not None], gradients)
    assert twins.ours.last_step is not None
    assert twins.ours.last_step.grad_norm is None


@pytest.mark.parametrize("shapes", [[(300, 400), (7,)], [(3, 4)]])
def test_gradients_that_are_strided_are_clipped(shapes: list[tuple[int, ...]], place: RemoteOptions) -> None:
    """Large and small, a transposed gradient is clipped as a copy of it would be, and stays as it is."""
    twins = Twins("Adagrad", {"lr": 0.1}, {**place, "clip_norm": 0.7}, start=drawn(0, shapes))
    gradients = [each.t().contiguous().t() if each.dim() == 2 else each for each in drawn(1, shapes)]
    for p, q, gradient in zip(twins.here, twins.there, gradients, strict=True):
        p.grad, q.grad = gradient.clone(), gradient.clone().contiguous()
    clip_grad_norm_(twins.there, 0.7, foreach=False)
    twins.ours.step()
    twins.theirs.step()
    twins.check(exact=False)
    check_equal([p.grad for p in twins.here if p.grad is not None], gradients)


@pytest.mark.promise("`accumulate=k` is torch on the mean of k rounds.", area="NaN, clipping and averages")
@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_accumulated_steps_are_torchs_on_the_mean(
    name: str, rounds: int, place: RemoteOptions, one_thread: None
) -> None:
    """Calls before the last one say so, and leave parameters, version and state as they are."""
    twins = Twins(name, {"lr": 0.1}, {**place, "accumulate": rounds})
    for number in range(3):
        given = [twins.drawn(10 * number + index) for index in range(rounds)]
        for index, gradients in enumerate(given):
            twins.give(gradients)
            twins.ours.step()
            report = twins.ours.last_step
            assert report is not None
            last = index == rounds - 1
            assert (report.version, report.applied) == (number + last, last)
            assert report.reason == ("" if last else "accumulated")
            if not last:
                check_parameters(twins.here, twins.there)
        twins.give([sum(each[1:], start=each[0]) / rounds for each in zip(*given, strict=True)])
        twins.theirs.step()
        twins.check()


def test_an_accumulated_push_brings_no_parameters_back(server: RunningServer) -> None:
    """Only gradients travel, until the step is taken."""
    (p,) = parameters(drawn(0, [(10_000,)]))
    optimizer = SGD([p], lr=0.1, server=server.url, accumulate=2)
    for applied in (False, True):
        p.grad = torch.ones_like(p)
        optimizer.step()
        report = optimizer.last_step
        assert report is not None
        assert (report.bytes_sent, report.bytes_received) == (40_000, 40_000 * applied)


@pytest.mark.promise(
    'With `nonfinite="skip"` a step with NaN is left out and named, and training goes on.',
    area="NaN, clipping and averages",
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_nan_is_skipped_and_named(bad: float, place: RemoteOptions) -> None:
    """Parameters, state and counts are as before, the report names worker and tensor, and training goes on."""
    twins = Twins("Adam", {"lr": 0.1}, {**place, "nonfinite": "skip", "worker": "w7"})
    twins.train(2)
    gradients = twins.drawn(3)
    gradients[1][2] = bad
    twins.give(gradients)
    twins.ours.step()
    report = twins.ours.last_step
    assert report is not None
    assert (report.version, report.applied, report.reason) == (2, False, "nonfinite")
    assert report.detail == "The gradient of '0.1' from worker 'w7' holds NaN or Inf."
    twins.check()
    twins.train(2, first=4)
    twins.check()


def test_a_mean_of_rounds_that_overflows_is_refused(place: RemoteOptions) -> None:
    """Embedded, too, a sum of finite gradients is looked at; what was accumulated before stays."""
    (p,) = parameters(drawn(0, [(5,)]))
    options: RemoteOptions = {**place, "nonfinite": "refuse", "accumulate": 2}
    optimizer = SGD([p], lr=0.1, **options)
    p.grad = torch.full((5,), 1e38)
    optimizer.step()
    p.grad = torch.full((5,), 3e38)
    with pytest.raises(NonFinite, match="sum of the gradients"):
        optimizer.step()
    p.grad = torch.full((5,), 1e38)
    optimizer.step()
    assert optimizer.version == 1


def test_an_option_changed_in_a_round_that_waits_holds(place: RemoteOptions) -> None:
    """A scheduler that steps with every round is heard."""
    twins = Twins("SGD", {"lr": 0.1}, {**place, "accumulate": 2})
    given = [twins.drawn(1), twins.drawn(2)]
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0]["lr"] = 0.02
    for gradients in given:
        twins.give(gradients)
        twins.ours.step()
    twins.give([(one + other) / 2 for one, other in zip(*given, strict=True)])
    twins.theirs.step()
    twins.check()


@pytest.mark.promise(
    "`clip_norm` and `clip_value` clip the mean of all gradients with torch's bits.",
    area="NaN, clipping and averages",
)
def test_the_mean_of_several_workers_is_clipped(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation
) -> None:
    """Not each worker's own: with the same norm for both the steps are torch's on the clipped mean."""
    place: RemoteOptions = {**synced(shared, 2), "clip_norm": 0.5}
    workers = [Worker(place, "w0"), Worker(place, "w1")]
    reference = Reference()
    for number in range(3):
        gradients = [drawn(10 * number + index) for index in range(2)]
        together(threads, talk, [(worker, own) for worker, own in zip(workers, gradients, strict=True)])
        mean = [(one + other) / 2 for one, other in zip(*gradients, strict=True)]
        norm = clipped(mean, 0.5)
        reference.step(mean)
        for worker in workers:
            check_parameters(worker.parameters, reference.parameters)
            assert worker.optimizer.last_step is not None
            assert worker.optimizer.last_step.grad_norm == pytest.approx(norm, rel=1e-6)


def clipped(gradients: Sequence[Tensor], clip_norm: float) -> float:
    """Clip gradients where they are, and return their norm."""
    own = [torch.zeros_like(gradient).requires_grad_() for gradient in gradients if gradient.numel()]
    for p, gradient in zip(own, [gradient for gradient in gradients if gradient.numel()], strict=True):
        p.grad = gradient
    return clip_grad_norm_(own, clip_norm, foreach=False).item()


def test_workers_with_other_policies_are_refused(shared: RemoteOptions) -> None:
    """The difference is named, whichever option it is in."""
    options: RemoteOptions = {**shared, "clip_norm": 1.0}
    Worker(options, "w0")
    cases: list[tuple[str, RemoteOptions]] = [
        ("clip_norm is 1.0, not 2.0", {"clip_norm": 2.0}),
        ("clip_norm_type is 2.0, not inf", {"clip_norm_type": math.inf}),
        ("clip_value is None, not 1.0", {"clip_value": 1.0}),
        ("accumulate is 1, not 2", {"accumulate": 2}),
        ("ema is None, not 0.5", {"ema": 0.5}),
        ("nonfinite is 'refuse', not 'skip'", {"nonfinite": "skip"}),
    ]
    for said, other in cases:
        with pytest.raises(OptionsDiffer, match=said):
            Worker({**options, **other}, "w1")


@pytest.mark.parametrize(
    ("field", "value"), [("clip_norm", 0.0), ("clip_value", -1.0), ("accumulate", 0), ("ema", 1.5), ("ema", "much")]
)
def test_a_bad_value_is_refused_before_anything_is_sent(field: str, value: Any, server: RunningServer) -> None:
    """The error names the option and what it must be; no request is made."""
    transport = Counting()
    options: dict[str, Any] = {"server": server.url, "transport": transport, field: value}

    def make() -> None:
        with pytest.raises(InvalidOption, match=f"Invalid {field}: .*Must be") as refused:
            Adagrad(parameters(drawn(0)), **options)
        assert (refused.value.field, refused.value.side) == (field, "client")

    assert transport.during(make) == 0


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"clip_norm": 1.0}, {"ema": 0.9}, {"nonfinite": "skip"}])
def test_lbfgs_has_no_policy(options: dict[str, Any], place: RemoteOptions) -> None:
    """Its step is a search along gradients as they are; whoever asks for more is told where to do it."""
    with pytest.raises(InvalidOption, match="does not go with LBFGS"):
        LBFGS(parameters(drawn(0, [(5,)])), **{**place, **options})


def test_a_copy_keeps_the_policy(place: RemoteOptions) -> None:
    """In its session of its own steps are clipped and accumulated as in the original's; what waits stays behind."""
    (p,) = parameters(drawn(0, [(5,)]))
    options: RemoteOptions = {**place, "clip_norm": 1.0, "accumulate": 2, "ema": 0.5}
    optimizer = SGD([p], lr=0.1, **options)
    p.grad = torch.ones(5)
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    assert copied._membership.settings.policies == optimizer._membership.settings.policies
    (q,) = copied.param_groups[0]["params"]
    for applied in (False, True):
        q.grad = torch.ones(5)
        copied.step()
        assert copied.last_step is not None
        assert copied.last_step.applied == applied
    assert copied.last_step is not None
    assert copied.last_step.grad_norm == pytest.approx(math.sqrt(5))


def test_a_session_says_what_its_policy_is(shared: RemoteOptions, talk: Conversation) -> None:
    """Its page has the options that are not the default, and infinity as a string, since JSON has none."""
    options: RemoteOptions = {**shared, "clip_norm": 1.0, "clip_norm_type": math.inf, "nonfinite": "skip"}
    worker = Worker(options, "w0")
    page = talk.control("GET", f"/v1/sessions/{worker.optimizer.session}")
    assert page["policy"] == {"clip_norm": 1.0, "clip_norm_type": "inf"}
    assert page["nonfinite"] == "skip"


def test_without_a_policy_a_step_is_as_it_was(place: RemoteOptions) -> None:
    """The state_dict has nothing of it, and the report neither reason nor norm."""
    twins = Twins("Adam", {"lr": 0.1}, place)
    twins.train(2)
    assert twins.ours.last_step is not None
    report: farstep.StepReport = twins.ours.last_step
    assert (report.reason, report.detail, report.grad_norm) == ("", "", None)
    check_states(twins.ours.state_dict(), twins.theirs.state_dict())


@pytest.mark.parametrize("policy", [{"clip_norm": 0.5}, {"clip_value": 0.3}, {"accumulate": 2}, {"ema": 0.9}])
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_gradients_in_16_bits_are_widened_before_anything_is_done_to_them(
    half: Any, policy: dict[str, Any], server: RunningServer
) -> None:
    """The steps have the bits of those of a worker that sends the same numbers in float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[half]
    shapes = [(300, 40), (7,), ()]
    here, there = parameters(drawn(0, shapes)), parameters(drawn(0, shapes))
    options: dict[str, Any] = {"server": server.url, "kernel": "reference", **policy}
    narrow = Adagrad(here, lr=0.1, **{**options, "wire": farstep.Wire(gradients=half)})
    wide = Adagrad(there, lr=0.1, **options)
    for seed in range(1, 5):
        for p, q, gradient in zip(here, there, drawn(seed, shapes), strict=True):
            p.grad, q.grad = gradient.clone(), gradient.to(dtype).float()
        narrow.step()
        wide.step()
        check_parameters(here, there)
    assert narrow.version == wide.version > 0
