# The checks that a change must pass. `make check` runs what .ci/run runs, in the current environment.
.PHONY: check lint test long docs

check: lint test

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

test:
	pytest

long:
	pytest -m long

docs:
	mkdocs build --strict
