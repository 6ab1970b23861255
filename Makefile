# make demo    train a small Transformer twice, with torch.nn and with fastattn, and compare
# make test    a third of the cases of every test: five to fifteen minutes
# make test-all       every case but those marked slow: half an hour and more
# make test-machines  every case as on other machines: instruction sets, numbers of threads. Hours
# make lint    style and types
# make bench   the quick benchmark: a report in out/bench
# make gpu     everything that a machine with a GPU can tell, in out/gpu: tests, sanitizers, benchmark, tuning. Installs
#              nothing: it runs from the tree with the torch that is there. TIME_BUDGET=seconds, GPU_ARGS="--steps tests"
# make oldest  compile the kernels with the oldest Triton that is supported
# make clean   remove what the above left behind
#
# Each needs Python 3.11 or newer and prepares .venv itself; another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?= --quick
GPU_ARGS ?=
TIME_BUDGET ?= 3600

BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST_TRITON := $(VENV)/triton-3.6.0

.PHONY: demo test test-all test-machines kernels lint bench gpu oldest clean

demo: $(READY)
	$(BIN)/python examples/train_lm.py $(DEMO_ARGS)

# One thread a worker: the tests are many small calls, and workers share the cores already.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --progress -m "not slow" -n auto --maxprocesses 8

test: kernels
	$(PYTEST) --sample $(TEST_ARGS)

test-all: kernels
	$(PYTEST) $(TEST_ARGS)

test-machines: kernels
	$(BIN)/python tools/machines.py $(TEST_ARGS)

# Without a C++ compiler the native kernels are not there, and their tests are skipped.
kernels: $(READY)
	-$(BIN)/python -m fastattn build --cpu
	-$(BIN)/python -m fastattn build --emulator

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Memory that a call frees is kept for the next: else glibc gives it back, and the time of new pages is what is measured.
bench: $(READY)
	MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=33554432 $(BIN)/python -m fastattn bench --out out/bench $(BENCH_ARGS)

gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) -m benchmarks.gpu --out out/gpu --budget $(TIME_BUDGET) $(GPU_ARGS)

oldest: $(OLDEST_TRITON)
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m fastattn inspect --kind triton --check --arch sm_90

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(OLDEST_TRITON): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0
	@touch $@

$(READY): pyproject.toml setup.py constraints.txt tools/prepare.py
	@$(PYTHON) tools/prepare.py $(VENV)
	@touch $@
