"""The checks of kernels, each file in a process of its own.

Without a GPU they run under Triton's interpreter, which has to be chosen before anything in the process loads triton,
as `torch.compile` does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, and nothing but kernels needs it")

CHECKS = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_"))


@pytest.mark.parametrize("selected", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem)
def test_kernels_agree_with_their_references(checks: Path, selected: str):
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-n0", "-m", selected, str(checks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
