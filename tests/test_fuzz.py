"""A short run of `make fuzz`."""

import subprocess
import sys
from pathlib import Path


def test_broken_documents_end_in_an_error_of_ours_or_a_correct_result():
    tool = Path(__file__).parents[1] / "tools" / "fuzz.py"
    ran = subprocess.run([sys.executable, tool, "--cases", "120", "--seed", "1"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    assert "120 cases" in ran.stdout
