# make demo   install, render the sample images, train on them (3 minutes on two cores), show the result
# make test   install and run all tests
# make check  ruff, format, types
# make bench  time the operations, an update, loading and k-NN (2 minutes); `.venv/bin/pytest-benchmark compare`
#             then shows what has changed since the runs before
# PYTHON=python3.12 make ...   another interpreter for the virtual environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/fastdino-data samples samples
	$(BIN)/fastdino-train demo --data samples/train --val samples/val --out runs/demo
	$(BIN)/fastdino-eval knn runs/demo --data samples/train --val samples/val --baselines
	@echo "curves     runs/demo/curves.png"
	@echo "attention  runs/demo/attention.png"
	@echo "teacher    runs/demo/teacher.safetensors"

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-bench
	$(BIN)/python -m pytest benchmarks/suite.py --benchmark-autosave --benchmark-disable-gc \
		--benchmark-group-by=group --benchmark-sort=name --benchmark-columns=min,median,iqr,rounds

clean:
	rm -rf $(VENV) build samples runs fastdino/*.so
