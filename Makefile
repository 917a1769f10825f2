# What one does with a clone. Everything lives in .venv; `make setup` is the only target that downloads.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: setup check test test-sanitized test-oracle test-ep256 test-systemd test-slurm demo bench bench-namespaces

setup: $(VENV)/.ready

# torch first and alone: asked for exactly, it is the CPU build; as somebody's dependency it may be a CUDA one
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install $$(grep -x 'torch==[0-9.]*' constraints.txt)
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# a process of tests per core, each with one thread of torch's, as a service has; bytecode is kept for the many they start
test: setup
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# what is written in C under AddressSanitizer: the port through the contract of the transport, the router's plan
test-sanitized: setup
	CACHE_DIRECTORY=$$(mktemp -d) CFLAGS="-fsanitize=address -g" LD_PRELOAD=$$(cc -print-file-name=libasan.so) \
	ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	$(BIN)/python -m pytest tests/contract tests/unit/test_router_plan.py -k "ucx or rows_apart or landed or neighbours or at_once or volleys or desk or ahead or handed_on or death or handshake or compiled"

test-oracle: setup
	ATOLL_ORACLE_RESULTS=tests/oracle/results-whole.json $(BIN)/python -m pytest tests/e2e -m oracle --timeout 3600

test-ep256: setup
	ATOLL_EP256_RESULTS=tests/bench/results/ep256.json $(BIN)/python -m pytest tests/e2e/test_ep256.py -m ep256 -s --timeout 1200

# as root: installs debootstrap and systemd-container where they are missing, boots two hosts, removes them again
test-systemd: setup
	ATOLL_SYSTEMD_RESULT=tests/systemd/result.json $(BIN)/python -m pytest tests/systemd -m systemd --timeout 1800 -s

# as root: installs Slurm and munge where they are missing, runs four nodes of it in a network namespace, removes all again
test-slurm: setup
	ATOLL_SLURM_RESULT=tests/slurm/result.json $(BIN)/python -m pytest tests/slurm -m slurm --timeout 1800 -s

demo: setup
	@$(BIN)/atoll demo

bench: setup
	$(BIN)/python -m tests.bench.transport --json tests/bench/results/transport.json
	$(BIN)/python -m tests.bench.cluster --out tests/bench/results/cluster.json
	$(BIN)/python -m tests.bench.serving --size small --out tests/bench/results/serving-small.json
	$(BIN)/python -m tests.bench.serving --size medium --tokens 32 --out tests/bench/results/serving-medium.json
	$(BIN)/python -m tests.bench.rebalance --size small --out tests/bench/results/rebalance.json
	$(BIN)/python -m tests.bench.placement --out tests/bench/results/placement.json
	$(BIN)/python -m tests.bench.router_cost --out tests/bench/results/router_cost.json --graph tests/bench/results/router_cost.svg
	$(BIN)/python -m tests.bench.report

# as root: four nodes in network namespaces, rate-limited; leaves nothing behind
bench-namespaces: setup
	$(BIN)/python -m tests.bench.namespaces --out tests/bench/results/namespaces.json
	$(BIN)/python -m tests.bench.report
