"""Errors name their cause: what cannot heal is said at once, in its own words, and what can is waited for as asked."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import trustme

import farstep
from farstep.conversation import Conversation
from farstep.conversation.replies import retry_after_s
from farstep.errors import (
    Busy,
    CannotConnect,
    FarstepError,
    InvalidAnswer,
    InvalidOption,
    LimitExceeded,
    NoSuchRoute,
    Unauthorized,
    Unavailable,
)
from farstep.errors.connecting import cause_of, without_secrets
from farstep.optim import Adagrad
from farstep.transport import SocketTransport
from tests.support.client.failing import SHORT_S, twins_at
from tests.support.client.hostile import Liar, hostile, http
from tests.support.client.twins import drawn, parameters
from tests.support.service.servers import RunningServer
from tests.support.service.servers import farstep as command
from tests.support.transport.wellbehaved import running

FOREVER_S = 3600.0
"""How long these calls would go on, if they tried again."""


def joining(url: str, **options: Any) -> FarstepError:
    """Return the error of a join that may be tried for an hour."""
    with pytest.raises(FarstepError) as refused:
        Adagrad(parameters(drawn(0)), server=url, timeout_s=FOREVER_S, **options)
    assert "nothing accepts" not in str(refused.value)
    return refused.value


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> SocketTransport:
    """Return a transport that trusts the tests' authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return SocketTransport(verify=context)


@pytest.fixture(scope="module")
def secure(authority: trustme.CA) -> Iterator[str]:
    with running(authority.issue_cert("127.0.0.1")) as url:
        yield url


@pytest.mark.promise("What waiting cannot heal is raised at once, and the cause is named.", area="client errors")
def test_a_certificate_of_an_unknown_authority(secure: str) -> None:
    """The certificate is named at once, and how to name its authority."""
    error = joining(secure)
    assert type(error) is CannotConnect
    assert "certificate is of no authority known here" in error.detail
    assert "SSL_CERT_FILE" in error.remedy


def test_a_certificate_of_another_host(authority: trustme.CA, trusting: SocketTransport) -> None:
    """That it has another name is said at once."""
    with running(authority.issue_cert("other.invalid")) as url:
        error = joining(url, transport=trusting)
    assert type(error) is CannotConnect
    assert "certificate is for another host" in error.detail


def test_a_certificate_that_has_expired(authority: trustme.CA, trusting: SocketTransport) -> None:
    """That it has expired is said at once."""
    past = datetime.now(UTC) - timedelta(days=1)
    with running(authority.issue_cert("127.0.0.1", not_after=past)) as url:
        error = joining(url, transport=trusting)
    assert type(error) is CannotConnect
    assert "certificate has expired" in error.detail


def test_the_authority_of_the_environment_is_trusted(
    authority: trustme.CA, secure: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """With SSL_CERT_FILE the certificate is taken; what answers then is no farstep server."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert type(joining(secure)) is InvalidAnswer


def test_https_to_a_port_that_is_plain(server: RunningServer) -> None:
    """It is said at once, with the URL to give."""
    error = joining(server.url.replace("http:", "https:"))
    assert type(error) is CannotConnect
    assert "does not speak TLS" in error.detail
    assert "http://" in error.remedy


def test_http_to_a_port_of_tls(secure: str) -> None:
    """It is found out and said at once, though such a port only hangs up."""
    error = joining(secure.replace("https:", "http:"))
    assert type(error) is CannotConnect
    assert "speaks TLS" in error.detail
    assert "https://" in error.remedy


# -- names, paths, descriptors ---------------------------------------------------------------------------------------


def test_a_host_that_is_not_known() -> None:
    """A name that leads nowhere is refused at once; one that did before is waited for: its container may restart."""

    def unknown(*_: object, **__: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", unknown)
        error = joining("http://no-such-host.invalid:7171", transport=httpx.HTTPTransport())
    assert type(error) is CannotConnect
    assert "name of its host is not known" in error.detail
    for reached in (False, True):
        cause = cause_of(socket.gaierror(socket.EAI_NONAME, "unknown"), reached=reached)
        assert cause is not None
        assert cause.heals is reached
    again = cause_of(socket.gaierror(socket.EAI_AGAIN, "Temporary failure"))
    assert again is not None
    assert again.heals


@pytest.mark.promise("What waiting cannot heal is raised at once, and the cause is named.", area="client errors")
def test_a_path_that_is_wrong(server: RunningServer) -> None:
    """It is no session that is unknown, but the URL: said at once, to optimizers and to the command line."""
    error = joining(f"{server.url}/training")
    assert type(error) is NoSuchRoute
    assert "path of the URL" in error.remedy
    done = command("sessions", "ls", env={"FARSTEP_SERVER": f"{server.url}/training"}, loaded=True)
    assert (done.returncode, "error no_such_route" in done.stderr) == (1, True)


@pytest.mark.promise("What waiting cannot heal is raised at once, and the cause is named.", area="client errors")
def test_a_process_without_descriptors(server: RunningServer) -> None:
    """It is this process that has too many files open, which is said at once."""
    script = f"""
import os, resource
from farstep.conversation import Conversation
from farstep.errors import CannotConnect
talk = Conversation({server.url!r}, None)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
try:
    talk.control("GET", "/v1/info")
except CannotConnect as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "too many files and connections open" in done.stdout, done.stderr
    assert "ulimit -n" in done.stdout


# -- what stands in front of a server --------------------------------------------------------------------------------


@pytest.fixture
def liar(server: RunningServer) -> Iterator[Liar]:
    with hostile(server.port) as front:
        yield front


@pytest.mark.parametrize(
    ("status", "page", "kind", "words"),
    [
        ("400 Bad Request", "The plain HTTP request was sent to HTTPS port", CannotConnect, "https://"),
        ("401 Unauthorized", "who?", Unauthorized, "token=..."),
        ("403 Forbidden", "no", InvalidAnswer, "it said 403"),
        ("404 Not Found", "nothing here", InvalidAnswer, "its path included"),
        ("407 Proxy Authentication Required", "who?", CannotConnect, "proxy=httpx.Proxy"),
        ("413 Content Too Large", "<html>nginx</html>", LimitExceeded, "client_max_body_size"),
    ],
)
def test_what_a_proxy_says_is_told(liar: Liar, status: str, page: str, kind: type[FarstepError], words: str) -> None:
    """Each of these means something else, cannot heal, and is said at once."""
    liar.answer("POST", "/v1/sessions", http(page.encode(), status=status, kind="text/html"))
    error = joining(liar.url)
    assert (type(error), error.side, words in str(error)) == (kind, "client", True), error
    assert liar.told == 1


def test_a_large_push_through_a_small_proxy(liar: Liar) -> None:
    """A proxy's 413 names the setting, and the size that it has to take; the model stays, and the step counts once."""
    twins = twins_at(liar.url)
    twins.give(drawn(1, [(3, 4), (5,)]))
    liar.answer("POST", "/push", http(b"<html>nginx</html>", status="413 Request Entity Too Large", kind="text/html"))
    with pytest.raises(LimitExceeded, match=r"a body of 68 bytes.*client_max_body_size"):
        twins.ours.step()
    liar.honest()
    twins.ours.step()
    twins.theirs.step()
    twins.check()


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"])
def test_a_proxy_without_its_server_is_waited_for(liar: Liar, status: str) -> None:
    """It is tried again, and if the time is up the proxy is named."""
    liar.answer("POST", "/v1/sessions", http(b"<html>sorry</html>", status=status, kind="text/html"))
    with pytest.raises(Unavailable, match=rf"a proxy answered {status[:3]} in the server's place"):
        Adagrad(parameters(drawn(0)), server=liar.url, timeout_s=SHORT_S)
    assert liar.told > 1


def test_a_server_that_is_full_is_heard(liar: Liar) -> None:
    """What it says is told in its own words and code, and not as if there had been no answer."""
    problem = b'{"code": "busy", "detail": "Sessions take 60 of 64 MB.", "side": "server", "remedy": "Remove one."}'
    liar.answer("POST", "/v1/sessions", http(problem, status="503 Busy", kind="application/problem+json"))
    with pytest.raises(Busy, match=r"was not ready within .* Sessions take 60 of 64 MB\. Remove one\.") as full:
        Adagrad(parameters(drawn(0)), server=liar.url, timeout_s=SHORT_S)
    assert "no answer" not in str(full.value)


# -- Retry-After -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "9" * 300}, 86_400.0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "1e3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 99 Oct 2015 07:28:00 GMT"}, None),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], seconds: float | None) -> None:
    """As seconds and as a date, which is compared with the answer's own; nonsense is none."""
    assert retry_after_s(headers) == seconds


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_a_server_that_asks_to_wait_is_not_asked_before(liar: Liar, status: str) -> None:
    """Within the patience nothing is sent before the time it asks for, and once when the patience ends."""
    liar.answer("POST", "/v1/sessions", http(b"", status=status, extra="Retry-After: 300\r\n"))
    with pytest.raises(Unavailable, match="a proxy"):
        Adagrad(parameters(drawn(0)), server=liar.url, timeout_s=SHORT_S)
    assert liar.told == 2


# -- credentials -----------------------------------------------------------------------------------------------------

SECRETS = ("jane", "s3cr3t")


@pytest.mark.parametrize(
    "url", ["http://jane:s3cr3t@box:7171", "https://s3cr3t@box", "http://box:7171?token=s3cr3t", "http://box/#s3cr3t"]
)
def test_credentials_in_a_url_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every way in, before anything is sent, and without showing them."""
    ways: list[Callable[[], object]] = [
        lambda: Adagrad(parameters(drawn(0)), server=url),
        lambda: Conversation(url, None),
        lambda: farstep.export_session("a", "b", server=url),
        lambda: farstep.import_session("a", server=url),
    ]
    monkeypatch.setenv("FARSTEP_SERVER", url)
    ways.append(lambda: Adagrad(parameters(drawn(0))))
    for way in ways:
        with pytest.raises(InvalidOption) as refused:
            way()
        said = f"{refused.value!s} {refused.value!r} {refused.value.to_problem()}"
        assert not any(secret in said for secret in SECRETS)


@pytest.mark.parametrize("verb", [["status"], ["healthcheck"], ["sessions", "ls"], ["sessions", "rm", "x", "--yes"]])
def test_no_verb_shows_the_credentials_of_a_url(verb: list[str]) -> None:
    """They are refused, and are in nothing that is printed."""
    for url in ("http://jane:s3cr3t@127.0.0.1:9", "http://jane:s3cr3t@[::1"):
        done = command(*verb, env={"FARSTEP_SERVER": url}, loaded=True)
        assert done.returncode in (1, 2)
        assert not any(secret in done.stdout + done.stderr for secret in SECRETS)


def test_a_token_that_no_header_can_hold_is_refused() -> None:
    """It is not tried for a minute, and is not shown."""
    with pytest.raises(InvalidOption, match="token") as refused:
        Adagrad(parameters(drawn(0)), server="http://box", token="s3cr3t\r\nx: y")
    assert "s3cr3t" not in str(refused.value)


def test_a_url_for_people_has_no_secrets() -> None:
    """User, password, query, fragment and control characters are left out."""
    assert without_secrets("https://jane:s3cr3t@box:1/path?x=1#y") == "https://box:1/path"
    assert without_secrets("http://jane:s3cr3t@[::1") == "[::1"
    assert without_secrets("http://box\x1b[2J/") == "http://box[2J/"


@pytest.mark.parametrize("transport", [SocketTransport, httpx.HTTPTransport])
def test_every_request_says_whom_it_is_for(
    liar: Liar, transport: type[httpx.BaseTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One Host, and no coding asked for, over any transport; a proxy of the environment gets nothing."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    twins = twins_at(liar.url, transport=transport())
    twins.step(drawn(1, [(3, 4), (5,)]))
    twins.ours.pull()
    twins.ours.heartbeat()
    twins.check()
    twins.ours.close()
    assert {each.partition(" ")[0] for each in liar.asked} == {"POST", "PUT", "GET", "DELETE"}
    for head in liar.heads:
        lines = head.lower().split("\r\n")
        assert [each for each in lines if each.startswith("host:")] == [f"host: {liar.url[len('http://') :]}"]
        assert [each for each in lines if each.startswith("accept-encoding:")] == ["accept-encoding: identity"]
