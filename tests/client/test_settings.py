"""Where a worker's optimizer lives: arguments, environment, defaults."""

from __future__ import annotations

import pytest

from farstep.errors import InvalidOption
from farstep.identity import NAME
from farstep.protocol.consistency import Async, Consistency, Sync
from farstep.protocol.unix import MAX_PATH_BYTES
from farstep.settings import RemoteOptions, resolve


def test_nothing_said_means_embedded_private_and_async() -> None:
    """Without arguments and variables the optimizer is embedded, in a session of its own."""
    place = resolve({}, {})
    assert place.server is None
    assert place.private
    assert NAME.fullmatch(place.session)
    assert NAME.fullmatch(place.worker)
    assert place.consistency == Async()
    assert place.nonfinite == "allow"
    assert resolve({}, {}).session != place.session
    assert resolve({}, {}).worker != place.worker


def test_the_environment_fills_in_what_is_not_said() -> None:
    """FARSTEP_* variables are defaults, and a server refuses non-finite gradients by default."""
    environment = {
        "FARSTEP_SERVER": "http://box:7171/",
        "FARSTEP_SESSION": "digits",
        "FARSTEP_WORKER": "w0",
        "FARSTEP_TOKEN": "s" * 32,
    }
    place = resolve({}, environment)
    assert (place.server, place.session, place.worker, place.token) == ("http://box:7171", "digits", "w0", "s" * 32)
    assert not place.private
    assert place.nonfinite == "refuse"


def test_arguments_win_over_the_environment() -> None:
    """An argument hides the variable of the same meaning."""
    said = RemoteOptions(server="https://other", session="s", worker="w1", consistency=Sync(workers=2))
    place = resolve(said, {"FARSTEP_SERVER": "http://box", "FARSTEP_WORKER": "w0"})
    assert (place.server, place.worker, place.consistency) == ("https://other", "w1", Sync(workers=2))


def test_a_server_may_be_a_path() -> None:
    """A unix URL holds an absolute path, taken as it is."""
    assert resolve({"server": "unix:///run/a b%20c/server.sock"}, {}).server == "unix:///run/a b%20c/server.sock"
    longest = "unix:///" + "a" * (MAX_PATH_BYTES - 1)
    assert resolve({}, {"FARSTEP_SERVER": longest}).server == longest


def test_a_token_does_not_appear_in_a_repr() -> None:
    """What is printed or logged about a place holds no secret."""
    assert "secret" not in repr(resolve(RemoteOptions(token="secret-secret-secret"), {}))


@pytest.mark.parametrize(
    "options",
    [
        {"server": "box:7171"},
        {"server": "ftp://box"},
        {"server": "http://[::1"},
        {"server": "http://box:99999"},
        {"server": "unix://relative/path"},
        {"server": "unix://"},
        {"server": "unix:///run/"},
        {"server": "unix:///" + "a" * 107},
        {"session": "../etc"},
        {"session": "a" * 64},
        {"worker": "w 0"},
        {"kernel": "fastest"},
        {"nonfinite": "ignore"},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
    ],
)
def test_a_bad_option_is_refused_by_name(options: RemoteOptions) -> None:
    """The error names the option to blame."""
    with pytest.raises(InvalidOption) as refused:
        resolve(options, {})
    assert refused.value.field in options


@pytest.mark.parametrize(
    ("mode", "waits"),
    [
        (Sync(workers=2), True),
        (Sync(workers=3, quorum=2), True),
        (Sync(workers=3, quorum=1), False),
        (Sync(workers=1), False),
        (Sync(workers="live"), False),
        (Async(), False),
    ],
    ids=repr,
)
def test_a_session_of_ones_own_does_not_wait_for_others(mode: Consistency, waits: bool) -> None:
    """Without a name on a server nobody else can join: a mode that needs others is refused at once, and told why."""
    place = RemoteOptions(server="http://box", consistency=mode)
    if waits:
        with pytest.raises(InvalidOption, match=r"this optimizer's alone.*waits for 2 workers.*FARSTEP_SESSION"):
            resolve(place, {})
    else:
        assert resolve(place, {}).consistency == mode
    assert resolve({**place, "session": "digits"}, {}).consistency == mode


def test_an_unknown_option_is_a_type_error_as_for_any_function() -> None:
    """A misspelt keyword is not swallowed."""
    with pytest.raises(TypeError, match="servr"):
        resolve({"servr": "http://box"}, {})  # type: ignore[typeddict-unknown-key]
