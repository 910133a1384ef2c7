# `make demo` and `make test` set everything up in .venv; all they need is Python 3.11 or newer, with
# its venv module, and make.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet
PYTEST_ARGS ?=

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Memory in large pages, see jaxft/huge_pages.py; the command `jaxft` asks for them itself.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help demo test check format clean

help:
	@echo "make demo     teaches a small model a subject; pictures before and after, a webui file"
	@echo "make test     formatting, lint, types, tests      (PYTEST_ARGS='-k resume' for some tests)"
	@echo "make check    formatting, lint, types"
	@echo "make format   formats the code"
	@echo "make clean    removes what the demo and the tests wrote; .venv and exps/ stay"

demo: $(VENV)/demo.stamp
	python scripts/demo.py

# pytest comes last: its summary closes the output. Two processes share the files of tests.
test: check
	python -m pytest --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

check: $(VENV)/test.stamp
	ruff format --check
	ruff check
	pyright

format: $(VENV)/test.stamp
	ruff format
	ruff check --fix

clean:
	rm -rf demo output build dist .cache .hypothesis .pytest_cache .ruff_cache

# A stamp is as old as the last installation: it is repeated when pyproject.toml changes.
$(VENV)/demo.stamp: EXTRA =
$(VENV)/test.stamp: EXTRA = [test]
$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.$(EXTRA)'
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "jaxft needs Python 3.11 or newer; name one: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "this Python lacks its venv module (Debian: python3-venv)"; exit 1; }
