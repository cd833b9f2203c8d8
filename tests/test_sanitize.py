"""That `make sanitize` leaves no kernel out, and takes nothing for clean that was not run or was not."""

import re

import pytest
from sanitize import CHECKS, FOUND, KERNELS, TESTS, verdict


def test_every_file_with_a_kernel_is_named():
    with_kernels = {
        path.stem for path in KERNELS.glob("*.py") if re.search(r"(?m)^def _\w*_kernel\(", path.read_text())
    }
    assert len(with_kernels) >= 16 and with_kernels == {kernel for check in CHECKS.values() for kernel in check.kernels}
    assert all((TESTS / f"test_{name}.py").exists() for check in CHECKS.values() for name in check.files)


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "3 passed, 9 deselected in 1.2s", ""),
        (0, "3 skipped in 1.2s", "no test ran"),
        (1, "1 failed, 3 passed", "tests failed, exit code 1"),
        (5, "9 deselected", "tests failed, exit code 5"),
        (FOUND, "3 passed", "errors found"),
        (None, "", "took too long"),
    ],
)
def test_verdict(code, output, expected):
    assert verdict(code, output) == expected


REPORTED = """3 passed
========= Error: Race reported between Read access at _hopper_kernel+0x210 in attention_hopper.py:{}
=========     and Write access at _hopper_kernel+0xb360 in attention_hopper.py:{} [3 hazards]
========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)
"""


def lines_of(text: str) -> int:
    source = (KERNELS / "attention_hopper.py").read_text().splitlines()
    return next(number for number, line in enumerate(source, 1) if text in line)


def test_only_the_compilers_own_dispatch_is_passed_over():
    signature, call, other = (
        lines_of(text) for text in ("def _hopper_kernel(", "gl.warp_specialize(", "mbarrier.init")
    )
    assert verdict(FOUND, REPORTED.format(signature, call, 1, 1)) == ""
    assert verdict(FOUND, REPORTED.format(signature, other, 1, 1)) == "errors found"
    assert verdict(FOUND, REPORTED.format(signature, call, 2, 2)) == "errors found"  # one was not displayed
    assert verdict(FOUND, "1 failed, " + REPORTED.format(signature, call, 1, 1)) == "tests failed"
    assert verdict(FOUND, REPORTED.format(signature, call, 1, 1).replace("3 passed", "1 skipped")) == "no test ran"
