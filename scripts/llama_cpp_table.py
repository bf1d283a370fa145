"""Print the table of docs/llama-cpp.md: every case of tests/serving/test_llama_cpp.py, as llama.cpp itself computes it.

DICER_LLAMA_CPP_PYTHON=/path/to/python/with/xllamacpp python scripts/llama_cpp_table.py [-k EXPRESSION]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests" / "serving" / "test_llama_cpp.py"


def main() -> int:
    """Run the tests and keep the rows that they print."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", str(TESTS), *sys.argv[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    print("| case | arch | same | margins where not | tokens | difference of log-probabilities |")
    print("| --- | --- | --- | --- | --- | --- |")
    for line in done.stdout.splitlines():
        if "| " in line and line.endswith("|"):
            print(line[line.index("| ") :])
    print(f"\n{done.stdout.splitlines()[-1]}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
