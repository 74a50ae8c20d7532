"""Pages of documentation whose snippets are run."""

import re
from pathlib import Path
from typing import Any


def run_page(page: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the Python snippets of a page in their order, as one program. Returns its names."""
    names = {} if names is None else names
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert snippets, f"{page} has no snippet"
    for snippet in snippets:
        exec(snippet, names)
    return names
