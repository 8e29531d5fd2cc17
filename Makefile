# Every target sets up .venv by itself: a fresh clone and one of these words is all it takes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test chaos parity bench bench-networks gpu fuzz check-gpu-code check-faults lint clean

demo: $(INSTALLED)
	$(BIN)/blip3o demo

test: $(INSTALLED)
	$(BIN)/pytest

# What training promises, put to the test: kill -9, damaged files and the rest. One row: make chaos ROWS="kill --times 20"
ROWS ?=
chaos: $(INSTALLED)
	$(BIN)/python tests/chaos.py $(ROWS)

# The released model's parts beside transformers, diffusers and EVA-CLIP by hand: the largest differences.
parity: $(INSTALLED)
	$(BIN)/python tests/parity.py

# Every op beside its peers; then the networks. The tables are printed, and kept in build/bench.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/ops.py --memory both --seconds 0.1 --json build/bench/ops.json --markdown build/bench/ops.md --plot build/bench

bench-networks: $(INSTALLED)
	$(BIN)/python benchmarks/model.py --json build/bench/model.json --markdown build/bench/model.md
	$(BIN)/python benchmarks/training.py --json build/bench/training.json --markdown build/bench/training.md

# What is worth doing on a machine with an NVIDIA GPU, in 20 minutes at most; run again, it goes on where it stopped.
OUT ?= build/gpu
gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py --out $(OUT)

# Random calls of every op under AddressSanitizer and UndefinedBehaviorSanitizer; `make fuzz CALLS=20000` is a short run.
CALLS ?= 1000000
fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz.py --calls $(CALLS)

# GPU code without a GPU. Machine code of every kernel: Triton's from launches that are recorded, CUDA's where nvcc is.
# CUDA's launches at full size, and its run on the host with some faults planted.
check-gpu-code: $(INSTALLED)
	$(BIN)/python tests/gpu_code.py --out build/gpu_code.md
	$(BIN)/pytest -m gpu_code

# With all faults: twelve minutes on two cores.
check-faults: $(INSTALLED)
	$(BIN)/python tests/cuda_on_host.py memory --faults
	$(BIN)/python tests/cuda_on_host.py races --faults
	$(BIN)/python tests/hopper_on_host.py memory --faults
	$(BIN)/python tests/hopper_on_host.py races --faults

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
