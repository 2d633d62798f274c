# `make demo` and `make test` each do everything on a machine that has Python >= 3.10, make and a
# C++ compiler: a virtual environment of their own, the install, the run.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
TORCH_CUDA ?= torch==2.14.1
VENV_CUDA ?= .venv-cuda
VENV_CLIENTS ?= .venv-clients
PYTEST_ARGS ?=
BASE ?= main
MINUTES ?= 10
COMPARE_ARGS ?=
VERSIONS_ARGS ?=
CLIENTS_ARGS ?=
QUICK ?=
RESULTS ?=
THROUGHTIME_BUILD ?= cpu
export THROUGHTIME_BUILD

BIN := $(VENV)/bin
BIN_CLIENTS := $(VENV_CLIENTS)/bin
# what the installed package is made of: a change of any of it makes the installation stale
SOURCES := setup.py pyproject.toml $(shell find csrc python triton_kernels -type f \
	! -name '*.pyc' ! -name '*.so' ! -name _build_info.py ! -path '*.egg-info/*')
CPP := $(shell find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: help demo docs test test-clients test-cuda-build test-versions gradient-table bench bench-compare reproduce reproduce-full fuzz install format clean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo     install into $(VENV), train on real data with ours and with nn.LSTM, compare"
	@echo "make test     install into $(VENV), then every check and every test"
	@echo "make test-cuda-build  install with the CUDA kernels beside a torch for CUDA ($(VENV_CUDA),"
	@echo "              several GB), and see them load; needs nvcc, no GPU"
	@echo "make gradient-table  the gradient by every route that torch offers: bench/results/gradient-table.md"
	@echo "make test-versions    compile the Triton kernels with every Triton from the oldest on; build and"
	@echo "              test beside the oldest and the newest torch with every Python at hand, and"
	@echo "              between (some GB each; goes on where it was interrupted)"
	@echo "make test-clients     programs that hold an nn.LSTM, in an environment of their own ($(VENV_CLIENTS),"
	@echo "              several GB; goes on where it was interrupted): python/docs/programs.csv"
	@echo "make bench    install into $(VENV), measure every operation, write tables and plots"
	@echo "make bench-compare   build BASE=$(BASE) too, tell whether the working tree is slower"
	@echo "make reproduce  install into $(VENV), measure the claims of both papers again: 40 minutes;"
	@echo "              make reproduce-full: also what takes hours. Both go on where they were interrupted"
	@echo "make install  install into $(VENV) only"
	@echo "make fuzz     install into $(VENV), call the package with what is right and wrong from random"
	@echo "              seeds for MINUTES=$(MINUTES), and print what ended a process, hung or named nothing"
	@echo "make docs     install into $(VENV), write one page per public name into build/docs"
	@echo "make format   format the Python and C++ sources"
	@echo "make clean    remove $(VENV) and all that was built"
	@echo
	@echo "PYTHON=$(PYTHON)  TORCH=$(TORCH)  THROUGHTIME_BUILD=$(THROUGHTIME_BUILD)  PYTEST_ARGS=$(PYTEST_ARGS)"
	@echo "may be set, as in: make test TORCH=torch==2.12.0 PYTEST_ARGS='-k functional'"
	@echo "or: make test-versions VERSIONS_ARGS='--pairs 2.10.0:3.11'"
	@echo "or: make bench-compare BASE=HEAD~1 COMPARE_ARGS='--cases lstm'; QUICK=1 shortens both"
	@echo "benchmarks, and RESULTS=FOLDER is where make bench writes, instead of bench/results/MACHINE"

demo: install
	$(BIN)/python -m bench demo

# Each part is timed; the first that fails ends the run.
define PARTS
begin=$$(date +%s); \
part() { \
  name=$$1; shift; start=$$(date +%s); \
  printf '\n== %s: %s\n' "$$name" "$$*"; \
  "$$@" || { printf '\nmake $@: FAILED in %s: %s\n' "$$name" "$$*" >&2; exit 1; }; \
  printf '== %s passed in %s s\n' "$$name" $$(( $$(date +%s) - start )); \
}
endef
ALL_PASSED = printf '\nmake $@: all passed in %s s\n' $$(( $$(date +%s) - begin ))

# Without a limit of restarts, a process that a test ends is replaced, and pytest waits for ever.
test:
	@$(PARTS); \
	part install $(MAKE) --no-print-directory install; \
	part lint $(BIN)/ruff check .; \
	part format $(BIN)/ruff format --check .; \
	part types $(BIN)/mypy --cache-dir $(VENV)/mypy -p throughtime; \
	part types-build $(BIN)/mypy --cache-dir $(VENV)/mypy setup.py csrc/toolchain.py csrc/ninja_file.py; \
	part clang-format $(BIN)/clang-format --dry-run -Werror $(CPP); \
	part pytest $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile \
	  --max-worker-restart 0 $(PYTEST_ARGS); \
	$(ALL_PASSED)

# No GPU is needed: the kernels are compiled, linked and loaded.
test-cuda-build:
	@begin=$$(date +%s); set -e; \
	test -x $(VENV_CUDA)/bin/python || "$(PYTHON)" -m venv $(VENV_CUDA); \
	$(VENV_CUDA)/bin/python -m pip install --quiet "$(TORCH_CUDA)" "setuptools>=77" ninja numpy; \
	printf '== torch for CUDA is there after %s s\n' $$(( $$(date +%s) - begin )); \
	THROUGHTIME_BUILD=cuda $(VENV_CUDA)/bin/python -m pip install --quiet --no-build-isolation \
	  --no-deps --force-reinstall .; \
	$(VENV_CUDA)/bin/python tests/build/check_cuda_build.py; \
	printf '== make test-cuda-build: passed in %s s\n' $$(( $$(date +%s) - begin ))

gradient-table: install
	PYTHONPATH=tests $(BIN)/python tests/operators/gradient_table.py bench/results/gradient-table.md

test-versions: install
	$(BIN)/python tests/build/triton_versions.py
	$(BIN)/python tests/build/versions.py $(VERSIONS_ARGS)

# What pip cannot install beside this torch is left out, and its row says: not tried. A torchvision
# for another build of torch, which fastai brings, breaks the import of the others.
test-clients:
	@pip="$(BIN_CLIENTS)/python -m pip"; \
	packages() { \
	  for package in $$($(BIN_CLIENTS)/python tests/clients --packages); do \
	    $$pip install --quiet "$(TORCH)" "$$package" || \
	      echo "make $@: pip cannot install $$package beside $(TORCH)"; \
	  done; \
	  $(BIN_CLIENTS)/python -c "import torchvision" 2>/dev/null || \
	    $$pip uninstall --quiet --yes torchvision; \
	}; \
	$(PARTS); \
	test -x $(BIN_CLIENTS)/python || part environment "$(PYTHON)" -m venv $(VENV_CLIENTS); \
	part torch $$pip install --quiet "$(TORCH)" "setuptools>=77" ninja numpy; \
	part packages packages; \
	part throughtime $$pip install --quiet --no-build-isolation --no-deps .; \
	part versions $$pip list --format freeze; \
	part adapters $(BIN_CLIENTS)/python -m pytest tests/clients; \
	part programs $(BIN_CLIENTS)/python tests/clients $(CLIENTS_ARGS); \
	$(ALL_PASSED)

bench-compare: install
	$(BIN)/python -m bench compare --base "$(BASE)" $(if $(QUICK),--quick) $(COMPARE_ARGS)

# The folder is named after processor and cores, so that machines stand side by side. What QUICK=1
# measures is not worth keeping, and must not replace what is kept.
bench: install
	@set -e; results="$(RESULTS)"; \
	if [ -z "$$results" ]; then \
	  slug=$$($(BIN)/python -c 'from bench import machine; print(machine.slug())'); \
	  results="$(if $(QUICK),runs/bench,bench/results)/$$slug"; \
	fi; \
	for op in lstm rel-lstm relevancy; do \
	  $(BIN)/python -m bench $$op $(if $(QUICK),--quick) \
	    --csv "$$results/$$op.csv" --plot "$$results/$$op.svg"; \
	done

# What is stored is taken as it is: remove a CSV to measure its claim again.
reproduce: install
	$(BIN)/python -m bench reproduce --out bench/results/reproduction

reproduce-full: install
	$(BIN)/python -m bench reproduce --full --out bench/results/reproduction

# Sphinx writes a source file per name, so it works on a copy.
docs: install
	rm -rf build/docs build/docs-source && mkdir -p build && cp -r python/docs build/docs-source
	$(BIN)/sphinx-build -q -W build/docs-source build/docs

fuzz: install
	cd tests && "$(abspath $(BIN))/python" -m fuzz --minutes $(MINUTES)

install: $(VENV)/installed

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) $(VENV_CUDA) $(VENV_CLIENTS) build dist python/throughtime.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f python/throughtime/_build_info.py python/throughtime/_C*.so
	find bench csrc python tests triton_kernels -name __pycache__ -type d -prune -exec rm -rf {} +

# A normal installation, not an editable one: what is tested is what a user gets.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	@echo "make: compiling the kernels and installing into $(VENV): some minutes"
	$(BIN)/python -m pip install --quiet ".[bench,test]"
	@touch $@

# Holds the name of the torch that was asked for and is written only when that changes.
$(VENV)/torch: FORCE
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "make: $(PYTHON) was not found: name a Python >= 3.10 by PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $$("$(PYTHON)" --version) is too old: name a Python >= 3.10 by PYTHON=..." >&2; exit 1; }
	@if [ "$$(cat $@ 2>/dev/null)" != "$(TORCH)" ]; then \
	  set -e; rm -f $@; \
	  echo "make: setting up $(VENV) with $(TORCH), once: some minutes"; \
	  "$(PYTHON)" -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --upgrade pip; \
	  $(BIN)/python -m pip install "$(TORCH)"; \
	  echo "$(TORCH)" > $@; \
	fi

FORCE:
