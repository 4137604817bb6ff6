"""`add_param_group` after the session was opened: torch's numbers, other workers, and networks that lose answers."""

from __future__ import annotations

import itertools
import pickle  # noqa: TID251  # what others do with an optimizer
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import farstep
from farstep import Sync
from farstep.conversation import Conversation
from farstep.errors import FarstepError, Fenced, InvalidOption, OptionsDiffer, SessionLost, Unavailable
from farstep.optim import Adagrad, RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.client.options import NAMES
from tests.client.twins import Twins, check_equal, check_parameters, drawn, parameters, start_of
from tests.faults import Network
from tests.service.servers import RunningServer, running_server

LATE: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.1}
FRESH = itertools.count()
SHORT_S = 1.0
"""Long enough for a busy machine to answer, short enough to wait for."""


@pytest.fixture(params=["embedded", "private", "named"])
def anywhere(request: pytest.FixtureRequest) -> RemoteOptions:
    """Name a place: in this process, in a private session on a server, or in one that others may join."""
    if request.param == "embedded":
        return {"kernel": "reference"}
    running: RunningServer = request.getfixturevalue("server")
    private: RemoteOptions = {"kernel": "reference", "server": running.url}
    return private if request.param == "private" else named(running)


def named(server: RunningServer) -> RemoteOptions:
    return {"kernel": "reference", "server": server.url, "session": f"groups-{next(FRESH)}"}


def add(twins: Twins, tensors: list[Tensor], **options: Any) -> None:
    """Add a group to both."""
    for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        late = parameters(tensors)
        each.add_param_group({"params": late, **options})
        ps += late


class Member:
    """A worker of a shared session, with a model of its own."""

    def __init__(self, place: RemoteOptions, name: str) -> None:
        self.parameters = parameters(drawn(0))
        self.late = parameters(drawn(7 if name == "w0" else 8))
        own: RemoteOptions = {**place, "worker": name}
        self.optimizer: RemoteOptimizer = Adagrad(self.parameters, lr=0.1, foreach=False, **own)

    def add(self, **options: Any) -> None:
        self.optimizer.add_param_group({"params": self.late, **(options or LATE)})
        self.parameters = [*self.parameters, *self.late]

    def step(self, seed: int) -> None:
        for p, gradient in zip(self.parameters, drawn(seed, [p.shape for p in self.parameters]), strict=True):
            p.grad = gradient
        self.optimizer.step()


def members(place: RemoteOptions, *names: str) -> list[Member]:
    return [Member(place, name) for name in names]


class Oracle:
    """torch's Adagrad, which takes the steps that all workers take together."""

    def __init__(self) -> None:
        self.parameters = parameters(drawn(0))
        self.optimizer = torch.optim.Adagrad(self.parameters, lr=0.1, foreach=False)

    def add(self) -> None:
        late = parameters(drawn(7))
        self.optimizer.add_param_group({"params": late, **LATE})
        self.parameters += late

    def step(self, seed: int) -> None:
        for p, gradient in zip(self.parameters, drawn(seed, [p.shape for p in self.parameters]), strict=True):
            p.grad = gradient
        self.optimizer.step()


# -- as in torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_added_at_any_time(name: str, steps: int, anywhere: RemoteOptions) -> None:
    """Before or after steps, with options of its own; state, edits of it, hooks and the session stay."""
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.1}
    edited = "momentum_buffer" if name in ("SGD", "Muon") else "step"
    twins = Twins(name, options, anywhere, start=start_of(name)[:4])
    calls: list[int] = []
    twins.ours.register_step_post_hook(lambda *_: calls.append(1))
    twins.train(steps)
    session = twins.ours.session
    for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        each.param_groups[0]["lr"] = 0.2
        for p in ps if steps else ():
            each.state[p][edited] += 1
    add(twins, start_of(name)[4:], **LATE, note="late")
    assert (twins.ours.version, twins.ours.session) == (steps + 1, session)
    if name != "Adagrad":  # whose late parameters have state at once; torch's get it with their first step
        twins.check()
    twins.train(2, first=3)
    twins.check()
    assert len(calls) == steps + 2


@pytest.mark.parametrize("name", ["Adagrad", "SGD", "Adam"])
def test_several_groups_with_names_and_options(name: str, anywhere: RemoteOptions) -> None:
    """Group after group, each with options and parameter names of its own, steps in between."""
    start = drawn(0)[:2]
    twins = Twins(
        name, {"lr": 0.1}, anywhere, start=start, grouping=lambda ps: [{"params": [*zip("ab", ps, strict=True)]}]
    )
    options: list[dict[str, Any]] = [{"lr": 0.2}, {"weight_decay": 0.3, "maximize": True}, {}]
    for number, own in enumerate(options):
        twins.train(2, first=10 * number)
        for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
            late = parameters(drawn(number, [(3, number + 2), ()]))
            each.add_param_group({"params": [(f"late{number}.{i}", p) for i, p in enumerate(late)], **own})
            ps += late
    twins.train(2, first=40)
    twins.ours.param_groups[1]["lr"] = twins.theirs.param_groups[1]["lr"] = 0.05
    twins.train(2, first=50)
    twins.check()


def test_dtypes_and_missing_gradients(anywhere: RemoteOptions) -> None:
    """Late parameters of other dtypes, complex among them, some without a gradient at first; a group without any."""
    start = drawn(0, [(3,), (2, 2)])
    twins = Twins("Adadelta", {"lr": 0.1}, anywhere, start=start)
    twins.train(1)
    late = [drawn(3, [(5,)], dtype)[0] for dtype in (torch.complex64, torch.float64, torch.complex128)]
    add(twins, late, lr=0.5)
    add(twins, [])
    add(twins, drawn(4, [(3,)]))
    for seed in range(2, 6):
        gradients: list[Tensor | None] = [drawn(seed, [p.shape], p.dtype)[0] for p in twins.here]
        if seed < 4:
            gradients[seed] = gradients[5] = None
        twins.step(gradients)
    twins.check()


def test_what_was_read_and_edited_stays(anywhere: RemoteOptions) -> None:
    """State that was read is not read again; edits of state and parameters made before are sent with the next step."""
    twins = Twins("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5}, anywhere)
    twins.train(1)
    read = twins.ours.state[twins.here[0]]["sum"]
    with torch.no_grad():
        for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
            each.state[ps[1]]["sum"].mul_(2)
            each.state[ps[1]]["mine"] = "kept"
            ps[2].add_(1)
    add(twins, drawn(6)[:2], **LATE, initial_accumulator_value=9.0)
    assert twins.ours.state[twins.here[0]]["sum"] is read
    assert twins.ours.state[twins.here[1]]["mine"] == "kept"
    late = twins.here[-1]
    check_equal([twins.ours.state[late]["sum"]], [torch.full_like(late, 0.5)])  # the constructor's, as in torch
    twins.train(2, first=2)
    check_parameters(twins.here, twins.there)


def test_copies_of_an_optimizer_that_grew(anywhere: RemoteOptions) -> None:
    """Deep copies, pickles, a move back to torch, and saved state have the late group like any other."""
    twins = Twins("Adam", {"lr": 0.1}, anywhere, start=drawn(0)[:2])
    twins.train(1)
    add(twins, drawn(5)[2:], **LATE)
    twins.train(1, first=2)
    state = deepcopy(twins.ours.state_dict())
    copies = [deepcopy(twins.ours), pickle.loads(pickle.dumps(twins.ours)), twins.ours.to_local()]
    twins.train(1, first=3)
    for copied in copies[:2]:
        for p, q in zip((p for group in copied.param_groups for p in group["params"]), twins.here, strict=True):
            p.grad = q.grad
        copied.step()
        check_parameters([p for group in copied.param_groups for p in group["params"]], twins.there)
    twins.ours.load_state_dict(state)
    twins.theirs.load_state_dict(state)
    twins.train(1, first=4)
    twins.check()


def test_a_group_that_is_refused_changes_nothing(anywhere: RemoteOptions) -> None:
    """A parameter that is in a group already, options and dtypes that cannot be: an error, and training goes on."""
    twins = Twins("Adagrad", {"lr": 0.1}, anywhere)
    twins.train(1)
    (fresh,) = parameters(drawn(1, [(3,)]))
    strange = torch.ones(3).to(torch.float8_e5m2).requires_grad_()
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        twins.ours.add_param_group({"params": [twins.here[0]]})
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        twins.ours.add_param_group({"params": [fresh], "lr": -1})
    with pytest.raises(FarstepError, match="float8"):
        twins.ours.add_param_group({"params": [strange]})
    with pytest.raises(FarstepError, match="finite"):
        twins.ours.add_param_group({"params": [fresh], "eps": float("inf")})
    assert len(twins.ours.param_groups) == 1
    assert twins.ours.version == 1
    twins.train(2, first=2)
    add(twins, drawn(1, [(3,)]), **LATE)
    twins.train(1, first=4)
    twins.check()


def test_names_are_unique(anywhere: RemoteOptions) -> None:
    """A late parameter of a name that is taken is refused, naming it."""
    first, late = parameters(drawn(0))[:2], parameters(drawn(1))[:1]
    optimizer = Adagrad([("a", first[0]), ("b", first[1])], **anywhere)
    with pytest.raises(FarstepError, match="Two parameters are called 'b'"):
        optimizer.add_param_group({"params": [("b", late[0])]})
    optimizer.add_param_group({"params": [("c", late[0])]})
    optimizer.step()


def test_an_embedded_session_stays_on_one_device() -> None:
    """A late parameter on another device is refused, as in the constructor."""
    optimizer = Adagrad(parameters(drawn(0)))
    with pytest.raises(InvalidOption, match="cpu and meta"):
        optimizer.add_param_group({"params": [torch.ones(3, device="meta", requires_grad=True)]})
    optimizer.step()
    assert len(optimizer.param_groups) == 1


# -- other workers ---------------------------------------------------------------------------------------------------


def test_two_workers_add_the_same_group(server: RunningServer) -> None:
    """The second one is told to, takes the session's parameters, and both go on as one torch optimizer would."""
    w0, w1 = members(named(server), "w0", "w1")
    oracle = Oracle()
    w0.step(1)
    w1.step(2)
    w0.add()
    w0.step(3)
    with torch.no_grad():
        w1.parameters[0].add_(1)
    with pytest.raises(Fenced, match=r"Worker 'w0' added param group 1.*Add the same group with add_param_group"):
        w1.step(4)
    w1.add()
    oracle.step(1)
    oracle.step(2)
    oracle.add()
    oracle.step(3)
    check_parameters(w1.parameters, oracle.parameters)
    assert w1.optimizer.version == 4
    w1.step(4)
    oracle.step(4)
    check_parameters(w1.parameters, oracle.parameters)
    for p, q in zip(w1.parameters, oracle.parameters, strict=True):
        check_equal([w1.optimizer.state[p]["sum"]], [oracle.optimizer.state[q]["sum"]])
    w0.optimizer.pull()
    check_parameters(w0.parameters, oracle.parameters)


def test_a_worker_that_adds_a_group_keeps_its_version(server: RunningServer) -> None:
    """Where others have stepped since, adding a group does not claim that their steps are here."""
    w0, w1 = members(named(server), "w0", "w1")
    w1.step(1)
    w0.add()
    assert w0.optimizer.version == 0
    w0.step(2)
    report = w0.optimizer.last_step
    assert report is not None
    assert (report.version, report.staleness) == (3, 2)


def test_workers_learn_groups_in_turn(server: RunningServer) -> None:
    """Groups that two workers added are learned by a third one after the other."""
    w0, w1, w2 = members(named(server), "w0", "w1", "w2")
    more = [parameters(drawn(9, [(4,)])) for _ in range(3)]
    w0.add()
    w1.add()
    w1.optimizer.add_param_group({"params": more[1], "lr": 0.7})
    w2.add()
    with pytest.raises(Fenced, match="Worker 'w1' added param group 2"):
        w2.step(1)
    with pytest.raises(Fenced, match="param group 2"):
        w2.optimizer.pull()
    for member, late in ((w2, more[2]), (w0, more[0])):
        member.optimizer.add_param_group({"params": late, "lr": 0.7})
        member.parameters = [*member.parameters, *late]
    for seed, member in enumerate((w2, w0)):
        member.step(seed)
    w2.optimizer.pull()
    check_parameters(w0.parameters, w2.parameters)


@pytest.mark.parametrize("different", ["options", "shapes", "count"])
def test_another_group_is_refused(server: RunningServer, different: str) -> None:
    """A group that differs from the session's: what differs in words, nothing changed, and a second try works."""
    w0, w1 = members(named(server), "w0", "w1")
    w0.add()
    late = {"options": w1.late, "shapes": parameters(drawn(1, [(9,)] * 6)), "count": w1.late[:-1]}[different]
    options = {"lr": 0.5} if different == "options" else LATE
    with pytest.raises(OptionsDiffer, match="has a param group 1, but"):
        w1.optimizer.add_param_group({"params": late, **options})
    assert len(w1.optimizer.param_groups) == 1
    w1.add()
    w1.step(1)
    w0.optimizer.pull()
    check_parameters(w0.parameters, w1.parameters)


def test_nothing_of_a_worker_that_lags_is_silent(server: RunningServer) -> None:
    """Pulling, saving and reading state, editing and joining again all say that the session has grown."""
    w0, w1 = members(named(server), "w0", "w1")
    w1.step(1)
    w0.add()
    for look in (w1.optimizer.pull, w1.optimizer.state_dict, lambda: len(w1.optimizer.state)):
        with pytest.raises(Fenced, match="added param group 1"):
            look()
    with pytest.raises(OptionsDiffer, match="it has 12 parameters, not 6"):
        w1.optimizer.rejoin()
    w1.add()
    assert len(w1.optimizer.state_dict()["state"]) == 12


def test_joining_later_with_all_groups(server: RunningServer) -> None:
    """A worker that gives all groups to the constructor joins a session that grew."""
    place = named(server)
    (w0,) = members(place, "w0")
    w0.add()
    w0.step(1)
    here = parameters(drawn(3, [p.shape for p in w0.parameters]))
    Adagrad([{"params": here[:6]}, {"params": here[6:], **LATE}], lr=0.1, foreach=False, **place)
    check_parameters(here, w0.parameters)


def test_a_worker_at_the_barrier_is_told(server: RunningServer, talk: Conversation) -> None:
    """In a sync session the one who waits learns that the session grew, adds the group, and both step together."""
    place: RemoteOptions = {**named(server), "consistency": Sync(workers=2)}
    w0, w1 = members(place, "w0", "w1")
    before = [p.detach().clone() for p in w1.parameters]
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(w1.step, 1)
        while not talk.control("GET", f"/v1/sessions/{w1.optimizer.session}/workers/w1")["waiting"]:
            pass
        w0.add()
        with pytest.raises(Fenced, match="Worker 'w0' added param group 1"):
            waiting.result()
        check_parameters(w1.parameters, before)
        w1.add()
        for step in (threads.submit(w0.step, 1), threads.submit(w1.step, 1)):
            step.result()
    oracle = Oracle()
    oracle.add()
    oracle.step(1)
    for member in (w0, w1):
        check_parameters(member.parameters, oracle.parameters)
        assert member.optimizer.version == 2


# -- networks and servers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["request", "response"])
def test_a_group_is_added_once_wherever_it_is_cut(network: Network, way: str) -> None:
    """A request or an answer that is cut after any number of bytes is tried again; the group is there once."""
    cut = network.cut_request if way == "request" else network.cut_response
    for after in range(0, 700, 100):
        twins = Twins("Adagrad", {"lr": 0.1}, {"kernel": "reference", "server": network.url}, start=drawn(0, [(3,)]))
        twins.train(1)
        cut(after=after)
        add(twins, drawn(1, [(40,)]), **LATE)
        twins.train(1, first=2)
        assert twins.ours.version == 3
        twins.check()


@pytest.mark.parametrize("applied", [True, False])
def test_adding_again_after_it_was_given_up(network: Network, applied: bool) -> None:
    """The same call repeats the write under its name, whether the server had applied it or not."""
    twins = given_up(network, applied=applied)
    add(twins, drawn(1, [(40,)]), **LATE)
    twins.train(2, first=2)
    assert twins.ours.version == 4
    twins.check()


def given_up(network: Network, *, applied: bool) -> Twins:
    """Return twins of which ours has tried to add a group without an answer."""
    place: RemoteOptions = {"kernel": "reference", "server": network.url, "timeout_s": SHORT_S}
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, [(3,)]))
    twins.train(1)
    if applied:
        network.cut_response(after=0, then_down=True)
    else:
        network.down = True
    with pytest.raises(Unavailable):
        twins.ours.add_param_group({"params": parameters(drawn(1, [(40,)])), **LATE})
    network.down = False
    assert (len(twins.ours.param_groups), twins.ours.version) == (1, 1)
    return twins


def test_going_on_without_a_group_that_never_arrived(network: Network) -> None:
    """If the group was not added, the next step is taken without it."""
    twins = given_up(network, applied=False)
    twins.train(2, first=2)
    twins.check()


def test_going_on_without_a_group_that_did_arrive(network: Network) -> None:
    """If it was added, steps and reads say so, until it is added again; then it is the session's."""
    twins = given_up(network, applied=True)
    for _ in range(2):
        with pytest.raises(Fenced, match="A call that got no answer added param group 1"):
            twins.ours.step()
        with pytest.raises(Fenced, match="param group 1"):
            twins.ours.pull()
    with pytest.raises(OptionsDiffer):
        twins.ours.add_param_group({"params": parameters(drawn(1, [(41,)])), **LATE})
    add(twins, drawn(1, [(40,)]), **LATE)
    twins.train(2, first=2)
    twins.check()


def test_a_session_that_grew_is_created_anew_whole() -> None:
    """After a server was killed, rejoin() brings all groups, the late one included, to the new session."""
    with running_server() as server:
        twins = Twins("Adam", {"lr": 0.1}, {**named(server), "worker": "w0"})
        twins.train(1)
        add(twins, drawn(5), **LATE)
        twins.train(1, first=2)
        state = twins.ours.state_dict()
        server.kill()
        server.restart()
        with pytest.raises(SessionLost):
            twins.ours.step()
        assert twins.ours.rejoin(state)
        twins.train(2, first=3)
        twins.check()


def test_a_late_group_may_go_remote_and_come_home(server: RunningServer) -> None:
    """A torch optimizer moved to a server grows there, and what comes back goes on bit for bit."""
    here, there = parameters(drawn(0)), parameters(drawn(0))
    local, theirs = (torch.optim.Adam(ps, lr=0.1, foreach=False) for ps in (here, there))
    remote = farstep.remote(local, server=server.url, kernel="reference")
    late, other = parameters(drawn(5)), parameters(drawn(5))
    remote.add_param_group({"params": late, **LATE})
    theirs.add_param_group({"params": other, **LATE})
    home: torch.optim.Optimizer | None = None
    for seed in range(3):
        for p, q, gradient in zip(here + late, there + other, drawn(seed, [p.shape for p in here + late]), strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        (home or remote).step()
        theirs.step()
        home = home or remote.to_local()
    check_parameters(here + late, there + other)
