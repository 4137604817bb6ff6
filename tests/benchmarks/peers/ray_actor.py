"""A parameter server that is a Ray actor, as Ray's documentation writes it.

The actor owns the parameters and the optimizer. The worker calls it with its gradients as numpy arrays, which go
through Ray's object store in shared memory; the actor puts them in place without a copy (`torch.from_numpy`), takes a
step of `torch.optim.Adagrad(fused=True)` and returns the parameters, which the worker sees in the object store. They
are not copied into a model, which farstep does. CPU tensors, one OpenMP thread, a cluster of this machine alone.

Ray is no dependency of farstep: `pip install 'farstep[ray]'` brings it. All of it runs in processes of their own.

    python -m tests.benchmarks.peers.ray_actor
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.benchmarks.peers.torch_rpc import SIZES, Size

LIMIT_S = 300.0
"""Longest life of the worker and its cluster."""
STORE_BYTES = 2 * 10**9
"""Of the object store: gradients and parameters of several steps, until their references are gone."""


def installed() -> bool:
    """Return whether this environment has Ray."""
    return importlib.util.find_spec("ray") is not None


def measure(sizes: Sequence[Size], rounds: Sequence[int]) -> list[float]:
    """Return the median seconds from the call with the gradients to the new parameters, for each size."""
    return [median(each) for each in measure_all(sizes, rounds)]


def measure_all(sizes: Sequence[Size], rounds: Sequence[int]) -> list[list[float]]:
    """Return the seconds of every timed step, a list for each size.

    Args:
        sizes: parameters and tensors.
        rounds: timed steps of each size; a fifth as many, at least two, go before them.

    Raises:
        RuntimeError: the worker failed or took too long; the message has its last output.
    """
    surroundings = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    command = [sys.executable, "-W", "ignore", __file__, json.dumps(sizes), json.dumps(rounds)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=surroundings, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired as exc:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"the Ray actor did not finish in {LIMIT_S:.0f} s") from exc
    if process.returncode:
        raise RuntimeError(f"the Ray actor failed: {errors[-2000:]}")
    result: list[list[float]] = json.loads(output.splitlines()[-1])
    return result


class Server:
    """Own the parameters and the optimizer; Ray makes an actor of it."""

    def __init__(self, lengths: Sequence[int]) -> None:
        import torch

        torch.set_num_threads(1)
        self._parameters = [torch.nn.Parameter(torch.randn(length)) for length in lengths]
        self._optimizer = torch.optim.Adagrad(self._parameters, lr=0.01, fused=True)

    def step(self, gradients: Sequence[Any]) -> list[Any]:
        """Update the parameters by a worker's gradients and return them, all as numpy arrays."""
        import torch

        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        return [parameter.detach().numpy() for parameter in self._parameters]


def _work(sizes: Sequence[Size], rounds: Sequence[int]) -> None:
    import ray
    import torch

    found = []
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=STORE_BYTES,
            _temp_dir=folder,
        )
        try:
            for size, count in zip(sizes, rounds, strict=True):
                actor = ray.remote(Server).remote(size.lengths)
                gradients = [torch.randn(length).numpy() for length in size.lengths]
                found.append(_steps(ray, actor, gradients, count))
                ray.kill(actor)
        finally:
            ray.shutdown()
    print(json.dumps(found), flush=True)


def _steps(ray: Any, actor: Any, gradients: Sequence[Any], rounds: int) -> list[float]:
    early = max(rounds // 5, 2)
    seconds = []
    for _ in range(early + rounds):
        began = time.perf_counter()
        parameters = ray.get(actor.step.remote(gradients))
        seconds.append(time.perf_counter() - began)
        del parameters
    return seconds[early:]


def main() -> None:
    """Print the figures of `SIZES`, or be the worker that `measure` asks this process to be."""
    if len(sys.argv) > 1:
        sizes, rounds = (json.loads(each) for each in sys.argv[1:])
        return _work([Size(*each) for each in sizes], rounds)
    for size, seconds in zip(SIZES, measure(SIZES, [20] * len(SIZES)), strict=True):
        print(f"{size.parameters:>12,} parameters in {size.tensors:>2} tensors  {seconds * 1e3:8.2f} ms")


if __name__ == "__main__":
    main()
