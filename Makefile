# The README's two commands.  Each makes .venv where there is none; PYTHON and PIP_FLAGS may be set on the command line.
PYTHON ?= python3
PIP_FLAGS ?=
SOURCES := pyproject.toml constraints.txt LICENSE README.md \
	$(shell find cli kernels methods model samplers weights -type f -not -name '*.pyc')

.PHONY: demo test

demo: .venv/demo.stamp
	.venv/bin/diaphane demo --out out/demo

test: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	OMP_NUM_THREADS=1 .venv/bin/pytest -q -n auto --maxprocesses 4 --dist loadfile

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diaphane needs Python 3.11 or later: name one with  make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }

.venv/demo.stamp: .venv/bin/python $(SOURCES)
	.venv/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt .
	@touch $@

.venv/test.stamp: .venv/bin/python $(SOURCES)
	.venv/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt '.[test]'
	@touch $@ .venv/demo.stamp
