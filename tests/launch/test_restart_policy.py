"""Restarts, their limit, signals, and the exit code of a run."""

import signal

from hypothesis import given
from hypothesis import strategies as st

from farstep_service.launch.restart_policy import Restart, RestartPolicy, Stop, exit_code, in_words

TERM = Stop(signal.SIGTERM)


def test_all_that_finish_make_a_run_that_went_well():
    """Nothing follows on the end of a worker that finished, and the run is over after the last one."""
    policy = RestartPolicy(["w0", "w1"], 3)
    assert policy.ended("w1", 0) is None
    assert not policy.over
    assert policy.ended("w0", 0) is None
    assert (policy.over, policy.failure, policy.codes) == (True, 0, {"w1": 0, "w0": 0})


def test_the_dead_are_started_again_up_to_the_limit():
    """Each worker has its own count; the first to reach the limit ends the run, with its exit code."""
    policy = RestartPolicy(["w0", "w1", "w2"], 2)
    assert policy.ended("w0", -signal.SIGKILL) == Restart("w0", 1)
    assert policy.ended("w1", 5) == Restart("w1", 1)
    assert policy.ended("w0", 1) == Restart("w0", 2)
    assert policy.ended("w2", 0) is None
    assert policy.ended("w0", -signal.SIGKILL) == TERM
    assert policy.running == {"w1"}
    assert policy.ended("w1", 7) is None
    assert (policy.over, policy.failure, policy.codes["w1"]) == (True, 137, 7)


def test_without_restarts_the_first_failure_ends_the_run():
    """With a limit of 0 no worker is restarted."""
    policy = RestartPolicy(["w0", "w1"], 0)
    assert policy.ended("w0", 3) == TERM
    assert policy.ended("w1", -signal.SIGTERM) is None
    assert policy.failure == 3


def test_a_signal_is_handed_on_and_the_next_one_kills():
    """After a signal no worker is restarted, and the run's exit code is the signal's, however the workers end."""
    policy = RestartPolicy(["w0", "w1"], 3)
    assert policy.signalled(signal.SIGINT) == Stop(signal.SIGINT)
    assert policy.ended("w0", 1) is None
    assert policy.signalled(signal.SIGINT) == Stop(signal.SIGKILL)
    assert policy.ended("w1", 0) is None
    assert (policy.over, policy.failure) == (True, 130)


def test_without_its_server_a_run_ends():
    """The end of the server ends the workers, unless they are being ended already."""
    policy = RestartPolicy(["w0"], 3)
    assert policy.server_ended() == TERM
    assert policy.ended("w0", 1) is None
    assert policy.failure == 1
    assert policy.server_ended() is None


def test_exit_codes_are_those_of_shells():
    """A signal's number is added to 128, and named in words."""
    assert [exit_code(code) for code in (0, 2, -9, -15)] == [0, 2, 137, 143]
    assert in_words(-9) == "was ended by SIGKILL"
    assert in_words(2) == "ended with exit code 2"
    assert in_words(-(signal.SIGRTMIN + 3)) == f"was ended by signal {signal.SIGRTMIN + 3}"


@given(st.integers(0, 3), st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 7, -9, -15])), max_size=40))
def test_every_run_ends_with_the_code_of_the_first_failure_for_good(limit: int, ends: list[tuple[int, int]]):
    """Whatever ends when: no worker is started more often than the limit, and the first that fails for good counts."""
    policy, names = RestartPolicy(["w0", "w1", "w2"], limit), ["w0", "w1", "w2"]
    first = 0
    for index, code in ends:
        if names[index] not in policy.running:
            continue
        decided = policy.ended(names[index], code)
        if isinstance(decided, Stop):
            assert first == 0
            first = exit_code(code)
            assert policy.restarts[names[index]] == limit
        assert (names[index] in policy.running) == isinstance(decided, Restart)
    assert policy.failure == first
    assert max(policy.restarts.values()) <= limit
    assert policy.over == (not policy.running)
