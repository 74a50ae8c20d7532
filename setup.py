"""Build of glomo: the folder kernels/ is installed as the package glomo.kernels (a top-level module called
"kernels" would hide Hugging Face's package of that name)."""

from setuptools import find_packages, setup

setup(
    packages=[
        "glomo",
        *(f"glomo.{name}" for name in find_packages("glomo")),
        "glomo.kernels",
        *(f"glomo.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"glomo": "glomo", "glomo.kernels": "kernels"},
)
