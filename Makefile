# Every command sets itself up: Python 3.11 or newer, make and git are all that a machine needs.
# A stamp file remembers an installation, so a second call goes straight to work.

# The interpreters tried for .venv, in order: `make test PYTHONS=/path/to/python` picks another.
PYTHONS ?= python3.11 python3 python3.12 python3.13 python3.14
# The candidates for `make test-next`: the newest one found is taken.
NEXT_PYTHONS ?= python3 $(foreach minor,13 14 15 16,python3.$(minor)) \
	$(wildcard $(HOME)/.pyenv/versions/*/bin/python3.1[3-9])

# Python compiles what is imported when it is; of what is installed that is little.
PIP_INSTALL := bin/python -m pip install --quiet --disable-pip-version-check --no-compile
BENCHMARKS := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))
INPUTS := requirements.txt pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test bench test-next lint dev clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.jkd-run  ## train on bundled data: from a fresh machine to a table and a plot
	.venv/bin/python -m experiments.train --config configs/energy_kd.py --workdir runs/demo --config.only=ce,kd,energy_kd

test: .venv/.jkd-dev  ## the whole suite, with the slowest tests listed
	.venv/bin/python -m pytest

bench: .venv/.jkd-run  ## the side-by-side benchmarks, one after another
	@test -n "$(BENCHMARKS)" || { echo "make bench: there is no benchmarks/*.py to run." >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do \
	  echo "== $$script"; .venv/bin/python -m "benchmarks.$$(basename "$$script" .py)"; \
	done

test-next: .venv-next/.jkd-dev  ## the suite on the newest Python (3.13 or newer) and the newest JAX
	.venv-next/bin/python -m pytest

lint: .venv/.jkd-dev  ## the pre-commit hooks on every file
	.venv/bin/pre-commit run --all-files

dev: .venv/.jkd-dev  ## only set .venv up, for work on the code

clean:  ## remove what the other targets made: environments, runs, caches
	rm -rf .venv .venv-next runs out build dist .cache *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/pip:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    exec "$$python" -m venv .venv; \
	  fi; \
	done; \
	echo "jkd needs Python 3.11 or newer: install it, or name one with PYTHONS=/path/to/python." >&2; \
	exit 1

.venv/.jkd-run: $(INPUTS) | .venv/bin/pip
	@echo "Installing jkd into .venv (about a minute, once)"
	.venv/$(PIP_INSTALL) --editable .
	@touch $@

# With what runs need: one installation, not two that look everything up.
.venv/.jkd-dev: $(INPUTS) | .venv/bin/pip
	@echo "Installing jkd and its tools into .venv (about a minute, once)"
	.venv/$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ .venv/.jkd-run

# One line "version path" a candidate that runs, is a final release and is new enough; the newest wins.
.venv-next/.jkd-dev: $(INPUTS)
	@test -x .venv-next/bin/pip || { \
	  newest=$$(for python in $(NEXT_PYTHONS); do \
	    "$$python" -c 'import sys; v = sys.version_info; \
	      v >= (3, 13, 0, "final") and print(v.major * 10**6 + v.minor * 10**3 + v.micro, sys.executable)' \
	      2>/dev/null; \
	  done | sort -n | tail -n 1 | cut -d ' ' -f 2-); \
	  if test -z "$$newest"; then \
	    echo "make test-next: no Python 3.13 or newer on PATH or in ~/.pyenv/versions." >&2; exit 1; \
	  fi; \
	  echo "Using $$newest"; "$$newest" -m venv .venv-next; }
	@echo "Installing jkd into .venv-next (about a minute, once)"
	.venv-next/$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
