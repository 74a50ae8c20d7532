# make demo   pre-train a graph on real text, transfer it, print the table, draw the pictures
# make test   the tests
# make codegen     compile the Triton kernels for several GPUs, without one, and look at the machine code (a few minutes)
# make codegen-36  the same with Triton 3.6.0, in an environment of its own
# make test-asan   the tests of the C++ kernels under sanitizers (a few minutes)
# make bench  every op against its peers (ARGS="--grid pretraining --save": see bench/__main__.py)
# All run `make setup` first, which needs python3 (3.10 or newer), make and a network to a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

# The tests of the Triton kernels, in Triton's interpreter on the CPU: the same parity suite, in fp32 and fp16.
INTERPRETED := $(addprefix kernels/, test_relu2_attention.py test_relu2_affinity.py test_attention.py \
	test_graph_mix.py test_varlen.py test_compile.py triton) glomo/nn/test_attention.py \
	glomo/integrations/test_sdpa.py

SANITIZED := cpu relu2_attention relu2_affinity attention graph_mix varlen
# What cannot run there: it needs terabytes of addresses, or looks at the machine code.
NOT_SANITIZED := not 32_bits and not belong and not linear

.PHONY: setup demo test test-asan lint bench codegen codegen-36 clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test,lint]"
	touch $@

demo: setup
	$(BIN)/glomo demo

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)
ifndef ARGS
	TRITON_INTERPRET=1 GLOMO_BACKEND=triton $(BIN)/python -m pytest -n $(JOBS) --dist worksteal \
		$(INTERPRETED:%=tests/%)
endif

# The C++ kernels under the address and undefined-behaviour sanitizers, in a copy of the package made of links.
test-asan: setup
	rm -rf .build/asan && mkdir -p .build/asan/glomo/kernels
	ln -s $(CURDIR)/glomo/* .build/asan/glomo/
	ln -s $(CURDIR)/kernels/* .build/asan/glomo/kernels/ && rm -f .build/asan/glomo/kernels/*.so
	ln -s $(CURDIR)/bench $(CURDIR)/tests $(CURDIR)/pyproject.toml .build/asan/
	GLOMO_CXXFLAGS="-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
		$(BIN)/python setup.py -q build_ext --build-lib .build/asan --build-temp .build/asan/objects
	cd .build/asan && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		../../$(BIN)/python -m pytest -n $(JOBS) $(SANITIZED:%=tests/kernels/test_%.py) -k "$(NOT_SANITIZED)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy sees the folders as they are installed: kernels/ as glomo/kernels
	rm -rf .build/typed && mkdir -p .build/typed/glomo
	for p in $(CURDIR)/glomo/*; do ln -s $$p .build/typed/glomo/; done && ln -s $(CURDIR)/kernels .build/typed/glomo/kernels
	cd .build/typed && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p glomo

bench: setup
	$(BIN)/python -m bench $(ARGS)

codegen: setup
	$(BIN)/python -m bench.codegen $(ARGS)

codegen-36: .venv36/.ready
	.venv36/bin/python -m bench.codegen $(ARGS)

# Triton comes last and alone: a CUDA build of torch would insist on its own version.
.venv36/.ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv36
	.venv36/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch safetensors numpy
	.venv36/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0
	.venv36/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) .venv36 .build build *.egg-info
