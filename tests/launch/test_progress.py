"""The line of progress, in words."""

from farstep_service.launch.progress import line
from farstep_service.launch.restart_policy import RestartPolicy


def test_the_line_says_where_session_and_workers_are():
    """Version, speed, and where each worker is: in the session, at the barrier, outside, done, failed, silent."""
    policy = RestartPolicy(["w0", "w1", "w2", "w3", "w4", "w5"], 1)
    policy.ended("w2", -9)
    policy.ended("w3", 0)
    policy.ended("w4", 2)
    policy.ended("w4", 2)
    workers = {
        "w0": {"waiting": False, "live": True},
        "w1": {"waiting": True, "live": True},
        "w5": {"waiting": False, "live": False},
    }
    page = {"version": 1204, "workers": workers}
    assert line("digits", page, 41.26, policy) == (
        "digits  version 1,204  41.3/s  |  w0 trains  w1 waits at the barrier  w2 outside, 1 restart  w3 done  "
        "w4 failed (2)  w5 was not heard of for its lease"
    )


def test_before_the_session_is_there():
    """Until a worker has created the session there is no version."""
    assert line("digits", None, 0.0, RestartPolicy(["w0"], 0)) == "digits  not there yet  |  w0 outside"
