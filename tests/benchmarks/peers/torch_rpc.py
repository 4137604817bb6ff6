"""A parameter server of torch.distributed.rpc: what PyTorch itself offers for the job.

Two processes over TensorPipe, as PyTorch's tutorials build it: the server owns the parameters behind an `RRef`; a
worker calls `rpc_sync` with its gradients; the server puts them in place, takes a step of `torch.optim.Adagrad`, and
returns the parameters. CPU tensors; the worker computes nothing.

It is set up as it is fastest on two cores, measured side by side: the fused optimizer (half the time of the others at
25 million parameters) and one OpenMP thread (5 to 25 % faster than two, which compete with TensorPipe's own threads).
How the bytes go is a choice of three:

    default    TensorPipe's own choice: between processes of one machine, shared memory for messages and reads of the
               other process's memory for tensors; this peer does not pay for TCP, and farstep does
    basic      the same, but tensors go through shared memory as well: faster than the default on some machines
    uv         TCP over loopback for everything, as between machines

    python -m tests.benchmarks.peers.torch_rpc
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

Way = Literal["default", "basic", "uv"]


class Through(NamedTuple):
    """State what messages and tensors go through; None leaves it to TensorPipe."""

    transports: list[str] | None = None
    channels: list[str] | None = None


WAYS: dict[Way, Through] = {
    "default": Through(),
    "basic": Through(channels=["basic"]),
    "uv": Through(["uv"], ["basic"]),
}
LIMIT_S = 300.0
"""Longest life of the two processes."""


class Size(NamedTuple):
    """State a workload: so many float32 parameters in so many tensors of about the same length."""

    parameters: int
    tensors: int

    @property
    def lengths(self) -> list[int]:
        """Return the length of each tensor."""
        each, rest = divmod(self.parameters, self.tensors)
        return [each + (place < rest) for place in range(self.tensors)]


SIZES = (Size(25_000_000, 1), Size(25_000_000, 56), Size(250_000, 60), Size(2_500, 6))


def measure(sizes: Sequence[Size], rounds: Sequence[int], way: Way = "basic") -> list[float]:
    """Return the median seconds from the call with the gradients to the new parameters, for each size.

    Args:
        sizes: parameters and tensors.
        rounds: timed steps of each size; a fifth as many, at least two, go before them.
        way: how the bytes go.

    Raises:
        RuntimeError: one of the two processes failed or took too long; the message has its last output.
    """
    return [median(each) for each in measure_all(sizes, rounds, way)]


def measure_all(sizes: Sequence[Size], rounds: Sequence[int], way: Way = "basic") -> list[list[float]]:
    """Return the seconds of every timed step, a list for each size."""
    with tempfile.TemporaryDirectory() as folder:
        until = time.monotonic() + LIMIT_S
        order = json.dumps([way, rounds, sizes])
        with _process("server", folder, order) as server, _process("worker", folder, order) as worker:
            outputs = [_output(each, until) for each in (worker, server)]
        result: list[list[float]] = json.loads(outputs[0].splitlines()[-1])
        return result


def _output(process: subprocess.Popen[str], until: float) -> str:
    try:
        output, errors = process.communicate(timeout=max(until - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired as exc:
        raise RuntimeError(f"torch.distributed.rpc did not finish in {LIMIT_S:.0f} s") from exc
    if process.returncode:
        raise RuntimeError(f"torch.distributed.rpc failed: {errors[-2000:]}")
    return output


@contextlib.contextmanager
def _process(role: str, folder: str, order: str) -> Iterator[subprocess.Popen[str]]:
    surroundings = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TP_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, __file__, role, folder, order]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=surroundings) as process:
        try:
            yield process
        finally:
            process.kill()


def _play(role: str, folder: str, way: Way, rounds: Sequence[int], sizes: Sequence[Size]) -> None:
    import torch
    from torch.distributed import rpc

    store = f"file://{Path(folder) / 'store'}"
    transports, channels = WAYS[way]
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=store, rpc_timeout=LIMIT_S, _transports=transports, _channels=channels
    )
    rpc.init_rpc(  # type: ignore[no-untyped-call]
        role, rank=("server", "worker").index(role), world_size=2, rpc_backend_options=options
    )
    if role == "worker":
        seconds = []
        for size, count in zip(sizes, rounds, strict=True):
            server = rpc.remote("server", Server, args=(size.lengths,))
            gradients = [torch.randn(length) for length in size.lengths]
            seconds.append(_steps(server, gradients, count))
            del server
        print(json.dumps(seconds), flush=True)
    rpc.shutdown()


class Server:
    """Own the parameters and the optimizer."""

    def __init__(self, lengths: Sequence[int]) -> None:
        import torch

        self._parameters = [torch.nn.Parameter(torch.randn(length)) for length in lengths]
        self._optimizer = torch.optim.Adagrad(self._parameters, lr=0.01, fused=True)

    def step(self, gradients: Sequence[object]) -> list[object]:
        """Update the parameters by a worker's gradients and return them."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient  # type: ignore[assignment]
        self._optimizer.step()
        return [parameter.detach() for parameter in self._parameters]


def _steps(server: object, gradients: Sequence[object], rounds: int) -> list[float]:
    early = max(rounds // 5, 2)
    seconds = []
    for _ in range(early + rounds):
        began = time.perf_counter()
        server.rpc_sync().step(gradients)  # type: ignore[attr-defined]
        seconds.append(time.perf_counter() - began)
    return seconds[early:]


def main() -> None:
    """Print the figures of `SIZES`, or play the part that `measure` asks this process to."""
    if len(sys.argv) > 1:
        role, folder, order = sys.argv[1:]
        way, rounds, sizes = json.loads(order)
        return _play(role, folder, way, rounds, [Size(*each) for each in sizes])
    for way in WAYS:
        for size, seconds in zip(SIZES, measure(SIZES, [20] * len(SIZES), way), strict=True):
            label = f"{size.parameters:>12,} parameters in {size.tensors:>2} tensors"
            print(f"{label}  {seconds * 1e3:8.2f} ms  {way}")


if __name__ == "__main__":
    main()
