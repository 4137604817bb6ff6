"""What a step will cost on this link and this server, measured with real steps before a training is committed to it."""

from farstep_service.bench.expectation import SHARE, Expectation
from farstep_service.bench.run import Asked, run
from farstep_service.bench.steps import PARTS
from farstep_service.bench.workload import Workload, count_of, read_shapes

__all__ = ["PARTS", "SHARE", "Asked", "Expectation", "Workload", "count_of", "read_shapes", "run"]
