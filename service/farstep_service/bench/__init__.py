"""Measure what a step costs on this link and this server, with real steps, before a training is committed to it."""

from farstep_service.bench.expectation import STEP_SHARE, Expectation
from farstep_service.bench.run import BenchOptions, run
from farstep_service.bench.steps import PARTS
from farstep_service.bench.workload import Workload, count_of, read_shapes

__all__ = ["PARTS", "STEP_SHARE", "BenchOptions", "Expectation", "Workload", "count_of", "read_shapes", "run"]
