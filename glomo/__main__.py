"""``python -m glomo``: the same as the command ``glomo`` (and what ``torchrun -m glomo`` starts)."""

import sys

from glomo.cli.main import main

sys.exit(main())
