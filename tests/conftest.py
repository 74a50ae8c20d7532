"""What every test shares: a fixed seed, one thread a process, and the reasons for skips."""

import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import settings


def pytest_configure():
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.register_profile("explore", max_examples=2000, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="glomo-inductor-")
    if "GLOMO_TEST_DEVICE" in os.environ:
        torch.set_default_device(os.environ["GLOMO_TEST_DEVICE"])
    if os.environ.get("TRITON_INTERPRET") == "1":
        _patch_the_interpreter_once()


def pytest_unconfigure():
    """Inductor's cache knows a custom op by its name: what an earlier version of the package left there must not be
    used, so every run has a cache of its own."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def _patch_the_interpreter_once():
    """Triton's interpreter replaces the functions of triton.language at every call of a device function, which is nine
    tenths of its time. Here it does so once for each of the two modules, for the life of the process."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    class Kept:
        def restore(self):
            pass

    def patch_once(fn):
        wanted = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if not wanted <= done:
            done.update(wanted)
            patch(fn)
        return Kept()

    interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    network = pytest.mark.skip(reason="downloads something: set GLOMO_NETWORK_TESTS=1 to run it")
    gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("network") and os.environ.get("GLOMO_NETWORK_TESTS") != "1":
            item.add_marker(network)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(gpu)
