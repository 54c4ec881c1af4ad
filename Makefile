# The checks that a change must pass. `make check` runs what .ci/run runs, in the current environment.
.PHONY: check lint test long versions docs release

check: lint test

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

test:
	pytest -n 2

long:
	pytest -m long

versions:  # in new environments with the lowest and the newest versions
	tests/versions.sh

release:  # builds and checks what would be uploaded
	tests/release.sh

docs:
	mkdocs build --strict
