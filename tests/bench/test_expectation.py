"""What is concluded from steps: their parts, which add up, and what other sizes will take."""

from __future__ import annotations

import pytest

from farstep.protocol.receipt import StepReport
from farstep_service.bench.expectation import CostModel, Expectation
from farstep_service.bench.steps import PARTS, Sample, Steps
from farstep_service.bench.workload import Workload
from farstep_service.cli.bench import ms

TIMES = {
    "total": 0.9,
    "receive": 0.3,
    "queue": 0.01,
    "check": 0.02,
    "barrier": 0.005,
    "kernel": 0.1,
    "send": 0.2,
    "copy": 0.07,
}


def steps(seconds: list[float], parameters: int = 1_000_000) -> Steps:
    work = Workload.of("Adagrad", "float32", parameters, 1)
    report = StepReport(version=1, kernel="fused", bytes_sent=work.nbytes, bytes_received=work.nbytes, seconds=TIMES)
    return Steps(work, [Sample.of(each, report) for each in seconds], report)


def test_the_parts_of_a_step_add_up_to_it() -> None:
    """What the report does not explain is the last part: the way there and back, and the server's bookkeeping."""
    parts = Sample.of(1.0, StepReport(version=1, seconds=TIMES)).parts_s
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(1.0)
    assert parts["client"] == pytest.approx(0.1)
    assert parts["other"] == pytest.approx(1.0 - 0.1 - 0.3 - 0.01 - 0.02 - 0.1 - 0.2 - 0.07)


def test_an_embedded_step_is_update_and_bookkeeping() -> None:
    """Where nothing travels, nothing is left over."""
    parts = Sample.of(1.0, StepReport(version=1, seconds={"total": 0.75, "kernel": 0.75})).parts_s
    assert (parts["update"], parts["client"], parts["other"]) == (0.75, 0.25, 0.0)


def test_odd_steps_do_not_count_in_the_usual_one() -> None:
    """The usual step is the mean of the middle half, and its parts add up to it."""
    typical = steps([1.0, 2.0, 1.1, 1.2, 1.3, 100.0, 1.4, 0.001]).typical()
    assert typical.total_s == pytest.approx((1.1 + 1.2 + 1.3 + 1.4) / 4)
    assert sum(typical.parts_s.values()) == pytest.approx(typical.total_s)


def test_the_median_and_nine_of_ten() -> None:
    """The 90th percentile lies between the steps around it."""
    found = steps([1.0 + each for each in range(11)])
    assert (found.median_s, found.p90_s) == (6.0, 10.0)


def test_costs_on_one_line_are_that_line() -> None:
    """Fixed cost and cost of a byte are found again, between the sizes and beyond them."""
    costs = CostModel([(nbytes, 2.0 + 3.0 * nbytes) for nbytes in (4, 10, 100)])
    assert (costs.fixed_s, costs.per_byte_s) == pytest.approx((2.0, 3.0))
    for nbytes in (0, 2, 4, 7, 10, 50, 100, 1000):
        assert costs.at(nbytes) == pytest.approx(2.0 + 3.0 * nbytes)


def test_large_sizes_follow_the_largest_ones() -> None:
    """Where bytes become dearer, as beyond a cache, the last slope goes on, and sizes that were measured are met."""
    costs = CostModel([(10, 1.0), (20, 2.0), (40, 10.0)])
    assert [costs.at(nbytes) for nbytes in (10, 20, 30, 40, 50)] == pytest.approx([1.0, 2.0, 6.0, 10.0, 14.0])


def test_no_byte_and_no_step_costs_less_than_nothing() -> None:
    """Noise that makes a larger size cheaper gives no slope below 0, and no fixed cost below 0."""
    assert CostModel([(10, 2.0), (20, 1.0)]).per_byte_s == 0
    assert CostModel([(10, 2.0), (20, 1.0)]).fixed_s == 2.0
    assert CostModel([(10, 1.0), (20, 5.0)]).fixed_s == 0
    assert CostModel([(10, 1.0), (20, 5.0)]).at(5) == pytest.approx(0.5)


def test_break_even_is_ten_times_the_step() -> None:
    """A step is a tenth of a backward pass that takes ten times as long."""
    small, large = steps([0.5] * 5, 250_000), steps([1.0] * 5)
    found = Expectation("http://box", "cpu", None, large, [small, large])
    assert found.backward_s == pytest.approx(10.0)
    assert found.bytes_per_s("up") == pytest.approx(4e6 / 0.3)
    assert dict(found.estimates())[10**6] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00012, "0.12 ms"),
        (0.0123, "12.3 ms"),
        (0.1234, "123 ms"),
        (2.5, "2,500 ms"),
        (12.34, "12.3 s"),
        (1234.0, "1,234 s"),
    ],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    """Seconds are written as milliseconds, and from ten on as seconds."""
    assert ms(seconds) == text
