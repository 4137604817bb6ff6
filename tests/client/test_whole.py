"""What is particular to optimizers that look at whole tensors, and to SparseAdam: their refusals and their state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import farstep
from farstep.errors import FarstepError, InvalidOption
from farstep.settings import RemoteOptions
from tests.support.client.twins import Twins, check_parameters, check_states, drawn, ours, parameters, some_rows, theirs


def refused(call: Any) -> Exception:
    """Return what a call raises."""
    with pytest.raises(Exception, match=r".") as caught:
        call()
    return caught.value


WRONG_PARAMETERS: list[tuple[str, Any]] = [
    ("Muon", lambda: drawn(0, [(3, 4), (5,)])),
    ("Muon", lambda: drawn(0, [()])),
    ("Muon", lambda: drawn(0, [(2, 3, 4)])),
    ("SparseAdam", lambda: [*drawn(0, [(3, 4)]), *drawn(0, [(3, 4)], torch.complex64)]),
    ("SparseAdam", lambda: [torch.eye(3).to_sparse(1)]),
]


@pytest.mark.parametrize(("name", "made"), WRONG_PARAMETERS)
def test_parameters_of_a_wrong_kind_give_torchs_own_error(name: str, made: Any, place: RemoteOptions) -> None:
    """What torch's constructor does not take, ours does not either: type and words are torch's."""
    here, there = (
        refused(lambda kind=kind, own=own: kind(made(), **own))
        for kind, own in ((ours(name), place), (theirs(name), {}))
    )
    assert (type(here), str(here)) == (type(there), str(there))


def test_a_group_of_a_wrong_kind_is_not_added(place: RemoteOptions) -> None:
    """A late group that the constructor would refuse is refused in its words, and the optimizer goes on without it."""
    twins = Twins("Muon", {}, place)
    twins.train(1)
    with pytest.raises(ValueError, match=r"Muon only supports 2D parameters .* size: torch.Size\(\[5\]\)"):
        twins.ours.add_param_group({"params": parameters(drawn(0, [(5,)]))})
    twins.train(2, first=2)
    twins.check()


@pytest.mark.parametrize(
    ("name", "gradient", "dtype"),
    [
        ("Adafactor", lambda g: g, torch.complex64),
        ("Adafactor", lambda g: some_rows(g, 0), torch.float32),
        ("Adafactor", lambda g: some_rows(g, 0), torch.complex64),
        ("Muon", lambda g: g, torch.complex64),
        ("Muon", lambda g: some_rows(g, 0), torch.float32),
        ("SparseAdam", lambda g: g, torch.float32),
    ],
)
def test_gradients_of_a_wrong_kind_are_refused_in_torchs_words(
    name: str, gradient: Any, dtype: torch.dtype, place: RemoteOptions
) -> None:
    """A step that torch refuses is a RuntimeError with torch's sentence; nothing has changed, on the server either."""
    here, there = (parameters(drawn(0, [(4, 3)], dtype)) for _ in range(2))
    optimizer, reference = ours(name)(here, **place), theirs(name)(there)
    for p in (*here, *there):
        p.grad = gradient(drawn(1, [(4, 3)], dtype)[0])
    with pytest.raises(RuntimeError) as torchs:
        reference.step()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert str(error.value) == str(torchs.value)
    assert isinstance(error.value.__cause__, FarstepError)
    check_parameters(here, parameters(drawn(0, [(4, 3)], dtype)))
    assert optimizer.pull() == 0
    assert len(optimizer.state) == 0


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"ns_steps": 100}, "Number of steps must be less than 100"),
        ({"ns_coefficients": (1.0, 2.0)}, "exactly 3 values"),
    ],
)
def test_options_with_which_muon_cannot_step(edit: dict[str, Any], words: str, place: RemoteOptions) -> None:
    """What torch finds out in a step is a ValueError with its words, and the step is not taken."""
    twins = Twins("Muon", {}, place)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0].update(edit)
    twins.give(twins.drawn(1))
    for optimizer in (twins.theirs, twins.ours):
        with pytest.raises(ValueError, match=words):
            optimizer.step()
    assert twins.ours.pull() == 0


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "SparseAdam"])
def test_there_is_no_fused_kernel(name: str, place: RemoteOptions) -> None:
    """Asking for one is refused with what to use in its place."""
    with pytest.raises(InvalidOption, match=f"There is no fused kernel for {name}.*auto or reference") as error:
        ours(name)(parameters(drawn(0, [(4, 3)])), **{**place, "kernel": "fused"})
    assert error.value.field == "kernel"


def test_the_state_of_adafactor_is_small(place: RemoteOptions) -> None:
    """A matrix has one number per row and one per column; what has fewer dimensions has one per element."""
    twins = Twins("Adafactor", {}, place, start=drawn(0, [(64, 48), (7,), (3, 4, 5)]))
    twins.train(2)
    shapes = [{key: tuple(value.shape) for key, value in own.items()} for own in twins.ours.state.values()]
    assert shapes == [
        {"step": (), "row_var": (64, 1), "col_var": (1, 48)},
        {"step": (), "variance": (7,)},
        {"step": (), "row_var": (3, 4, 1), "col_var": (3, 1, 5)},
    ]
    twins.check()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("row_var", torch.ones(4, 3)),
        ("row_var", torch.ones(4)),
        ("col_var", torch.ones(4, 1)),
        ("row_var", None),
        ("variance", torch.ones(4, 3)),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(key: str, value: Tensor | None, place: RemoteOptions) -> None:
    """A factor of another shape, none at all, or one that such a parameter never has: a ValueError, and all stays."""
    twins = Twins("Adafactor", {}, place, start=drawn(0, [(4, 3), (5,)]))
    twins.train(2)
    given = twins.theirs.state_dict()
    given["state"] = {**given["state"], 0: {**given["state"][0], key: value}}
    with pytest.raises(ValueError, match=rf"loaded state dict has .*{key}"):
        twins.ours.load_state_dict(given)
    twins.train(2, first=3)
    twins.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.3},
    ],
)
def test_sgd_with_momentum_takes_sparse_gradients(
    options: dict[str, Any], dtype: torch.dtype, place: RemoteOptions
) -> None:
    """Torch keeps a sparse buffer and we a dense one, with the same numbers; torch's loads into ours."""
    start = drawn(0, [(9, 4), (5,)], dtype)
    twins = Twins("SGD", options, place, start=start)
    for seed in range(1, 11):
        matrix, vector = drawn(seed, [(9, 4), (5,)], dtype)
        twins.step(
            [some_rows(matrix, seed) if seed != 4 else some_rows(matrix[:0], 0).sparse_resize_((9, 4), 1, 1), vector]
        )
    twins.check(exact=False)
    given = twins.theirs.state_dict()
    assert given["state"][0]["momentum_buffer"].is_sparse
    twins.ours.load_state_dict(given)
    check_states(twins.ours.state_dict(), given)
    twins.step([some_rows(matrix, 11), vector])
    twins.check(exact=False)


def test_sparse_adam_counts_a_gradient_without_rows(place: RemoteOptions) -> None:
    """Its step is a Python int, and goes on with a gradient that changes nothing."""
    twins = Twins("SparseAdam", {}, place, start=drawn(0, [(6, 2)]))
    empty = torch.sparse_coo_tensor(
        torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 2), (6, 2), check_invariants=True
    )
    twins.step([empty])
    twins.check()
    twins.train(2)
    twins.step([empty])
    twins.check()
    (own,) = twins.ours.state.values()
    assert type(own["step"]) is int
    assert own["step"] == 4


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_parameters_that_are_not_contiguous(name: str, place: RemoteOptions) -> None:
    """A transposed parameter is updated in place; its sums run in another order than torch's, within rounding."""
    here, there = (parameters(drawn(0, [(12, 7)])) for _ in range(2))
    here, there = [[p.detach().T.requires_grad_() for p in ps] for ps in (here, there)]
    optimizer, reference = ours(name)(here, **place), theirs(name)(there)
    where = here[0].data_ptr()
    for seed in range(1, 6):
        here[0].grad, there[0].grad = (drawn(seed, [(7, 12)])[0] for _ in range(2))
        optimizer.step()
        reference.step()
    assert (here[0].data_ptr(), here[0].stride()) == (where, (1, 7))
    check_parameters(here, there, exact=False)
    check_states(optimizer.state_dict(), reference.state_dict(), exact=False)


def test_adafactor_skips_parameters_without_elements(place: RemoteOptions) -> None:
    """Torch divides by zero there; here such a parameter counts its steps and nothing else."""
    (p, empty) = parameters(drawn(0, [(4, 3), (0, 3)]))
    optimizer = farstep.optim.Adafactor([p, empty], **place)
    for each in (p, empty):
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert list(optimizer.state[empty]) == ["step"]
    again = farstep.optim.Adafactor([p, empty], **place)
    again.load_state_dict(optimizer.state_dict())
    check_states(again.state_dict(), optimizer.state_dict())
