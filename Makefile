# Works on a fresh machine with Python 3.11 or newer and make: `make demo`, `make test`.

VENV := .venv
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python3.13 python3.14; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
LOCK_VENV := build/lock
# A worker of pytest-xdist for each core; one that has no test left takes over half of another's.
ALL_TESTS := --numprocesses auto --maxprocesses 8 --dist worksteal --durations 10
DEBIAN := redis-server chromium openssl
CEPH := ceph-mon ceph-mgr ceph-osd radosgw
# Slurm's programs are slurmctld, slurmd and their clients; the package brings them all, and starts none of them.
SLURM := slurm-wlm munge
# Commands of PBS, in front of Slurm.
PBS := slurm-wlm-torque

.DEFAULT_GOAL := help
.PHONY: help demo demo-slurm test check bench bench-deadlines bench-live bench-push chaos conformance lock debian clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.platform ## real triggers in, right answers out, on a platform of its own; STAY=1 leaves it up
	@$(PY) -P -m infra demo $(if $(filter-out 0,$(STAY)),--stay)

demo-slurm: $(VENV)/.platform debian ## a run stop, a simulation in the queue of a real Slurm, the answer in time
	@$(PY) -P -m infra demo --slurm

test: $(VENV)/.dev debian ## all tests, on real servers; ARGS="-k word" goes to pytest, and they run one after the other
	@$(PY) -m pytest $(or $(ARGS),$(ALL_TESTS))

check: $(VENV)/.dev ## format, lint and types
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

bench: $(VENV)/.platform ## the figures of the README, measured here
	@$(PY) -P -m infra.bench $(ARGS)

chaos: $(VENV)/.platform debian ## faults injected from outside, all counted; ARGS="--seed 7 --scale 0.1 F1 F5" chooses
	@$(PY) -P -m infra.chaos $(ARGS)

bench-deadlines: $(VENV)/.platform ## deadlines met in simulated time, against other orders and an oracle
	@$(PY) -P -m infra.bench.deadlines $(ARGS)

conformance: $(VENV)/.dev debian ## other people's tests: PSI/J's own of executors, on ours
	@$(PY) -P -m tests.psij_suite $(ARGS)

bench-live: $(VENV)/.platform ## deadlines met on a real platform under twice its load, with lanes and without
	@$(PY) -P -m infra.bench.live $(ARGS)

bench-push: $(VENV)/.platform debian ## how soon after the end of a job on a real Slurm its follow-up runs
	@$(PY) -P -m infra.bench.push $(ARGS)

# ---------------------------------------------------------------- installing

$(PY):
	@test -n "$(PYTHON)" || { echo "Headrace needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "On Debian: apt-get install python3-venv"; exit 1; }

# Everything comes from the lock with its hash; the package itself is then linked without asking any index again.
$(VENV)/.platform: requirements.lock pyproject.toml | $(PY)
	@echo "Installing Headrace into $(VENV)"
	@$(PIP) install --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.lock pyproject.toml | $(PY)
	@echo "Installing Headrace and what its tests need into $(VENV)"
	@$(PIP) install --require-hashes -r requirements-dev.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

debian:
	@missing=""; for p in $(DEBIAN); do command -v $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	command -v mkfs.ext4 >/dev/null 2>&1 || missing="$$missing e2fsprogs"; \
	for p in $(CEPH); do command -v $$p >/dev/null 2>&1 || { missing="$$missing $(CEPH) ceph-common"; break; }; done; \
	PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null 2>&1 || missing="$$missing $(SLURM)"; \
	command -v qsub >/dev/null 2>&1 || missing="$$missing $(PBS)"; \
	test -z "$$missing" && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		echo "Installing$$missing"; \
		export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; \
		{ apt-get -qq update && apt-get -qq install --yes --no-install-recommends -o DPkg::Lock::Timeout=300 $$missing; } >/dev/null \
		|| echo "Could not install$$missing: tests that need them are skipped"; \
	else echo "Not installed:$$missing. Tests that need them are skipped"; fi

# ---------------------------------------------------------------- keeping

lock: ## choose the newest allowed versions anew and write both lock files
	@$(PYTHON) -m venv $(LOCK_VENV) && $(LOCK_VENV)/bin/pip install --quiet --upgrade uv
	@$(LOCK_VENV)/bin/uv pip compile $(LOCK_OPTIONS) --extra platform --output-file requirements.lock
	@$(LOCK_VENV)/bin/uv pip compile $(LOCK_OPTIONS) --extra platform --extra dev --constraints requirements.lock \
		--output-file requirements-dev.lock

LOCK_OPTIONS := pyproject.toml --group build --universal --python-version 3.11 --generate-hashes --upgrade --quiet \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

clean: ## remove what was installed and built
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
