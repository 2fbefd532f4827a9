# What a change must pass; .ci/run does the same in an environment of its own.
PYTHON ?= .venv/bin/python

.PHONY: check lint types test docs
check: lint types test

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -n 2 --dist worksteal

docs: # the site, into site/; needs pip install -e '.[docs]'
	$(PYTHON) docs/site/build.py
