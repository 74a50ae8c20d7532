"""PyTorch's own tests of multi-head attention and SDPA, with glomo's in the place of PyTorch's.

    python -m bench.pytorch_suite FOLDER [arguments of pytest]

FOLDER is `test/` of a PyTorch source tree of about the installed version. `nn.MultiheadAttention` is
`glomo.nn.MultiheadAttention` everywhere, also in PyTorch's layers, and every test runs inside `glomo.patch_sdpa()`. The
tests in `REMAINDER` may fail, each for its reason; nothing else may. How many calls went where is printed at the end.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import glomo
from glomo.nn import MultiheadAttention

FILES = ("nn/test_multihead_attention.py", "test_transformers.py", "test_nn.py")
ERRORS = "a mistake in a call is a ValueError or TypeError with the shapes, not an AssertionError or RuntimeError"
FUSED = "looks for a call of PyTorch's fused layers, which the hook of glomo's module keeps away"
NESTED = "expects nested tensors to be refused where they are not"
SCRIPT = "TorchScript (deprecated) cannot compile the module"
REMAINDER = {
    r"test_multihead_attn(_fast_path)?_invalid_shape$": ERRORS,
    r"test_transformer_args_check$": ERRORS,
    r"test_train_with_is_causal": ERRORS,
    r"test_multihead_attn_nested_tensor_outside_fast_path$": NESTED,
    r"test_TransformerEncoderLayer_empty": NESTED,
    r"fast_path_query_and_bias_have_different_dtypes": "a bias of another dtype is refused by PyTorch's linear too, "
    "but for some layouts of the query",
    r"test_multihead_self_attn_two_masks_fast_path_mock": FUSED,
    r"test_(disable|mask_check)_fastpath": FUSED,
    r"test_transformerencoderlayer_cpu": "expects NaN where a target may read nothing; here it is zero",
    r"test_script_|test_transformerencoderlayer_subclass": SCRIPT,
    r"test_scaled_dot_product_attention_batch_size_.*_dropout_p_0_[25]": "compares with PyTorch's random numbers",
    r"test_scaled_dot_product_attention_batch_size_.*_causal_attn_mask": "expects a mask together with is_causal to be "
    "refused; here both are used",
}


class InPlace:
    """The plugin."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.failed: Counter[str] = Counter(dict.fromkeys(REMAINDER, 0))
        modules = torch.nn.modules
        for place in (torch.nn, modules, modules.activation, modules.transformer):
            place.MultiheadAttention = MultiheadAttention  # type: ignore[attr-defined,misc]

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            for pattern, reason in REMAINDER.items():
                if re.search(pattern, item.name):
                    item.add_marker(pytest.mark.xfail(reason=reason))
                    item.user_properties.append(("remainder", pattern))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Any:
        with glomo.patch_sdpa() as patch:
            result = yield
        self.calls += patch.calls
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and hasattr(report, "wasxfail") and report.skipped:
            self.failed.update(pattern for name, pattern in report.user_properties if name == "remainder")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for where, count in self.calls.most_common():
            terminalreporter.write_line(f"{count:8,} {where}")
        for pattern, count in self.failed.items():
            terminalreporter.write_line(f"{count:8,} failed as listed: {pattern}")


def main(argv: list[str]) -> int:
    if not argv or not all((Path(argv[0]) / name).is_file() for name in FILES):
        print(__doc__, file=sys.stderr)
        return 2
    folder, *options = argv
    files = [str(Path(folder) / name) for name in FILES]
    quiet = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", folder, "-k", "ransformer or ttention"]
    return int(pytest.main([*quiet, *files, *options], plugins=[InPlace()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
