"""Variables that are misspelt: what somebody asked for is not passed over in silence."""

from __future__ import annotations

import warnings

import pytest

from farstep.settings import resolve
from farstep.variables import KNOWN, unknown
from tests.support.service.servers import farstep

KUBERNETES = {
    "FARSTEP_PORT": "tcp://10.0.0.1:7171",
    "FARSTEP_PORT_7171_TCP": "tcp://10.0.0.1:7171",
    "FARSTEP_PORT_7171_TCP_ADDR": "10.0.0.1",
    "FARSTEP_SERVICE_HOST": "10.0.0.1",
    "FARSTEP_SERVICE_PORT": "7171",
    "FARSTEP_SERVICE_PORT_HTTP": "7171",
    "FARSTEP_SERVER_SERVICE_HOST": "10.0.0.1",
    "FARSTEP_SERVER_PORT": "tcp://10.0.0.1:7171",
}


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("FARSTEP_SESION", "FARSTEP_SESSION"),
        ("FARSTEP_SERVERS", "FARSTEP_SERVER"),
        ("FARSTEP_TOKENS", "FARSTEP_TOKEN"),
        ("FARSTEP_WROKER", "FARSTEP_WORKER"),
        ("FARSTEP_KERNELCACHE", "FARSTEP_KERNEL_CACHE"),
    ],
)
def test_an_optimizer_warns_of_a_misspelt_variable(name: str, near: str) -> None:
    """The variable that was probably meant is named where an optimizer reads its own."""
    with pytest.warns(UserWarning, match=f"{name} is not read; did you mean {near}?"):
        resolve({}, {name: "x"})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("FARSTEP_KERNEL", "kernel"),
        ("FARSTEP_TIMEOUT_S", "timeout_s"),
        ("FARSTEP_URL", "server"),
        ("FARSTEP_DURABILITY", "durability"),
    ],
)
def test_an_argument_that_is_no_variable_is_named(name: str, argument: str) -> None:
    """A variable that would be read if there were one leads to the argument that does what it seems to ask for."""
    with pytest.warns(UserWarning, match=f"{name} is not read; give the argument {argument}= in the script"):
        resolve({}, {name: "x"})


def test_names_that_are_not_ours_are_left_alone() -> None:
    """Programs have names of their own, Kubernetes and compose files theirs, and what is known is what it is."""
    others = {"FARSTEP_DATA": "x", "FARSTEP_EXPERIMENT_NAME": "x", "FARSTEP_HTTP_PORT": "7171", "OTHER_SESION": "x"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve({}, {**others, **KUBERNETES, "FARSTEP_SESSION": "s", "FARSTEP_SERVE_PROT": "1"})
    assert list(unknown(KUBERNETES, "FARSTEP_", KNOWN)) == []


@pytest.mark.parametrize("verb", ["serve", "launch"])
def test_a_server_refuses_a_misspelt_variable(verb: str) -> None:
    """`FARSTEP_SERVE_PROT` ends the start with 2 and the variable that was meant, also of a launch's own server."""
    arguments = [verb, __file__] if verb == "launch" else [verb, "--port", "0"]
    done = farstep(*arguments, env={"FARSTEP_SERVE_PROT": "7172"})
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error invalid_option: There is no variable FARSTEP_SERVE_PROT: no option of serve has that name.",
        "  Did you mean FARSTEP_SERVE_PORT?",
    ]


def test_a_server_names_no_nearest_where_there_is_none() -> None:
    """A variable of its room that is like no option is refused, too, and the list of options is named."""
    done = farstep("serve", env={"FARSTEP_SERVE_TLS_CERTIFICATE": "x"})
    assert done.returncode == 2
    assert "farstep serve --help" in done.stderr


def test_a_server_warns_of_other_misspelt_variables() -> None:
    """`FARSTEP_TOKENS` is no variable of serve, but nearly one that it reads; Kubernetes' own are passed over."""
    done = farstep("serve", "--port", "0", "--device", "none", env={"FARSTEP_TOKENS": "x", **KUBERNETES})
    assert (
        done.stderr.splitlines()[0] == "warning: the variable FARSTEP_TOKENS is not read; did you mean FARSTEP_TOKEN?"
    )
    assert "FARSTEP_SERVICE" not in done.stderr
