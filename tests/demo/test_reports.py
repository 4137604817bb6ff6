"""The reports of workers, the pace they show, and the result of the demo."""

import json
from dataclasses import replace

import pytest

from farstep_service.demo.reports import Pace, Report, Result

REPORT = Report(worker="worker-00", version=44, steps=528, epoch=2, loss=0.25, accuracy=0.975, kernels=("reference",))
RESULT = Result(
    accuracy_remote=0.98,
    accuracy_local=0.98,
    max_parameter_difference=0.0,
    steps=528,
    workers=2,
    steps_per_s=100.0,
    mb_per_s=60.0,
    seconds=12.0,
    optimizer="Adagrad",
    kernel="reference",
)


def test_a_report_survives_its_line():
    """What a worker prints as JSON is what the demo reads."""
    assert Report.from_line(REPORT.to_json()) == REPORT


@pytest.mark.parametrize("line", ["", "a warning", "[1]", '{"worker": "w"}', '{"kernels": [], "surprise": 1}', "null"])
def test_other_lines_are_no_reports(line: str):
    """A line that a library printed is no report."""
    assert Report.from_line(line) is None


def test_a_report_reads_as_a_line():
    """A person sees worker, epoch, version, loss and accuracy."""
    assert str(REPORT) == "worker-00  epoch  2  version   44  loss 0.2500  accuracy 97.50%"


def test_the_pace_counts_steps_once_and_bytes_of_all():
    """Two workers that take the same 100 steps in 2 s with 10 MB each make 50 steps and 10 MB a second."""
    one = replace(REPORT, counted=100, seconds=2.0, nbytes=10_000_000)
    assert Pace.of([one, replace(one, worker="worker-01", seconds=1.9)]) == Pace(50.0, 10.0)
    assert Pace.of([REPORT]) == Pace.of([]) == Pace(0.0, 0.0)


def test_the_result_is_one_json_line_with_its_figures():
    """The JSON line holds every figure and whether the targets were met."""
    document = json.loads(RESULT.to_json())
    assert document == {
        "accuracy_remote": 0.98,
        "accuracy_local": 0.98,
        "max_parameter_difference": 0.0,
        "steps": 528,
        "workers": 2,
        "steps_per_s": 100.0,
        "mb_per_s": 60.0,
        "seconds": 12.0,
        "optimizer": "Adagrad",
        "kernel": "reference",
        "ok": True,
    }


def test_a_result_of_chaos_says_what_was_survived():
    """Only a demo whose server was killed, and that met every target, says that every bit is there."""
    survived = replace(RESULT, server_kills=1)
    assert json.loads(survived.to_json()) == {**json.loads(RESULT.to_json()), "server_kills": 1, "rejoins": 0}
    assert "every bit is that of a run without the kill" in str(survived)
    assert "every bit" not in str(RESULT)
    assert "every bit" not in str(replace(survived, rejoins=1))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"accuracy_remote": 0.9}, "the remote test accuracy is 90.00%, not at least 97%"),
        ({"accuracy_local": 0.9699}, "the local test accuracy is 96.99%, not at least 97%"),
        ({"max_parameter_difference": 0.5}, "the parameters differ by 0.5, not at most 1e-06"),
        ({"max_parameter_difference": float("nan")}, "the parameters differ by nan, not at most 1e-06"),
        ({"server_kills": 0}, "the training ended before the server could be killed; take more --epochs"),
        ({"server_kills": 1, "rejoins": 2}, "workers had to join again 2 times: the session was gone"),
        ({"server_kills": 1, "max_parameter_difference": 1e-9}, "the parameters differ by 1e-09, where no bit may"),
    ],
)
def test_a_missed_target_is_named(changes: dict, complaint: str):
    """A result is not ok when a target is missed, and the summary says which."""
    missed = replace(RESULT, **changes)
    assert not missed.ok
    assert f"MISSED: {complaint}" in str(missed)
    assert "MISSED" not in str(RESULT)
