"""Build of glomo: the folder kernels/ is installed as the package glomo.kernels (a top-level module called
"kernels" would hide Hugging Face's package of that name), and csrc/ becomes its CPU kernels.

The kernels are built where PyTorch can be imported (`pip install --no-build-isolation .`) and there is a C++ compiler;
else the package is pure Python and does the same, only slower. They use PyTorch's stable ABI and nothing of Python's:
one binary serves every PyTorch from 2.11 and every Python.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")]
    INSTRUCTION_SETS["avx512"] += ["-mfma", "-mf16c", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]


def can_build():
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    return sys.platform == "linux" and importlib.util.find_spec("torch") and shutil.which(compiler)


class BuildKernels(build_ext):
    """Every kernel file is compiled once for each instruction set, with flags that no other file gets."""

    def build_extension(self, extension):
        torch = Path(importlib.util.find_spec("torch").origin).parent
        extra = shlex.split(os.environ.get("GLOMO_CXXFLAGS", ""))  # a sanitizer, for example
        common = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-g0", *extra]
        # GCC's own AVX-512 header makes it warn of uninitialised variables
        kernel_flags = [*common, "-O3", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
        host_flags = [*common, "-O2", "-isystem", str(torch / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        objects = []
        for name, flags in INSTRUCTION_SETS.items():
            folder, macros = f"{self.build_temp}/{name}", [("GLOMO_ISA", name)]
            for source in sorted(Path("csrc/cpu/kernels").glob("*.cpp")):
                objects += self._compile(source, folder, [*kernel_flags, *flags], macros)
        for source in [Path("csrc/library.cpp"), *sorted(Path("csrc/cpu").glob("*.cpp"))]:
            objects += self._compile(source, f"{self.build_temp}/host", host_flags, [])
        target = self.get_ext_fullpath(extension.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        self.compiler.link_shared_object(objects, target, extra_postargs=[*extra, *libraries], target_lang="c++")

    def _compile(self, source, folder, flags, macros):
        return self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags, macros=macros)

    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"  # for torch.ops.load_library, not for import


class WheelForEveryPython(bdist_wheel):
    """The kernels depend on the platform only."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        "glomo",
        *(f"glomo.{name}" for name in find_packages("glomo")),
        "glomo.kernels",
        *(f"glomo.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"glomo": "glomo", "glomo.kernels": "kernels"},
    ext_modules=[Extension("glomo.kernels.cpu_kernels", ["csrc/library.cpp"])] if can_build() else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": WheelForEveryPython},
)
