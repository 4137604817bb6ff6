"""Gradients that are clipped in the session, after their reduction: torch's functions on the mean are the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from farstep.errors import InvalidOption, NonFinite
from tests.session.writers import Twin, begun, equal, error, new_session, parameters, receipt, sync, values

NAMES = ("w0", "w1")
REAL = ("w", "b")


class Clipped(Twin):
    """torch's optimizer, its gradients clipped by torch.

    Attributes:
        norm: what `clip_grad_norm_` returned last.
    """

    norm = 0.0

    def step_clipped(self, gradients: Sequence[Tensor], clip_norm: float, norm_type: float = 2.0) -> list[Tensor]:
        own = [gradient.clone() for gradient in gradients]
        for parameter, gradient in zip(self.parameters, own, strict=True):
            parameter.grad = gradient
        self.norm = clip_grad_norm_(self.parameters, clip_norm, norm_type, foreach=False).item()
        return self.step(own)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 0.5, math.inf])
@pytest.mark.parametrize("clip_norm", [0.5, 100.0])
def test_the_mean_of_the_workers_gradients_is_clipped_by_its_norm(norm_type: float, clip_norm: float) -> None:
    """Parameters and the norm in every receipt are torch's bits for the mean, whether or not the norm is reached."""
    session = new_session(names=REAL, consistency=sync(2), clip_norm=clip_norm, clip_norm_type=norm_type)
    writers = begun(session, *NAMES)
    twin = Clipped(parameters(session))
    for seed in range(0, 8, 2):
        given = [values(session, seed + index) for index in range(2)]
        names = [writer.named() for writer in writers]
        writers[0].push(given[0])
        outcomes = writers[1].push(given[1])
        writers[0].last += 1
        mean = [(one + other) / 2 for one, other in zip(*given, strict=True)]
        assert equal(parameters(session), twin.step_clipped(mean, clip_norm, norm_type))
        assert [receipt(outcomes, name).grad_norm for name in names] == [twin.norm] * 2


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=17, max_size=17),
    st.floats(1e-3, 1e4),
    st.sampled_from([1.0, 1.5, 2.0, math.inf]),
)
def test_any_gradient_is_clipped_as_torch_clips_it(numbers: list[float], clip_norm: float, norm_type: float) -> None:
    """Zeros, single large elements and everything between: the bits are torch's."""
    session = new_session(names=REAL, clip_norm=clip_norm, clip_norm_type=norm_type)
    (writer,) = begun(session)
    twin = Clipped(parameters(session))
    gradients = [torch.tensor(numbers[:12]).view(3, 4), torch.tensor(numbers[12:])]
    name = writer.named()
    given = receipt(writer.push(gradients), name)
    assert equal(parameters(session), twin.step_clipped(gradients, clip_norm, norm_type))
    assert given.grad_norm == twin.norm


def test_several_dtypes_have_one_norm() -> None:
    """Over float32, float64 and complex gradients the norm is that of all of them, up to rounding."""
    session = new_session(clip_norm=0.5)
    (writer,) = begun(session)
    twin = Clipped(parameters(session))
    name = writer.named()
    given = receipt(writer.push(values(session, 1)), name)
    torch.testing.assert_close(parameters(session), twin.step_clipped(values(session, 1), 0.5))
    assert given.grad_norm == pytest.approx(twin.norm, rel=1e-6)


def test_an_infinite_bound_measures_only() -> None:
    """Nothing is clipped, and the receipt has the norm."""
    session = new_session(names=REAL, clip_norm="inf")
    (writer,) = begun(session)
    twin = Clipped(parameters(session))
    name = writer.named()
    given = receipt(writer.push(values(session, 1)), name)
    assert equal(parameters(session), twin.step_clipped(values(session, 1), math.inf))
    assert given.grad_norm == twin.norm > 0


def test_a_gradient_that_is_missing_has_no_part_in_the_norm() -> None:
    """As in torch, where a parameter without a gradient is passed over; a step without any gradient has the norm 0."""
    session = new_session(names=REAL, clip_norm=0.5)
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    gradients = values(session, 1)
    name = writer.named()
    given = receipt(writer.push([gradients[0], None]), name)
    expected = torch.linalg.vector_norm(gradients[0])
    assert given.grad_norm == expected.item()
    clipped = gradients[0] * (0.5 / (expected + 1e-6))
    assert equal(parameters(session), twin.step([clipped, None]))
    name = writer.named()
    assert receipt(writer.push([None, None]), name).grad_norm == 0.0


def test_sparse_gradients_are_clipped_with_their_duplicates_added_up() -> None:
    """The norm is that of the dense gradient they stand for, which torch's function does not take."""
    session = new_session(names=REAL, clip_norm=0.5)
    (writer,) = begun(session)
    twin = Clipped(parameters(session))
    rows = torch.sparse_coo_tensor(
        torch.tensor([[0, 2, 0]]), torch.arange(12.0).view(3, 4), (3, 4), check_invariants=True
    )
    bias = values(session, 1)[1]
    name = writer.named()
    given = receipt(writer.push([rows, bias]), name)
    torch.testing.assert_close(parameters(session), twin.step_clipped([rows.to_dense(), bias], 0.5))
    assert given.grad_norm == pytest.approx(twin.norm)


def parameters_with(gradients: Sequence[Tensor]) -> list[Tensor]:
    made = [torch.zeros_like(gradient).requires_grad_() for gradient in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = gradient.clone()
    return made


@pytest.mark.parametrize("both", [False, True])
def test_elements_are_clipped_by_value_and_then_by_norm(both: bool) -> None:
    """The mean's elements are bounded as torch does it; with both bounds the norm is that of what is left."""
    policy: dict[str, Any] = {"clip_value": 0.3, **({"clip_norm": 0.4} if both else {})}
    session = new_session(names=REAL, **policy)
    (writer,) = begun(session)
    twin = Clipped(parameters(session))
    own = parameters_with(values(session, 1))
    clip_grad_value_(own, 0.3, foreach=False)
    left = [p.grad for p in own if p.grad is not None]
    name = writer.named()
    given = receipt(writer.push(values(session, 1)), name)
    assert equal(parameters(session), twin.step_clipped(left, 0.4) if both else twin.step(left))
    assert given.grad_norm == (twin.norm if both else None)


def test_an_overflow_is_found_before_it_is_clipped_away() -> None:
    """A sum that is infinite is refused, although a bound for values would make it finite."""
    session = new_session(names=REAL, consistency=sync(2), clip_value=1.0)
    first, second = begun(session, *NAMES)
    before = parameters(session)
    huge = [torch.full((3, 4), 3e38), torch.zeros(5)]
    first.push(huge)
    outcomes = second.push(huge)
    assert all(isinstance(error(outcome), NonFinite) for outcome in outcomes.values())
    assert equal(parameters(session), before)


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ({"clip_norm": 0}, "clip_norm"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"clip_norm": float("nan")}, "clip_norm"),
        ({"clip_norm": "much"}, "clip_norm"),
        ({"clip_norm": True}, "clip_norm"),
        ({"clip_norm": 1.0, "clip_norm_type": 0.0}, "clip_norm_type"),
        ({"clip_norm": 1.0, "clip_norm_type": None}, "clip_norm_type"),
        ({"clip_norm_type": 1.0}, "clip_norm_type"),
        ({"clip_value": 0.0}, "clip_value"),
        ({"clip_value": 1.0, "names": ("w", "z")}, "clip_value"),
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": 2.0}, "accumulate"),
        ({"accumulate": True}, "accumulate"),
        ({"ema": 0.0}, "ema"),
        ({"ema": 1.0}, "ema"),
        ({"ema": "0.9"}, "ema"),
        ({"clip": 1.0}, "policy"),
        ({"accumulate": 2, "optimizer": "LBFGS", "names": ("w",)}, "accumulate"),
        ({"clip_norm": 1.0, "optimizer": "LBFGS", "names": ("w",)}, "clip_norm"),
        ({"ema": 0.9, "optimizer": "LBFGS", "names": ("w",)}, "ema"),
        ({"nonfinite": "skip", "optimizer": "LBFGS", "names": ("w",)}, "nonfinite"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_by_name(policy: dict[str, Any], field: str) -> None:
    """The error names the option, and there is no session."""
    with pytest.raises(InvalidOption) as refused:
        new_session(**{"names": REAL, **policy})
    assert refused.value.field == field


def test_a_complex_parameter_cannot_be_added_where_values_are_clipped() -> None:
    """The session stays as it was, and says why."""
    session = new_session(names=REAL, clip_value=1.0)
    (writer,) = begun(session)
    with pytest.raises(InvalidOption, match="complex"):
        writer.append({"late": torch.zeros(2, dtype=torch.complex64)})
    assert len(session.plan.groups) == 1
