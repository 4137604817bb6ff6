"""A copy of an optimizer, by deepcopy or by pickle, is in a private session of its own with the same state."""

from __future__ import annotations

import copy
import gc
import pickle  # noqa: TID251  # what others do with an optimizer

import pytest
import torch
from torch import nn

import farstep
from farstep.conversation import Conversation
from farstep.errors import FarstepError, Unauthorized, UnknownSession
from farstep.optim import Adagrad, RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.support.client.copies import WAYS, Copy, pickled
from tests.support.client.options import NAMES, three_groups
from tests.support.client.twins import Twins, check_parameters, check_states, drawn, gradients_of, parameters
from tests.support.service.servers import TOKEN, RunningServer, running_server


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Take one step with drawn gradients."""
    ps = parameters_of(optimizer)
    for p, g in zip(ps, gradients_of(type(optimizer).__name__, seed, ps), strict=True):
        p.grad = g
    optimizer.step()


@WAYS
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_continues_by_itself(name: str, copied: Copy, place: RemoteOptions) -> None:
    """Copy and original have the same state and go their own ways; neither sees the other's steps."""
    twins = Twins(name, {}, place, grouping=three_groups)
    twins.train(2)
    ours, theirs = copied(twins.ours), copy.deepcopy(twins.theirs)
    assert type(ours) is type(twins.ours)
    assert ours.session != twins.ours.session
    assert ours.version == twins.ours.version == 2
    check_states(ours.state_dict(), theirs.state_dict())
    for seed in (11, 12):
        step(ours, seed)
        step(theirs, seed)
    check_parameters(parameters_of(ours), parameters_of(theirs))
    check_states(ours.state_dict(), theirs.state_dict())
    twins.check()
    twins.train(2, first=3)
    twins.check()
    check_states(ours.state_dict(), theirs.state_dict())


@WAYS
def test_model_and_optimizer_are_copied_together(copied: Copy, place: RemoteOptions) -> None:
    """Copied in one go, the copy of the optimizer trains the copy of the model."""
    model = nn.Linear(3, 2)
    optimizer = Adagrad(model.parameters(), lr=0.5, **place)
    twin, other = copied((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    step(other, 1)
    assert parameters_of(other)[0] is twin.weight
    assert not torch.equal(twin.weight, model.weight)
    assert torch.equal(before["weight"], model.weight)


@WAYS
def test_the_same_public_attributes_and_no_hooks(copied: Copy, place: RemoteOptions) -> None:
    """A copy has the attributes of the original; hooks stay behind, as torch's do."""
    twins = Twins("Adamax", {}, place)
    calls: list[int] = []
    twins.ours.register_step_post_hook(lambda *_: calls.append(1))
    twins.train(1)
    other = copied(twins.ours)
    names = [{name for name in vars(each) if not name.startswith("_")} for each in (twins.ours, other)]
    assert names[0] == names[1]
    assert other.last_step == twins.ours.last_step
    step(other, 2)
    assert calls == [1]


def test_edits_not_yet_sent_are_in_the_copy(place: RemoteOptions) -> None:
    """What was written into state and groups since the last step is copied."""
    twins = Twins("Adamax", {}, place)
    twins.train(2)
    for each, p in ((twins.ours, twins.here[0]), (twins.theirs, twins.there[0])):
        each.state[p]["exp_avg"].mul_(3)
        each.param_groups[0]["lr"] = 0.25
    ours, theirs = copy.deepcopy(twins.ours), copy.deepcopy(twins.theirs)
    check_states(ours.state_dict(), theirs.state_dict())
    step(ours, 5)
    step(theirs, 5)
    check_parameters(parameters_of(ours), parameters_of(theirs))
    twins.train(1, first=6)
    twins.check()


def test_a_copy_waits_for_nobody_and_joins_nobody(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of a worker in a sync session is private and alone, whatever session the environment names."""
    optimizer = Adagrad(
        parameters(drawn(0)), server=server.url, session="copied", consistency=farstep.Sync(workers=2), worker="w0"
    )
    monkeypatch.setenv("FARSTEP_SESSION", "copied")
    monkeypatch.setenv("FARSTEP_WORKER", "w1")
    other = pickled(optimizer)
    step(other, 1)
    assert other.session.startswith("private-")
    assert other.last_step.contributors == (other.worker,)
    assert optimizer.version == 0


def test_the_session_of_a_copy_goes_with_the_copy(server: RunningServer, talk: Conversation) -> None:
    """Nobody holds the copy any more: its session is removed, the original's stays."""
    optimizer = Adagrad(parameters(drawn(0)), server=server.url)
    other = copy.deepcopy(optimizer)
    path = f"/v1/sessions/{other.session}"
    assert talk.control("GET", path)["initialised"]
    del other
    gc.collect()
    with pytest.raises(UnknownSession):
        talk.control("GET", path)
    step(optimizer, 1)


def test_a_token_is_not_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read from FARSTEP_TOKEN where the pickle is loaded; a deepcopy in the same process has it."""
    with running_server(token=TOKEN, loaded=True) as running:
        monkeypatch.delenv("FARSTEP_TOKEN", raising=False)
        optimizer: RemoteOptimizer = Adagrad(parameters(drawn(0)), server=running.url, token=TOKEN)
        step(copy.deepcopy(optimizer), 1)
        written = pickle.dumps(optimizer)
        assert TOKEN.encode() not in written
        with pytest.raises(Unauthorized):
            pickle.loads(written)
        monkeypatch.setenv("FARSTEP_TOKEN", TOKEN)
        step(pickle.loads(written), 1)


def test_a_closed_optimizer_is_not_copied(place: RemoteOptions) -> None:
    """Its state is gone, and the error says that it was closed."""
    optimizer = Adagrad(parameters(drawn(0)), **place)
    optimizer.close()
    with pytest.raises(FarstepError, match="was closed"):
        copy.deepcopy(optimizer)
