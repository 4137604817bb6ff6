"""What can be asked for: numbers and shapes of parameters, the sizes measured beside them, and the memory they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import farstep
from farstep.errors import InvalidOption, LimitExceeded
from farstep_service.bench.run import LARGE_BYTES, check_memory, sizes_of
from farstep_service.bench.workload import UNSUPPORTED, Workload, count_of, read_shapes
from farstep_service.machine import available_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("25M", 25_000_000),
        ("2.5k", 2_500),
        ("1e9", 10**9),
        ("7B", 7 * 10**9),
        ("1_000", 1000),
        ("3", 3),
        ("1E6", 10**6),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, count: int) -> None:
    """A number of parameters has an optional unit of thousands, millions or billions."""
    assert count_of(text) == count


@pytest.mark.parametrize("text", ["", "M", "-5", "0", "1e99", "nan", "25 MB", "0.1", "1e400"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    """What is no number of parameters is refused, and shown."""
    with pytest.raises(InvalidOption, match="Invalid parameters"):
        count_of(text)


def test_parameters_are_spread_over_tensors() -> None:
    """Vectors have all the parameters between them, and differ by one at most."""
    lengths = [length for (length,) in Workload.of("Adam", "float32", 1_000, 7).shapes]
    assert (len(lengths), sum(lengths)) == (7, 1_000)
    assert max(lengths) - min(lengths) == 1


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_optimizers_of_whole_tensors_get_matrices(name: str) -> None:
    """Muon and Adafactor are measured with about square matrices, which lose next to none of the parameters."""
    work = Workload.of(name, "float32", 1_000_000, 3)
    assert all(rows <= columns <= rows + 2 for rows, columns in work.shapes)
    assert 0.995e6 < work.parameters <= 1e6


def test_the_state_is_what_the_optimizer_keeps_at_most() -> None:
    """State takes its fields times the parameters, those of options among them, and little for each tensor."""
    for name, times in (("SGD", 1), ("Adagrad", 1), ("Adam", 3)):
        work = Workload.of(name, "float64", 10_000, 4)
        assert times * work.nbytes <= work.state_bytes <= times * work.nbytes + 1024


@pytest.mark.parametrize(
    ("optimizer", "dtype", "word"),
    [("Adam2", "float32", "Adagrad"), ("Adam", "int8", "bfloat16"), ("Adam", "complex64", "float32"),
     *[(name, "float32", remedy) for name, remedy in UNSUPPORTED.items()]],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(optimizer: str, dtype: str, word: str) -> None:
    """An unknown optimizer or dtype, or an optimizer that shapes say little about, is refused with a remedy."""
    with pytest.raises(InvalidOption) as error:
        Workload.of(optimizer, dtype, 100, 2)
    assert word in error.value.remedy


def test_every_other_optimizer_can_be_measured() -> None:
    """Each optimizer of the client has a workload, but for those that say what to do instead."""
    names = {name for name in farstep.optim.__all__ if isinstance(vars(torch.optim).get(name), type)}
    assert names >= set(UNSUPPORTED)
    for name in names - set(UNSUPPORTED):
        assert Workload.of(name, "float32", 100, 2).state_bytes >= 0


def test_shapes_are_read_from_a_file(tmp_path: Path) -> None:
    """A line is a shape; comments and empty lines do not count."""
    file = tmp_path / "shapes"
    file.write_text("# resnet\n64x3x7x7\n\n  64 \n")
    assert read_shapes(file) == ((64, 3, 7, 7), (64,))


@pytest.mark.parametrize(
    "text", ["", "#\n", "3x\n", "3 4\n", "-1\n", "0x5\n", "9999999999999999\n", "1000000x1000000x1000000\n"]
)
def test_files_without_shapes_are_refused(tmp_path: Path, text: str) -> None:
    """A file with no shapes, or a line that is none, is refused."""
    file = tmp_path / "shapes"
    file.write_text(text)
    with pytest.raises(InvalidOption):
        read_shapes(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A file that cannot be read is named, with the reason."""
    with pytest.raises(InvalidOption, match="No such file"):
        read_shapes(tmp_path / "nothing")


@pytest.mark.parametrize("parameters", [1, 1_000, 300_000, 499_999, 500_000, 600_000, 1_000_000, 10**12])
def test_other_sizes_are_measured_beside_the_model(parameters: int) -> None:
    """There are two to four different sizes, the model among them, ascending, and bytes count in the largest."""
    work = Workload.of("Adagrad", "float32", parameters, min(60, parameters))
    sizes = sizes_of(work)
    counts = [each.parameters for each in sizes]
    assert work in sizes
    assert counts == sorted(set(counts))
    assert 2 <= len(counts) <= 4
    assert sizes[-1].nbytes * 2 >= LARGE_BYTES


# -- memory


GIB = 2**30


def model(nbytes: int) -> Workload:
    return Workload.of("Adagrad", "float32", nbytes // 4, 1)


def test_a_model_for_which_there_is_no_memory_here_is_refused() -> None:
    """Too large for this process: refused with the bytes it would take, wherever the session is."""
    for server in (None, "http://box:7171"):
        with pytest.raises(InvalidOption, match="GB are available"):
            check_memory(model(10**15), server, {"device": "cpu"})


def test_a_server_on_this_machine_shares_its_memory() -> None:
    """What would fit here alone is refused when the server takes its part of the same memory."""
    free = available_bytes()
    assert free is not None
    work = model(free // 5)
    check_memory(work, None, {})
    check_memory(work, "http://box:7171", {"device": "cpu", "available_bytes": free})
    with pytest.raises(InvalidOption, match="this process and the server"):
        check_memory(work, "http://127.0.0.1:7171", {"device": "cpu", "available_bytes": free})
    check_memory(work, "http://127.0.0.1:7171", {"device": "cuda", "available_bytes": free})


def test_a_server_without_memory_is_named() -> None:
    """Too large for the server as it says: refused before it is asked; one that does not say decides by itself."""
    with pytest.raises(LimitExceeded, match="http://box:7171") as error:
        check_memory(model(1_000_000), "http://box:7171", {"device": "cpu", "available_bytes": 3_999_999})
    assert error.value.limit == 3_999_999
    check_memory(model(1_000_000), "http://box:7171", {"device": "cpu", "available_bytes": 5_000_000})
    check_memory(model(1_000_000), "http://box:7171", {"device": "cpu", "available_bytes": None})


@pytest.mark.parametrize(
    ("limit", "used", "inactive", "expected"),
    [(None, 0, 0, 4 * GIB), ("max", GIB, 0, 4 * GIB), (2 * GIB, GIB, GIB // 2, GIB + GIB // 2), (GIB, 2 * GIB, 0, 0),
     (64 * GIB, GIB, 0, 4 * GIB)],
)  # fmt: skip
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, limit: int | str | None, used: int, inactive: int, expected: int
) -> None:
    """Available is what the machine says, or less in a container; files that can be dropped count as available."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {8 * GIB // 1024} kB\nMemAvailable:  {4 * GIB // 1024} kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
    assert available_bytes(meminfo=meminfo, cgroup=tmp_path) == expected


def test_a_machine_that_does_not_say_is_not_guessed(tmp_path: Path) -> None:
    """Without such files the answer is None."""
    assert available_bytes(meminfo=tmp_path / "none", cgroup=tmp_path) is None
