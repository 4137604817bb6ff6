"""The names that a server answers to: no web page can have a browser use one that needs no token."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from farstep.errors import HostNotAllowed, InvalidOption, InvalidRequest, OriginNotAllowed
from farstep_service.routes.auth import AllowedHosts
from farstep_service.settings import Settings
from tests.support.service.answers import Answer, opened, read_answer
from tests.support.service.raw import RawClient
from tests.support.service.servers import TOKEN, RunningServer, farstep, running_server

LOOPBACK = AllowedHosts("127.0.0.1")
EVERYWHERE = AllowedHosts("0.0.0.0")
NAMED = AllowedHosts("10.1.2.3", ["box", "*.lab.example", "192.0.2.7"])
GUARDED = AllowedHosts("0.0.0.0", guarded=True)
GUARDED_NAMED = AllowedHosts("::", ["box"], guarded=True)
ANY = AllowedHosts("127.0.0.1", ["*"])


def check(allowed: AllowedHosts, *hosts: str, origins: tuple[str, ...] = (), version: str = "1.1", unix: bool = False):
    allowed.check(
        version=version,
        hosts=[each.encode("latin-1") for each in hosts],
        origins=[each.encode("latin-1") for each in origins],
        unix=unix,
    )


LOOPBACK_NAMES = """localhost LocalHost localhost. localhost:7171 localhost: 127.0.0.1 127.0.0.1:80 127.8.8.8
[::1] [::1]:7171 [0:0::0:1] [::ffff:127.0.0.1]:7171"""
NO_NAMES = "", " ", "a b", "u@a", "a:x", "a:999999", "[::1", "::1", "[localhost]", "[]", "a/", "a,b", "\xfcber"


@pytest.mark.parametrize("host", LOOPBACK_NAMES.split())
@pytest.mark.parametrize("allowed", [LOOPBACK, EVERYWHERE, NAMED, GUARDED, GUARDED_NAMED, ANY])
def test_loopback_names_always_pass(allowed: AllowedHosts, host: str) -> None:
    """Whatever its port, case and spelling, what can only be this machine is answered to."""
    check(allowed, host)
    check(allowed, host, version="1.0")


@pytest.mark.parametrize(
    ("allowed", "passing", "refused"),
    [
        (
            LOOPBACK,
            [],
            ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.1.2.3", "0.0.0.0", "box"],
        ),
        (LOOPBACK, [], ["evil.localhost", "127.1", "2130706433", "0x7f000001", "[::2]", "localhost..", "-", "_"]),
        (EVERYWHERE, ["10.1.2.3:7171", "[fe80::1%25eth0]", "0.0.0.0", "[2001:db8::1]:1"], ["evil.example", "1.2.3"]),
        (NAMED, ["10.1.2.3", "BOX.:7171", "a.lab.example", "b.a.lab.example", "192.0.2.7"], ["lab.example", "xbox"]),
        (NAMED, [], ["10.1.2.4", "a.lab.example.evil", "evillab.example"]),
        (GUARDED, ["evil.example", "10.1.2.3", "server:7171"], []),
        (GUARDED_NAMED, ["box", "10.1.2.3"], ["server", "evil.example"]),
        (ANY, ["evil.example", "10.1.2.3"], []),
    ],
)
def test_which_names_pass(allowed: AllowedHosts, passing: list[str], refused: list[str]) -> None:
    """Its own address, allowed names and those below `*.`, any address on 0.0.0.0, any name with a token; no others."""
    for host in passing:
        check(allowed, host)
    for host in refused:
        with pytest.raises(HostNotAllowed) as caught:
            check(allowed, host)
        assert caught.value.field == "host"
        assert "--allowed-hosts" in caught.value.remedy


@pytest.mark.parametrize("hosts", [(), ("a", "a"), ("localhost", "evil"), *((each,) for each in NO_NAMES)])
@pytest.mark.parametrize("allowed", [LOOPBACK, GUARDED, ANY])
def test_a_request_names_one_host(allowed: AllowedHosts, hosts: tuple[str, ...]) -> None:
    """No Host in HTTP/1.1, two, and what no host can be called are refused by every server, at every socket."""
    for unix in (False, True):
        with pytest.raises(InvalidRequest) as caught:
            check(allowed, *hosts, unix=unix)
        assert caught.value.status == 400


def test_http_1_0_needs_no_host() -> None:
    """A client of 1996 names none, and no browser is one."""
    check(LOOPBACK, version="1.0")
    with pytest.raises(HostNotAllowed):
        check(LOOPBACK, "evil.example", version="1.0")
    with pytest.raises(InvalidRequest):
        check(LOOPBACK, origins=("http://evil.example",), version="1.0")


def test_over_a_unix_socket_any_name_passes() -> None:
    """No name was looked up to get there; a page that a proxy lets through is refused all the same."""
    check(LOOPBACK, "whatever", unix=True)
    with pytest.raises(OriginNotAllowed):
        check(LOOPBACK, "whatever", origins=("http://evil.example",), unix=True)


@pytest.mark.promise("No web page can have a browser change sessions.", area="security")
@pytest.mark.parametrize(
    ("allowed", "host", "passing", "refused"),
    [
        (LOOPBACK, "127.0.0.1:7171", ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:1"], ["http://box"]),
        (LOOPBACK, "localhost", [], ["null", "", "http://", "file://", "http://evil.example", "http://localhost@evil"]),
        (LOOPBACK, "localhost", [], ["chrome-extension://localhost", "localhost", "http://10.1.2.3", "http://a b"]),
        (EVERYWHERE, "10.1.2.3", ["http://10.1.2.3:8000"], ["http://203.0.113.9"]),
        (NAMED, "box", ["https://box", "https://a.lab.example", "http://10.1.2.3"], ["https://evil.example"]),
        (GUARDED, "server:7171", ["http://server:7171", "https://server"], ["http://evil.example"]),
        (ANY, "server", ["http://evil.example", "null"], []),
    ],
)
def test_which_pages_pass(allowed: AllowedHosts, host: str, passing: list[str], refused: list[str]) -> None:
    """The page's own server is the one it asks, one on this machine, or an allowed one."""
    for origin in passing:
        check(allowed, host, origins=(origin,))
    for origin in refused:
        with pytest.raises(OriginNotAllowed):
            check(allowed, host, origins=(origin,))
    with pytest.raises(OriginNotAllowed):
        check(LOOPBACK, "localhost", origins=("http://localhost", "http://localhost"))


@pytest.mark.parametrize("name", ["", "http://box", "box:7171", "a b", "*.", "**", "a.*", "[::1]", "-", "bücher.de"])
def test_what_no_host_is_called_is_refused_at_the_start(name: str) -> None:
    """A name with a scheme, a port, a path or an asterisk in its middle would never match."""
    with pytest.raises(InvalidOption) as caught:
        Settings(allowed_hosts=("box", name))
    assert caught.value.field == "allowed_hosts"


# -- a real server


def ask(
    server: RunningServer, *lines: str, target: str = "/healthz", method: str = "GET", version: str = "1.1"
) -> Answer:
    """Return the answer to a head of these lines; nothing follows it."""
    with opened(server.url) as sock:
        sock.sendall("\r\n".join([f"{method} {target} HTTP/{version}", *lines, "", ""]).encode())
        return read_answer(sock)


@pytest.mark.promise("No web page can have a browser change sessions.", area="security")
@pytest.mark.parametrize("target", ["/healthz", "/v1/info", "/v1/sessions", "/docs", "/openapi.json", "/nowhere"])
def test_a_rebound_name_reaches_no_route(server: RunningServer, target: str) -> None:
    """Every path of a server without a token, health included, is refused under a foreign name, with the remedy."""
    answer = ask(
        server, f"Host: evil.example:{server.port}", f"Origin: http://evil.example:{server.port}", target=target
    )
    assert (answer.status, answer.code, answer.document["field"]) == (421, "host_not_allowed", "host")
    assert "--allowed-hosts evil.example" in answer.document["remedy"]
    for more in ("X-Forwarded-Host: localhost", "Forwarded: host=localhost", "X-Host: localhost"):
        assert ask(server, "Host: evil.example", more, target=target).status == 421
    assert ask(server, f"Host: localhost:{server.port}", "X-Forwarded-Host: evil.example", target=target).status != 421


def test_the_answer_comes_before_the_body(server: RunningServer) -> None:
    """A foreign page that sends a body is refused on its head; nothing is created."""
    lines = ("Content-Type: text/plain", f"Content-Length: {2**40}")
    assert ask(server, "Host: evil.example", *lines, method="POST", target="/v1/sessions").code == "host_not_allowed"
    page = ask(server, "Host: localhost", "Origin: http://evil.example", *lines, method="POST", target="/v1/sessions")
    assert (page.status, page.code) == (403, "origin_not_allowed")


def test_a_target_that_names_a_host_counts(server: RunningServer) -> None:
    """`GET http://evil/` is a question to evil, whatever the header says, and one to localhost is answered."""
    assert ask(server, "Host: localhost", target="http://evil.example/healthz").code == "host_not_allowed"
    assert ask(server, "Host: evil.example", target="http://localhost/healthz").status == 200


def test_hosts_are_counted(server: RunningServer) -> None:
    """HTTP/1.1 without a Host, or with two, is a bad request; HTTP/1.0 may go without."""
    assert ask(server).code == "invalid_request"
    assert ask(server, "Host: localhost", "Host: localhost").code == "invalid_request"
    assert ask(server, version="1.0").document == {"status": "ok"}


@pytest.fixture(scope="module")
def named() -> Iterator[RunningServer]:
    options = ("--host", "0.0.0.0", "--insecure-no-auth", "--allowed-hosts", "box,*.lab", "--allowed-hosts", "Server")
    with running_server(*options) as running:
        yield running


def test_names_that_are_allowed(named: RunningServer) -> None:
    """Without a token on 0.0.0.0: any address, the names given with commas or one by one, and no other."""
    for host in ("box:7171", "a.lab", "server", "192.0.2.1", "[2001:db8::1]:7171", "localhost"):
        assert ask(named, f"Host: {host}").status == 200, host
    for host in ("evil.example", "lab", "servers"):
        assert ask(named, f"Host: {host}").code == "host_not_allowed", host


def test_the_variable_holds_several() -> None:
    """`FARSTEP_SERVE_ALLOWED_HOSTS` takes names with commas, with blanks, or both."""
    with running_server(token=TOKEN, env={"FARSTEP_SERVE_ALLOWED_HOSTS": "box, server other"}) as server:
        for host in ("box", "server", "other"):
            assert ask(server, f"Host: {host}").status == 200
        assert ask(server, "Host: evil").code == "host_not_allowed"
        assert ask(server, "Host: evil", target="/v1/info").code == "unauthorized"


def test_with_a_token_any_name_will_do() -> None:
    """Service names of compose and Kubernetes need no option beside the token."""
    with running_server("--host", "0.0.0.0", token=TOKEN) as server:
        assert ask(server, "Host: server:7171", f"Authorization: Bearer {TOKEN}", target="/v1/info").status == 200
        page = ask(server, "Host: server", "Origin: http://evil", f"Authorization: Bearer {TOKEN}", target="/v1/info")
        assert page.code == "origin_not_allowed"


def test_a_socket_is_asked_by_any_name() -> None:
    """curl, httpx and farstep's own verbs ask a unix socket by whatever name their URL has."""
    with tempfile.TemporaryDirectory() as directory, running_server("--unix", f"{directory}/s", "--no-tcp") as server:
        assert farstep("status", "--json", "--server", server.unix, loaded=True).returncode == 0
        assert farstep("healthcheck", "--server", server.unix, loaded=True).returncode == 0
        if os.access("/usr/bin/curl", os.X_OK):
            asked = ("curl", "-sS", "--unix-socket", f"{directory}/s", "http://anything/healthz")
            assert subprocess.run(asked, capture_output=True, check=True).stdout == b'{"status":"ok"}'


def test_a_name_that_is_not_allowed_is_an_error_of_its_own(server: RunningServer) -> None:
    """A client that meets it does not try again, and the command line exits with 2 and the remedy."""
    url = f"http://0.0.0.0:{server.port}"
    done = farstep("status", "--server", url, loaded=True)
    assert done.returncode == 2
    assert "error host_not_allowed: This server does not answer to the name '0.0.0.0'." in done.stderr
    assert "--allowed-hosts 0.0.0.0" in done.stderr
    with RawClient(url) as raw:
        assert raw.request("GET", "/healthz").status == 421
