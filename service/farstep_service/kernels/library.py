"""A rule on a CPU as a shared library with one C function: `farstep_run(memory, length)`.

Inductor writes the loop over memory, and around it a model in C++ that checks tensors, keeps weights and hands out
errors. The checks are made before (`fused.py`), and there are no weights. Compiling the model takes three quarters of
the compiler's time, so only the loop is kept, with the addresses of the inputs put where the model would have put them:

    wrapper.cpp     ...  cpp_fused_add_0((const float*)(arg1_1.data_ptr()), ..., (float*)(arg4_1.data_ptr()), s38);  ...
                    #include <torch/csrc/inductor/cpp_prefix.h>
                    extern "C" void cpp_fused_add_0(const float* in_ptr0, ..., float* out_ptr1, const int64_t ks0) {...}

    library.cpp     the last part as it is, and
                    extern "C" void farstep_run(void** memory, int64_t length)
                    { cpp_fused_add_0((const float*)(memory[1]), ..., (float*)(memory[4]), length); }

The loop is compiled with the flags that Inductor names for it, so its bits are those of torch's own package.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

ENTRY = "farstep_run"
PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>"
_CALL = re.compile(r"^ +(cpp_fused_\w+)\((.*)\);$", re.MULTILINE)
_INPUT = re.compile(r"\barg(\d+)_1\.data_ptr\(\)")
_LENGTH = re.compile(r"\bs\d+$")


def compile_library(exported: ExportedProgram, options: Mapping[str, Any], to: Path) -> None:
    """Compile an exported program into the shared library `to`.

    Args:
        exported: a program whose inputs have one length, but for some of a fixed one, and that returns nothing.
        options: Inductor's, for the loop.
        to: the file.

    Raises:
        RuntimeError: Inductor wrote something else than one loop, or the compiler failed, with what it said.
        Exception: whatever torch raises without a compiler.
    """
    with tempfile.TemporaryDirectory() as place:
        archive = Path(place) / "sources.pt2"
        wanted = {**options, "aot_inductor.package_cpp_only": True}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(archive), inductor_configs=wanted)
        wrapper, flags = _read(archive)
        source = Path(place) / "library.cpp"
        source.write_text(library_of(wrapper))
        done = subprocess.run(_command(flags, source, to), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{flags['compiler']} failed: {done.stderr[:1000]}")


def library_of(wrapper: str) -> str:
    """Return the source of the library, made from what Inductor wrote.

    Raises:
        RuntimeError: that is not one loop over the inputs.
    """
    before, found, loop = wrapper.rpartition(PREFIX)
    calls = _CALL.findall(before)
    if not found or len(calls) != 1:
        raise RuntimeError(f"Inductor wrote {len(calls)} loops in place of one.")
    name, arguments = calls[0]
    arguments = _LENGTH.sub("length", _INPUT.sub(r"memory[\1]", arguments))
    if "arg" in arguments or "buf" in arguments:
        raise RuntimeError(f"Inductor's loop takes more than inputs and a length: {arguments:.200}.")
    entry = f'extern "C" void {ENTRY}(void** memory, int64_t length)\n{{\n    {name}({arguments});\n}}\n'
    return f"{PREFIX}{loop}\n{entry}"


def _read(archive: Path) -> tuple[str, dict[str, Any]]:
    """Return the code and the flags of the linker's command, which are the compiler's and more."""
    with zipfile.ZipFile(archive) as packed:
        (code,) = (name for name in packed.namelist() if name.endswith("wrapper.cpp"))
        (flags,) = (name for name in packed.namelist() if name.endswith("_linker_flags.json"))
        return packed.read(code).decode(), json.loads(packed.read(flags))


def _command(flags: Mapping[str, Any], source: Path, to: Path) -> list[str]:
    """Return the command that compiles and links in one go."""
    return [
        flags["compiler"],
        *(f"-D{each.strip()}" for each in flags["definitions"]),
        *(f"-I{each}" for each in flags["include_dirs"]),
        *(f"-{each}" for each in flags["cflags"]),
        *(word for each in flags["passthrough_args"] for word in each.split()),
        str(source),
        "-o",
        str(to),
        *(f"-L{each}" for each in flags["libraries_dirs"]),
        *(f"-l{each}" for each in flags["libraries"]),
        *(f"-{each}" for each in flags["ldflags"]),
    ]
