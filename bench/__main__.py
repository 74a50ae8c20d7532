"""`python -m bench [--grid quick|pretraining|gpu|full] [-k EXPRESSION] [--again] [--minutes M] [--threads N] [--save]`:
every op against its peers, in one run on this machine, then the table.

The arguments are pytest's and those of bench/conftest.py. The same command goes on where it was killed or where
--minutes ended it (exit status 2); `--save` also writes results and pictures to bench/results/.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

QUIET = ("-q", "-rfE", "--no-header", "--benchmark-quiet", "--disable-warnings", "-p", "no:xdist")


def main(arguments: list[str]) -> int:
    os.chdir(Path(__file__).parent.parent)
    status = pytest.main(["bench/suite.py", *QUIET, *arguments])
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else int(status)  # all stood in the results file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
