"""What a shared library is made of, from what Inductor writes."""

import pytest

from farstep_service.kernels.library import PREFIX, library_of

LOOP = 'extern "C" void cpp_fused_add_0(const float* in_ptr0, float* out_ptr0, const int64_t ks0)\n{\n}\n'
CALL = "    cpp_fused_add_0((const float*)(arg1_1.data_ptr()), (float*)(arg10_1.data_ptr()), s38);\n"


def test_the_loop_is_kept_and_called_with_the_inputs_addresses():
    """The library is Inductor's loop as it is, and a function that gives it the addresses of the inputs it names."""
    made = library_of(f"model\n{CALL}more of the model\n{PREFIX}\n{LOOP}")
    assert made.startswith(f"{PREFIX}\n{LOOP}")
    assert "cpp_fused_add_0((const float*)(memory[1]), (float*)(memory[10]), length);" in made
    assert "model" not in made


@pytest.mark.parametrize(
    "wrapper",
    [
        f"{PREFIX}\n{LOOP}",
        f"{CALL}{CALL}{PREFIX}\n{LOOP}",
        CALL + LOOP,
        f"    cpp_fused_add_0((float*)(buf0.data_ptr()), s1);\n{PREFIX}\n{LOOP}",
        f"    cpp_fused_add_0((float*)(arg0_1.data_ptr()), arg1_1_size);\n{PREFIX}\n{LOOP}",
    ],
    ids=["no loop", "two loops", "no headers", "memory of its own", "another number"],
)
def test_anything_but_one_loop_over_the_inputs_is_refused(wrapper: str):
    """What needs the model around it, or another torch would write, is an error at building, never wrong memory."""
    with pytest.raises(RuntimeError, match="Inductor"):
        library_of(wrapper)
