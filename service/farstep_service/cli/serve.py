"""`farstep serve`: turn options into settings, start the server, and print a banner of five lines.

Options have variables `FARSTEP_SERVE_*`. There is no `FARSTEP_PORT`: Kubernetes sets that one in every container beside
a service called farstep, to `tcp://10.0.0.1:7171`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farstep import __version__
from farstep.errors import InvalidOption, found_by
from farstep.protocol.durability import NONE, Durability, from_text, to_text
from farstep.variables import KNOWN, OURS, unknown
from farstep_service.cli.output import JsonOutput, print_json, reporting
from farstep_service.settings import DEFAULT_HOST, DEFAULT_PORT, GIB, Settings, is_loopback

if TYPE_CHECKING:
    from farstep_service.server import Listening

DEFAULTS = Settings()
LARGEST_GIB = 2**30
TOKEN_VARIABLE = "FARSTEP_TOKEN"

SECRETS = ("/run/secrets/", "/var/run/secrets/")
"""Directories where container runtimes put secrets."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 allows this after `Bearer`


class LogLevel(StrEnum):
    """The level of the server's log."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class ReplayKernel(StrEnum):
    """The kernels that take the steps of a journal again."""

    recorded = "recorded"
    reference = "reference"


OPTIONS: list[str] = []
"""The options of `serve` that also have a variable."""
VARIABLES = "FARSTEP_SERVE_"


def variable_of(option: str) -> str:
    """Return the variable of an option."""
    return VARIABLES + option.removeprefix("--").replace("-", "_").upper()


def option(name: str, help: str, *, metavar: str | None = None, **bounds: Any) -> Any:
    """Return an option whose variable is FARSTEP_SERVE_ and its name; the help of the verb mentions them all."""
    OPTIONS.append(name)
    return typer.Option(name, help=help, envvar=variable_of(name), show_envvar=False, metavar=metavar, **bounds)


def serve(
    host: Annotated[
        str, option("--host", "Address to listen on; any but loopback needs a token.", metavar="ADDRESS")
    ] = DEFAULT_HOST,
    port: Annotated[
        int, option("--port", "TCP port; 0 for any free one.", metavar="N", min=0, max=65535)
    ] = DEFAULT_PORT,
    unix: Annotated[
        str, option("--unix", "Also listen at a socket, for this user on this machine only.", metavar="PATH")
    ] = DEFAULTS.unix,
    no_tcp: Annotated[bool, option("--no-tcp", "Listen at the socket only.")] = not DEFAULTS.tcp,
    device: Annotated[
        str, option("--device", "Device of the sessions: cpu, cuda, cuda:1.", metavar="NAME")
    ] = DEFAULTS.device,
    token_file: Annotated[
        Path | None,
        option("--token-file", f"Accepted tokens, one per line, beside that of {TOKEN_VARIABLE}.", metavar="FILE"),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        option(
            "--allowed-hosts",
            "Host names to answer to beside its addresses, separated by commas. With tokens, any by default.",
            metavar="NAME",
        ),
    ] = None,
    insecure_no_auth: Annotated[bool, option("--insecure-no-auth", "Listen on any address without a token.")] = False,
    max_sessions: Annotated[
        int, option("--max-sessions", "Most sessions at a time.", metavar="N", min=1)
    ] = DEFAULTS.max_sessions,
    max_session_gib: Annotated[
        float, option("--max-session-gib", "Largest parameters of one session.", metavar="GIB")
    ] = DEFAULTS.max_session_bytes / GIB,
    max_gib: Annotated[
        float | None,
        option("--max-gib", "Memory of sessions and requests; most of this machine's by default.", metavar="GIB"),
    ] = None,
    held_versions: Annotated[
        int, option("--held-versions", "Versions of a session kept for slow readers.", metavar="N", min=1, max=1000)
    ] = DEFAULTS.held_versions,
    threads: Annotated[
        int, option("--threads", "Most large steps at a time.", metavar="N", min=1, max=256)
    ] = DEFAULTS.threads,
    data_dir: Annotated[
        str, option("--data-dir", "Keep sessions in this directory, so that they outlive the server.", metavar="DIR")
    ] = DEFAULTS.data_dir,
    durability: Annotated[
        str | None,
        option(
            "--durability",
            "Level of sessions that name none: none, snapshot:every_s=60, journal:os, journal:group.",
            metavar="LEVEL",
        ),
    ] = None,
    max_journal_gib: Annotated[
        float, option("--max-journal-gib", "Largest journal of one session.", metavar="GIB")
    ] = DEFAULTS.max_journal_bytes / GIB,
    replay: Annotated[
        ReplayKernel,
        option("--replay", "Kernels that take journaled steps again; reference where the recorded ones cannot run."),
    ] = ReplayKernel.recorded,
    archive: Annotated[
        str,
        option(
            "--archive",
            "Copy what the data directory keeps to a store elsewhere: s3://BUCKET/PATH, gs://, az://, file:///FOLDER.",
            metavar="URL",
        ),
    ] = DEFAULTS.archive,
    log_level: Annotated[LogLevel, option("--log-level", "Level of the log on the standard error.")] = LogLevel.info,
    json_output: JsonOutput = False,
) -> None:
    """Run a server. Sessions live in its memory, and end with it unless it has a --data-dir.

    FARSTEP_TOKEN holds the token that clients must send.

    Options also have variables: FARSTEP_SERVE_HOST, FARSTEP_SERVE_MAX_GIB and so on.
    """
    with reporting(json_output):
        check_variables(os.environ)
        settings = Settings(
            host=host,
            port=port,
            tcp=not no_tcp,
            unix=unix,
            device=device,
            tokens=tokens_of(os.environ.get(TOKEN_VARIABLE, ""), token_file),
            allowed_hosts=names_of(allowed_hosts or []),
            insecure_no_auth=insecure_no_auth,
            max_sessions=max_sessions,
            max_session_bytes=bytes_of(max_session_gib, "max_session_gib"),
            max_bytes=None if max_gib is None else bytes_of(max_gib, "max_gib"),
            held_versions=held_versions,
            threads=threads,
            data_dir=data_dir,
            durability=level_of(durability),
            max_journal_bytes=bytes_of(max_journal_gib, "max_journal_gib"),
            replay=replay.value,
            archive=archive.strip(),
        )
        from farstep_service.server import run

        def announce(listening: Listening) -> None:
            if json_output:
                print_json(
                    {
                        "url": listening.url,
                        "address": listening.address,
                        "port": listening.port,
                        "unix": listening.unix,
                        "device": listening.device,
                        "steps": listening.steps,
                        "threads": listening.threads,
                        "kernels": listening.kernels,
                        "docs": f"{listening.url}/docs" if listening.port else "",
                        "tokens": len(settings.tokens),
                        "durable": bool(settings.data_dir),
                        "data_dir": settings.data_dir,
                        "durability": to_text(settings.default_durability),
                        "archive": settings.archive,
                        "version": __version__,
                        "pid": os.getpid(),
                    }
                )
                return
            typer.echo("\n".join(banner(listening, settings)))

        run(settings, announce, log_level=log_level.value)


def bytes_of(gib: float, field: str) -> int:
    """Convert GiB to bytes.

    Raises:
        InvalidOption: the number is not positive, or too large.
    """
    if not 0 < gib <= LARGEST_GIB:
        raise InvalidOption(
            f"Invalid {field}: {gib}. Must be positive, and at most {LARGEST_GIB}.", field=field, limit=LARGEST_GIB
        )
    return int(gib * GIB)


def level_of(text: str | None) -> Durability | None:
    """Return the level that a text describes, None for none.

    Raises:
        InvalidOption: the level or an option is unknown, or a value out of range.
    """
    if text is None or not text.strip():
        return None
    with found_by("server"):
        return from_text(text)


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse unknown variables FARSTEP_SERVE_*; warn of other variables with a name close to one of farstep's.

    Raises:
        InvalidOption: naming the variable, and the most similar one.
    """
    known = {variable_of(option) for option in OPTIONS}
    for name, near in unknown(environment, VARIABLES, known):
        meant = f"Did you mean {near}?" if near else "The options are listed by `farstep serve --help`."
        raise InvalidOption(f"There is no variable {name}: no option of serve has that name.", remedy=meant, field=name)
    for name, near in unknown(environment, OURS, KNOWN | known):
        if near:
            typer.echo(f"warning: the variable {name} is not read; did you mean {near}?", err=True)


def names_of(given: list[str]) -> tuple[str, ...]:
    """Split host names of options or a variable at commas."""
    return tuple(name.strip() for names in given for name in names.split(",") if name.strip())


def tokens_of(variable: str, file: Path | None) -> tuple[str, ...]:
    """Return the accepted tokens: that of the environment, and those of a file, each once.

    Args:
        variable: the value of FARSTEP_TOKEN, without regard to blanks around it; "" is no token.
        file: one token per line; empty lines and lines that begin with # do not count.

    Raises:
        InvalidOption: the file cannot be read or holds no token, or a token cannot be sent in a header. Messages show
            no token.
    """
    tokens = {TOKEN_VARIABLE: variable.strip()} if variable.strip() else {}
    if file is not None:
        try:
            with file.open() as opened:
                check_private(file, os.fstat(opened.fileno()))
                lines = opened.read().splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
            raise InvalidOption(
                f"Cannot read the token file {file}: {reason}.",
                remedy="Give a file with one token per line.",
                field="token_file",
            ) from exc
        stripped = {f"{file}, line {number}": line.strip() for number, line in enumerate(lines, 1)}
        found = {where: line for where, line in stripped.items() if line and not line.startswith("#")}
        if not found:
            raise InvalidOption(
                f"The token file {file} holds no token.",
                remedy="Put one per line: openssl rand -hex 32",
                field="token_file",
            )
        tokens |= found
    for where, token in tokens.items():
        if not _TOKEN.fullmatch(token):
            raise InvalidOption(
                f"The token of {where} cannot be sent: one token has letters, digits and -._~+/ only.",
                remedy="Make one with `openssl rand -hex 32`; several go into a --token-file, one per line.",
                field="token",
            )
    return tuple(dict.fromkeys(tokens.values()))


def check_private(file: Path, found: os.stat_result) -> None:
    """Refuse a token file of this user that others may read, or any that others may write; warn if all may read it.

    Secrets that a container runtime puts into `/run/secrets` belong to root and are readable by all users of the
    container, which is fine: a container has no other users.

    Raises:
        InvalidOption: naming the file and the fault.
    """
    if not stat.S_ISREG(found.st_mode):
        return
    mode, own = stat.S_IMODE(found.st_mode), found.st_uid == os.geteuid()
    secret = str(file.absolute()).startswith(SECRETS)
    wrong = ""
    if mode & 0o022:
        wrong = "others than its owner may write to it, and so let themselves in"
    elif not own and found.st_uid != 0:
        wrong = "it belongs to another user"
    elif own and mode & 0o077 and not secret:
        wrong = "others than its owner may read it"
    if wrong:
        raise InvalidOption(
            f"Refusing the token file {file} (mode {mode:04o}): {wrong}.",
            remedy=f"Run: chmod 600 {file}" + ("" if own else ", as its owner, or give one of this user's own."),
            field="token_file",
        )
    if mode & 0o004 and not secret:
        typer.echo(f"warning: every user of this machine can read {file}, which is root's; mode 0640 will do", err=True)


def banner(listening: Listening, settings: Settings) -> list[str]:
    """Return the lines that `farstep serve` prints when it has started."""
    local = not listening.port or is_loopback(listening.address)
    wide = "" if local else f" (listens on {listening.address}, reachable from other machines)"
    also = f" and {listening.unix}" if listening.port and listening.unix else ""
    docs = f"{listening.url}/docs" if listening.port else "/docs, over the socket"
    if settings.tokens:
        auth = f"on: {len(settings.tokens)} token{'s' if len(settings.tokens) > 1 else ''}"
    elif wide:
        auth = "OFF: anyone who reaches this machine can read and change every session"
    else:
        auth = "off: loopback only" if listening.port else "off: this user only"
    return [
        f"farstep {__version__} serves at {listening.url}{wide}{also}",
        f"  device  {listening.device}; steps at once: {listening.steps}, CPU threads in each: {listening.threads}; "
        f"{listening.kernels}",
        f"  docs    {docs}{', with the token' if settings.tokens else ''}",
        f"  auth    {auth}",
        f"  data    {data_line(settings)}",
    ]


def data_line(settings: Settings) -> str:
    """Return what is kept of the sessions, and where."""
    if not settings.data_dir:
        return "memory only: sessions end with the server"
    level = settings.default_durability
    copied = f"; copied to {settings.archive}" if settings.archive else ""
    if level == NONE:
        return f"{settings.data_dir}, for sessions that ask for it; others end with the server{copied}"
    return f"{settings.data_dir}, {to_text(level)} for sessions that name no level{copied}"
