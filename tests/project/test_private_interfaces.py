"""What farstep uses of torch and uvicorn beyond what they promise to keep: it is there, and does what farstep expects.

There is no upper bound on the versions of either. So a release that changes one of these fails here, where the message
names the modules that lean on it, before it fails in a training or in a connection. Each check is registered under the
words that the sources write for what it checks; a private name that the sources use without a check fails, too.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import logging
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

ROOT = Path(__file__).parents[2]
CHECKS: dict[str, Callable[[], None]] = {}
"""What is leaned on, by the word that the sources write for it."""
DOCUMENTED = frozenset({"_replace", "_getframe"})
"""Names with an underscore that Python's own documentation promises, of named tuples and of `sys`."""


def leans_on(*words: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a check of what farstep calls by these words."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS.update(dict.fromkeys(words, check))
        return check

    return register


# -- torch -----------------------------------------------------------------------------------------------------------


@leans_on("_disable_dynamo")
def decorates_without_arguments() -> None:
    from torch._compile import _disable_dynamo

    assert _disable_dynamo(lambda x: x + 1)(1) == 2


@leans_on("_foreach_copy_", "_foreach_lerp_", "_foreach_norm")
def foreach_operations_are_those_of_each_tensor() -> None:
    into, source = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.float64)], [torch.arange(3.0), torch.ones(2, 2)]
    torch._foreach_copy_(into, source)
    assert into[0].tolist() == [0, 1, 2]
    assert into[1].tolist() == [[1, 1], [1, 1]]
    moved, target = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 8.0])
    expected = moved.lerp(target, 0.3)
    torch._foreach_lerp_([moved], [target], 0.3)
    assert torch.equal(moved, expected)
    for order in (1.0, 2.0, 3.0):
        (norm,) = torch._foreach_norm([target], order)
        assert torch.equal(norm, torch.linalg.vector_norm(target, order))


@leans_on("is_lazy", "is_traceable_wrapper_subclass")
def kinds_of_parameters_are_told() -> None:
    from torch.nn.parameter import is_lazy
    from torch.utils import _python_dispatch

    plain = nn.Parameter(torch.zeros(1))
    assert is_lazy(nn.LazyLinear(1).weight)
    assert not is_lazy(plain)
    assert not _python_dispatch.is_traceable_wrapper_subclass(plain)


@leans_on("_nnz")
def sparse_tensors_count_their_values() -> None:
    rows = torch.sparse_coo_tensor(torch.tensor([[2, 2, 0]]), torch.ones(3, 4), (5, 4), check_invariants=True)
    assert (rows._nnz(), rows.coalesce()._nnz()) == (3, 2)


@leans_on("_version")
def changes_in_place_are_counted() -> None:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.view(1, 2).add_(1)
    assert tensor._version == before + 1


@leans_on("co_varnames")
def optimizers_have_constructors_in_python() -> None:
    for name in ("Adagrad", "SGD", "AdamW", "LBFGS", "Muon"):
        code = getattr(torch.optim, name).__init__.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        assert list(names) == list(inspect.signature(getattr(torch.optim, name).__init__).parameters)


@leans_on("profile_hook_step", "_optimizer_step_post_hooks")
def hooks_are_called_by_one_wrapper_around_each_step() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # a class is wrapped when its first optimizer is made
    optimizer = Twice([nn.Parameter(torch.zeros(1))], lr=0.1)
    wrapper = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
    seen: list[int] = []

    def hook(*_: object) -> None:
        frame, steps = inspect.currentframe(), 0
        while frame is not None:
            steps += frame.f_code is wrapper and frame.f_locals.get("self") is optimizer
            frame = frame.f_back
        seen.append(steps)

    optimizer.register_step_post_hook(hook)
    assert list(vars(optimizer)["_optimizer_step_post_hooks"].values()) == [hook]
    optimizer.step()
    assert seen == [2, 1], "within the step of another class, and then in its own"


@leans_on("_step_supports_amp_scaling", "_per_optimizer_states")
def grad_scaler_leaves_the_decision_to_the_optimizer() -> None:
    class Told(torch.optim.SGD):
        _step_supports_amp_scaling = True
        told: tuple[float | None, float] | None = None

        def step(self, closure: Any = None) -> Any:
            scale: Tensor | None = self.grad_scale  # type: ignore[attr-defined]
            found: Tensor = self.found_inf  # type: ignore[attr-defined]
            self.told = (None if scale is None else scale.item(), found.item())

    p = nn.Parameter(torch.zeros(1))
    optimizer = Told([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    torch.autograd.backward(scaler.scale(p.sum() * float("inf")))
    scaler.step(optimizer)
    assert optimizer.told == (8.0, 1.0)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    (found,) = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
    found.fill_(0.0)
    scaler.update()
    assert scaler.get_scale() == 8.0, "what is written there is what update() reads"


@leans_on("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
def wrappers_keep_what_they_wrap_under_these_names() -> None:
    from torch._dynamo import OptimizedModule
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.distributed.fsdp import _common_utils

    compiled = torch.compile(nn.Linear(1, 1))
    assert isinstance(compiled, OptimizedModule)
    assert [name for name, _ in compiled.named_parameters()] == ["_orig_mod.weight", "_orig_mod.bias"]
    assert _common_utils.FSDP_WRAPPED_MODULE == "_fsdp_wrapped_module"
    assert checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE == "_checkpoint_wrapped_module"


@leans_on("_inductor", "aoti_compile_and_package")
def inductor_compiles_ahead_with_these_options() -> None:
    taken = inspect.signature(torch._inductor.aoti_compile_and_package).parameters
    assert {"package_path", "inductor_configs"} <= taken.keys()
    known = inductor_config.get_config_copy()
    assert {"cpp.threads", "cpp.dynamic_threads", "cpp.simdlen", "aot_inductor.package_cpp_only"} <= known.keys()


@leans_on("AOTIModelPackageLoader", "_aoti", "_C")
def packages_are_loaded_with_five_arguments_and_run() -> None:
    loader = torch._C._aoti.AOTIModelPackageLoader
    assert callable(loader.run)
    with pytest.raises(RuntimeError):  # there is no such file; a TypeError would say that the arguments are others
        loader("/nowhere.pt2", "model", False, 1, -1)


@leans_on("pick_vec_isa", "bit_width")
def vectors_have_a_width() -> None:
    from torch._inductor.cpu_vec_isa import VecISA, pick_vec_isa

    assert not inspect.signature(pick_vec_isa).parameters
    assert list(inspect.signature(VecISA.bit_width).parameters) == ["self"]


# -- uvicorn ---------------------------------------------------------------------------------------------------------


class Wire(asyncio.Transport):
    """A connection that keeps what is written, and whether it is read from."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.calls: list[str] = []

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.calls.append("pause")

    def resume_reading(self) -> None:
        self.calls.append("resume")

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        self.calls.append("close")


class Speaking(HttpToolsProtocol):
    """uvicorn's protocol, up to where a request begins."""

    begun: RequestResponseCycle | None = None
    answered = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        assert app is self.app
        self.begun = cycle

    def on_response_complete(self) -> None:
        self.answered = True


def speaking() -> tuple[Speaking, Wire]:
    """Return uvicorn's protocol with a request that has a body of three bytes, of which two have come."""
    options: dict[str, Any] = {"interface": "asgi3", "log_config": None, "access_log": False, "proxy_headers": False}
    config = uvicorn.Config(answer, http=Speaking, ws="none", **options)
    loop = asyncio.new_event_loop()
    try:
        protocol = Speaking(config=config, server_state=ServerState(), app_state={"a": 1}, _loop=loop)
    finally:
        loop.close()
    wire = Wire()
    protocol.connection_made(wire)
    protocol.data_received(b"POST /v1/x?y=z HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nab")
    return protocol, wire


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@leans_on("HttpToolsProtocol", "_unsupported_upgrade_warning", "_start_asgi_task")
def the_protocol_keeps_a_connection_in_these_attributes() -> None:
    protocol, wire = speaking()
    assert protocol.transport is wire
    assert (protocol.url, protocol.headers) == (b"/v1/x?y=z", [(b"host", b"h"), (b"content-length", b"3")])
    assert protocol.cycle is protocol.begun is not None
    assert protocol.scope is protocol.cycle.scope
    assert protocol.scope["headers"] is protocol.headers
    assert protocol.scope["http_version"] == "1.1"
    assert (protocol.app, protocol.app_state) == (answer, {"a": 1})
    assert protocol.limit_concurrency is None
    assert protocol.connections is protocol.server_state.connections == {protocol}
    assert protocol.tasks is protocol.server_state.tasks == set()
    assert protocol.server_state.total_requests == 0
    assert isinstance(protocol.access_log, bool)
    for logger in (protocol.logger, protocol.access_logger):
        assert isinstance(logger, logging.Logger)
    assert protocol.loop.is_closed()
    assert callable(protocol._unsupported_upgrade_warning)
    listened = ("on_message_begin", "on_url", "on_header", "on_headers_complete", "on_body", "on_message_complete")
    assert all(callable(getattr(protocol, name)) for name in (*listened, "pause_writing", "resume_writing"))
    protocol.connection_lost(None)
    assert protocol.cycle.disconnected
    assert protocol.cycle.message_event.is_set()


@leans_on("RequestResponseCycle")
def a_cycle_is_one_request_and_its_answer() -> None:
    taken = inspect.signature(RequestResponseCycle).parameters
    assert list(taken) == [
        "scope", "transport", "flow", "logger", "access_logger", "access_log", "default_headers", "message_event",
        "expect_100_continue", "keep_alive", "on_response",
    ]  # fmt: skip
    protocol, wire = speaking()
    cycle = protocol.cycle
    assert (bytes(cycle.body), cycle.more_body, cycle.keep_alive) == (b"ab", True, True)
    flags = (cycle.response_started, cycle.response_complete, cycle.disconnected, cycle.waiting_for_100_continue)
    assert flags == (False,) * 4
    assert cycle.access_log is False
    assert cycle.flow is protocol.flow
    assert cycle.default_headers == []
    assert isinstance(cycle.message_event, asyncio.Event)
    with pytest.raises(StopIteration):
        cycle.run_asgi(answer).send(None)  # it answers without waiting for anything
    assert wire.written == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    assert cycle.response_started
    assert cycle.response_complete
    assert protocol.answered


@leans_on("STATUS_LINE", "HEADER_VALUE_RE")
def heads_of_answers_are_made_of_these() -> None:
    assert httptools_impl.STATUS_LINE[431] == b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    assert httptools_impl.HEADER_VALUE_RE.search(b"a\r\nb")
    assert not httptools_impl.HEADER_VALUE_RE.search("é and a\ttab".encode("latin-1"))


@leans_on("HIGH_WATER_LIMIT", "read_paused", "write_paused")
def reading_and_writing_pause() -> None:
    wire = Wire()
    flow = FlowControl(wire)
    assert HIGH_WATER_LIMIT > 0
    assert (flow.read_paused, flow.write_paused) == (False, False)
    flow.pause_reading()
    flow.pause_reading()
    assert flow.read_paused
    flow.read_paused = False
    flow.resume_reading()
    assert wire.calls == ["pause"], "what is not paused is not resumed"
    flow.pause_writing()
    assert flow.write_paused


@leans_on("_types", "ASGI3Application", "HTTPScope")
def types_are_named() -> None:
    from uvicorn import _types

    assert callable(_types.ASGI3Application.__origin__)  # type: ignore[attr-defined]
    assert {"headers", "http_version", "path", "raw_path"} <= _types.HTTPScope.__annotations__.keys()


class Starting(uvicorn.Server):
    """A server that ends when it has started."""

    began: Any = None

    async def startup(self, sockets: Any = None) -> None:
        self.began = (self.lifespan.state, sockets)
        self.should_exit = True


@leans_on("http_protocol_class", "handle_exit", "force_exit", "lifespan.state", "server_state")
def a_server_is_started_and_ended_through_these() -> None:
    config = uvicorn.Config(answer, http=Speaking, interface="asgi3", log_config=None, lifespan="off", ws="none")
    server = Starting(config)
    for method in ("startup", "shutdown", "run"):
        assert list(inspect.signature(getattr(uvicorn.Server, method)).parameters) == ["self", "sockets"]
    asyncio.run(server.serve(sockets=[]))
    assert server.began == ({}, [])
    assert config.http_protocol_class is Speaking
    assert server.server_state.connections == set()
    assert not server.force_exit
    server.should_exit = False
    server.handle_exit(signal.SIGINT, None)
    assert server.should_exit
    assert not server.force_exit
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit


# -- the tests -------------------------------------------------------------------------------------------------------


@cache
def sources() -> dict[str, ast.Module]:
    """Return every module of both packages."""
    paths = [path for room in ("client", "service") for path in sorted((ROOT / room).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def words(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module imports, uses, defines, or writes as a string."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute():
                yield node.attr
                yield ast.unparse(node).rpartition("self.")[2]
            case ast.alias():
                yield from node.name.split(".")
            case ast.ImportFrom(module=str(module)):
                yield from module.split(".")
            case ast.Constant(value=str(text)):
                yield text
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name


@cache
def leaning() -> dict[str, list[str]]:
    """Return by word the modules that have it."""
    found: dict[str, list[str]] = {word: [] for word in CHECKS}
    for path, tree in sources().items():
        for word in CHECKS.keys() & set(words(tree)):
            found[word].append(path)
    return found


@pytest.mark.parametrize("word", CHECKS)
def test_what_is_leaned_on_is_as_expected(word: str) -> None:
    """A private interface of torch or uvicorn that modules of ours use is there, and does what they use it for."""
    modules = leaning()[word]
    assert modules, f"no module uses {word} any more: remove it from the check {CHECKS[word].__name__}"
    try:
        CHECKS[word]()
    except Exception as exc:
        versions = f"torch {torch.__version__} and uvicorn {uvicorn.__version__}"
        what = CHECKS[word].__name__.replace("_", " ")
        pytest.fail(f"{', '.join(modules)} lean on {word} ({what}), which does not hold with {versions}: {exc!r}")


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """Return the private names that modules of ours define: functions, attributes, variables, fields."""
    found = set[str]()
    for tree in sources().values():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    found.add(node.name)
                case ast.Attribute(ctx=ast.Store()):
                    found.add(node.attr)
                case ast.Name(ctx=ast.Store()):
                    found.add(node.id)
    return found


def test_every_private_interface_has_a_check() -> None:
    """A private name that is none of ours, and all that is imported from uvicorn's protocols, is in a check above."""
    ours, unchecked = own_names() | DOCUMENTED, set[tuple[str, str]]()
    for path, tree in sources().items():
        for node in ast.walk(tree):
            names: list[str] = []
            match node:
                case ast.Attribute() if private(node.attr) and node.attr not in ours:
                    names = [node.attr]
                case ast.ImportFrom(module=str(module)) if module.split(".")[0] in ("torch", "uvicorn"):
                    within = module.startswith("uvicorn.protocols") or any(map(private, module.split(".")))
                    names = [alias.name for alias in node.names if within or private(alias.name)]
                    names = ["is_traceable_wrapper_subclass" if name == "_python_dispatch" else name for name in names]
            unchecked |= {(path, name) for name in names if name not in CHECKS}
    assert sorted(unchecked) == []
