"""That `make sanitize` leaves no kernel out, and takes nothing for clean that was not run or was not."""

import re
from pathlib import Path

import pytest
from sanitize import CHECKS, FOUND, TESTS, verdict

KERNELS = Path(__file__).parents[1] / "kernels"


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
