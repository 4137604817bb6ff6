"""A worker's settings: arguments first, then `FARSTEP_*` variables, then defaults.

argument       variable             default
server         FARSTEP_SERVER       none: embedded, in this process
session        FARSTEP_SESSION      none: a fresh private session. In a run of `farstep launch`, FARSTEP_RUN, a name
                                    that is given is the run's: session="actor" is NAME.actor
worker         FARSTEP_WORKER       a fresh name of host, process and a random part; see `farstep.identity`
token          FARSTEP_TOKEN        none
wire           FARSTEP_WIRE         none: everything travels as it is; counts where there is a server
overlap        FARSTEP_OVERLAP      off; `1` or `0`
options        FARSTEP_OPTIONS      none: as `session`, where all name the options of the creation or those in force
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, cast
from urllib.parse import urlsplit

import httpx

from farstep.errors import invalid_option
from farstep.errors.connecting import check_address, without_secrets
from farstep.identity import Worker, check_name, fresh_name
from farstep.protocol.codecs import Wire
from farstep.protocol.consistency import Async, Consistency, checked
from farstep.protocol.durability import NONE, Durability
from farstep.protocol.durability import checked as checked_durability
from farstep.protocol.messages import OptionsMode
from farstep.protocol.plain import pythons_own
from farstep.protocol.policies import NO_POLICIES, Policies, default_options
from farstep.protocol.unix import check_path, path_of_url
from farstep.variables import warn_of_misspelt

NonFinitePolicy = Literal["refuse", "skip", "allow"]
OnRollback = Literal["raise", "accept"]
KernelChoice = Literal["auto", "reference", "fused"]


class RemoteOptions(TypedDict, total=False):
    """The keyword-only options that every farstep optimizer takes in addition to torch's own.

    server: URL of a farstep server, without credentials; `unix:///path` for a socket of this machine. Without a server
        the optimizer runs embedded, in this process.
    session: the session to create or join; by default that of `FARSTEP_SESSION`, numbered for the second optimizer of a
        process and later ones, or else a session private to this optimizer and removed with it.
    worker: this worker's name in the session, or `farstep.worker()`. A sync step reduces gradients in the order of
        these names; those of unnamed workers follow, in the order of their contents.
    token: the server's bearer token.
    consistency: `farstep.Async()`, `farstep.Bounded(staleness=S)` or `farstep.Sync(workers=N)`.
    durability: what the session's server keeps on its disk: "none", `farstep.Snapshot(...)` or `farstep.Journal(...)`.
        None takes what the session has, or the server's default where it is created. Not for embedded sessions.
    nonfinite: what the session does with a gradient that holds NaN or Inf: "refuse" it (the default with a server),
        "allow" it as torch does (the default of an embedded optimizer), or "skip" the step for all its workers.
    clip_norm: the largest norm of the gradients of a step, which are clipped after their reduction.
    clip_norm_type: the p of that p-norm, or infinity; 2 by default.
    clip_value: the largest absolute value of an element of the gradients.
    accumulate: how many pushes, or barriers, make a step, of the mean of their gradients.
    ema: the decay of an average of the parameters, which `swap_to("ema")` and `pull_view("ema")` show.
    kernel: "auto" takes fused kernels when they are built, "reference" equals `torch.optim` with `foreach=False` bit
        for bit, "fused" waits for fused kernels.
    wire: "bf16" or "fp16" sends this worker's float32 gradients and receives its float32 parameters in 16 bits,
        `farstep.Wire(gradients="bf16")` only one of the two; the server's parameters stay float32. Not for embedded
        sessions.
    overlap: send gradients while the backward pass still computes others (`farstep.overlap`). Without effect in
        embedded sessions and for LBFGS.
    options: whose learning rate and other group options count where several workers share a session. "session": the
        session has one set, which a worker changes by changing its groups; a joining worker takes those in force into
        its groups. "push": this worker's own, for the steps of its own pushes. See `docs/workers.md`.
    on_rollback: "raise" raises `StateRolledBack` where the session went back to an older version, because its server
        died and had kept nothing later, or because someone rolled it back. "accept" goes on from that version:
        `step()`, `pull()` and `heartbeat()` join again and take its parameters; the gradient of that step is dropped,
        and `last_step.reason` is "rolled_back".
    timeout_s: seconds of retries before an error reports that the server does not answer.
    transport: the httpx transport for all requests, for proxies, certificates and tests; proxies of the environment are
        not used (docs/errors.md).
    """

    server: str | None
    session: str | None
    worker: str | Worker | None
    token: str | None
    consistency: Consistency
    durability: Durability | None
    nonfinite: NonFinitePolicy | None
    clip_norm: float | None
    clip_norm_type: float
    clip_value: float | None
    accumulate: int
    ema: float | None
    kernel: KernelChoice
    wire: Wire | str | None
    overlap: bool
    options: OptionsMode | None
    on_rollback: OnRollback
    timeout_s: float
    transport: httpx.BaseTransport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """A checked and completed set of remote options.

    Attributes:
        named: the worker's name is the same in every run, or the worker is alone in the session.
        counted_as: the worker's name, "" if none was given, where the session's name is from the environment: the
            optimizers of a process are then counted by it. None otherwise.
    """

    server: str | None
    session: str
    private: bool
    worker: str
    named: bool = field(default=True, kw_only=True)
    token: str | None = field(repr=False)
    consistency: Consistency
    nonfinite: NonFinitePolicy
    kernel: KernelChoice
    timeout_s: float
    transport: httpx.BaseTransport | None = None
    wire: Wire = field(default_factory=Wire)
    policies: Policies = NO_POLICIES
    overlap: bool = False
    counted_as: str | None = None
    options: OptionsMode | None = None
    durability: Durability | None = None
    on_rollback: OnRollback = "raise"


def resolve(options: RemoteOptions, environment: Mapping[str, str] = os.environ) -> WorkerSettings:
    """Complete remote options from the environment and check them.

    Raises:
        InvalidOption: on an unknown option, a URL that is not http(s) or unix, or holds credentials, or a name that
            cannot be one.
    """
    warn_of_misspelt(environment)
    unknown = sorted(set(options) - set(RemoteOptions.__annotations__) - set(default_options()))
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    options = cast(RemoteOptions, {name: pythons_own(value) for name, value in options.items()})
    server = options.get("server") or environment.get("FARSTEP_SERVER") or None
    own = options.get("session") or None
    session = _in_run(own, environment.get("FARSTEP_RUN") or None) or environment.get("FARSTEP_SESSION") or None
    worker = options.get("worker") or environment.get("FARSTEP_WORKER") or None
    named = worker is not None
    if isinstance(worker, Worker):
        named, worker = worker.named, worker.name
    token = options.get("token") or environment.get("FARSTEP_TOKEN") or None
    kernel = options.get("kernel", "auto")
    nonfinite = options.get("nonfinite") or ("refuse" if server else "allow")
    timeout_s = options.get("timeout_s", 60.0)
    on_rollback = options.get("on_rollback", "raise")
    if server is not None:
        _check_server(server)
    for name, value in (("session", own), ("session", session), ("worker", worker)):
        if value is not None:
            check_name(value, name)
    if kernel not in ("auto", "reference", "fused"):
        raise invalid_option(f"Invalid kernel: {kernel!r}. There are auto, reference and fused.", field="kernel")
    if nonfinite not in ("refuse", "skip", "allow"):
        raise invalid_option(f"Invalid nonfinite: {nonfinite!r}. There are refuse, skip and allow.", field="nonfinite")
    if on_rollback not in ("raise", "accept"):
        raise invalid_option(
            f"Invalid on_rollback: {on_rollback!r:.80}. There are raise and accept.", field="on_rollback"
        )
    if type(timeout_s) not in (int, float) or not 0 < timeout_s < float("inf"):
        raise invalid_option(f"Invalid timeout_s: {timeout_s!r}. Must be positive seconds.", field="timeout_s")
    said = options.get("wire")
    if said is None and server is not None:
        said = environment.get("FARSTEP_WIRE") or None
    wire = Wire.of(said)
    if wire and server is None:
        raise invalid_option(
            "An embedded session has no wire: it works on the parameters' own memory.",
            remedy="Leave wire out, or give server=... or set FARSTEP_SERVER.",
            field="wire",
        )
    mode = checked(options.get("consistency") or Async())
    if server is not None and session is None and mode.fewest > 1:
        raise invalid_option(
            f"A session without a name is this optimizer's alone, and {mode!r} waits for {mode.fewest} workers.",
            remedy="Give every worker the same session=..., or set FARSTEP_SESSION.",
            field="session",
        )
    durability = _durability(options.get("durability"), server)
    return WorkerSettings(
        server=server.rstrip("/") if server else None,
        session=session or _fresh_session(),
        private=session is None,
        worker=worker or fresh_name(),
        named=named or session is None,
        token=token,
        consistency=mode,
        nonfinite=nonfinite,
        kernel=kernel,
        timeout_s=timeout_s,
        transport=options.get("transport"),
        wire=wire,
        policies=Policies.of(options),
        options=_options(options.get("options") or environment.get("FARSTEP_OPTIONS") or None),
        overlap=_flag(options.get("overlap"), environment.get("FARSTEP_OVERLAP")),
        counted_as=(worker or "") if session and own is None else None,
        durability=durability,
        on_rollback=on_rollback,
    )


def _in_run(session: object, run: str | None) -> Any:
    """Return a session's name within a run of `farstep launch`, so that two runs on one server do not share it."""
    if run is None or not isinstance(session, str) or session == run or session.startswith(f"{run}."):
        return session
    return f"{run}.{session}"


def in_fresh_session(settings: WorkerSettings) -> WorkerSettings:
    """Return the same settings with a fresh private session."""
    return replace(settings, session=_fresh_session(), private=True, counted_as=None)


def options_of_copy(settings: WorkerSettings) -> RemoteOptions:
    """Return the options that a copy of an optimizer keeps: everything but names, token and transport.

    A copy is alone in its session, so it waits for no other worker.
    """
    return {
        "server": settings.server,
        "consistency": settings.consistency.for_one(),
        "durability": settings.durability,
        "on_rollback": settings.on_rollback,
        "nonfinite": settings.nonfinite,
        "kernel": settings.kernel,
        "wire": settings.wire,
        "overlap": settings.overlap,
        "timeout_s": settings.timeout_s,
        **cast(RemoteOptions, settings.policies.options()),
    }


def settings_of_copy(options: RemoteOptions, environment: Mapping[str, str] = os.environ) -> WorkerSettings:
    """Return the settings of a copy: a private session on the same server. Only the token comes from the environment.

    Raises:
        InvalidOption: see `resolve`.
    """
    return resolve(options, {key: environment[key] for key in ("FARSTEP_TOKEN",) if key in environment})


def _flag(said: object, variable: str | None) -> bool:
    """Return whether an option is on, by argument or variable; off by default."""
    if said is None:
        said = {"1": True, "0": False, "": False, None: False}.get(variable, variable)
    if not isinstance(said, bool):
        raise invalid_option(
            f"Invalid overlap: {said!r:.80}.",
            remedy="Give True or False, or set FARSTEP_OVERLAP to 1 or 0.",
            field="overlap",
        )
    return said


def _durability(said: object, server: str | None) -> Durability | None:
    """Return the level that was asked for, None for the server's choice."""
    if said is None:
        return None
    durability = checked_durability(said)
    if server is None and durability != NONE:
        raise invalid_option(
            "An embedded session ends with its process and keeps nothing on disk.",
            remedy="Start `farstep serve --data-dir DIR` and give server=... or set FARSTEP_SERVER; or leave "
            "durability out, and save state_dict().",
            field="durability",
        )
    return durability


def _options(said: object) -> OptionsMode | None:
    if said not in ("session", "push", None):
        raise invalid_option(f"Invalid options: {said!r:.80}. There are session and push.", field="options")
    return said


def _check_server(server: str) -> None:
    path = path_of_url(server)
    if path is not None:
        check_path(path, field="server", side="client")
        return
    check_address(server)
    if not _is_http(server):
        raise invalid_option(
            f"Invalid server: {without_secrets(server)!r}.",
            remedy="Give a URL such as http://127.0.0.1:7171 or unix:///run/farstep/server.sock.",
            field="server",
        )


def _is_http(server: str) -> bool:
    try:
        url = urlsplit(server)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def _fresh_session() -> str:
    return f"private-{secrets.token_hex(8)}"
