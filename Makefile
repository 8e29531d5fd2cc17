# Every target sets up .venv by itself: a fresh clone and one of these words is all it takes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/blip3o demo

test: $(INSTALLED)
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Editable: Python files are used where they lie; a changed native source installs again.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $(INSTALLED)

clean:
	rm -rf build .venv
