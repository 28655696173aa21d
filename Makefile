# Everything runs in .venv, which is made once from the package index and never borrows what the machine happens to have.
#   make demo   the main job          make test   the tests          make help   all targets
#   source .venv/bin/activate         afterwards, to type commands of your own

PYTHON ?= python3
KILLS  ?= 100
SEED   ?= 0
NAME   ?=
JOBS   ?= 2
GPU    ?=
STUDIES := prelora_vit lte_vit cs744_gpt2 cs744_galore cs744_pathmnist composition capacity factorize slow_network width384
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := runs/prelora_pocket-prelora_pocket-0
FULL   := runs/prelora_pocket-full-0
STAMP  := $(VENV)/.set-up

# A stranger's PYTHONPATH or activated environment must not leak into ours.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help demo demo-full test test-slow chaos lint docs matrix docs-test bench gpu studies study clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch and torchvision are resolved together from one index: a CPU-only torch next to the index's torchvision
# fails at import (operator torchvision::nms does not exist).
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: PYTHON=$(PYTHON): must be Python 3.10 or newer (make PYTHON=python3.12 ...)" >&2; exit 2; }
	@echo "setting up $(VENV), once: about 3 GB are downloaded (torch with its CUDA libraries), 6 GB on disk, some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed; on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check torch torchvision
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## Pre-train a pocket Vision Transformer with PreLoRA: minutes on two cores
	@echo "the demo: 12,000 embedded pictures, nothing more to download; 8 epochs, about two minutes on two idle cores"
	$(BIN)/python -m lowrank_pretrain method.frozen_dtype=auto ckpt_path=last hydra.run.dir=$(DEMO)
	$(BIN)/python -m lowrank_pretrain.report $(DEMO)

demo-full: demo ## Train the same steps in full, and draw both on one page
	$(BIN)/python -m lowrank_pretrain method=full ckpt_path=last hydra.run.dir=$(FULL)
	$(BIN)/python -m lowrank_pretrain.report $(FULL) $(DEMO) --out runs/demo.html

test: $(STAMP) ## Run the tests, two files at a time (JOBS=4 for more)
	$(BIN)/python -m pytest -m "not slow and not docs" -n $(JOBS) --dist loadfile

test-slow: $(STAMP) ## Run the tests that take longer than a few seconds each
	$(BIN)/python -m pytest -m slow

chaos: $(STAMP) ## Kill runs of every method 100 times, resume, compare bit for bit (KILLS=100 SEED=0)
	$(BIN)/python -m tests.chaos --kills $(KILLS) --seed $(SEED)

lint: $(STAMP) ## Check style, types, and which rooms import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(STAMP) ## Build the site from docs/ into site/ (open site/index.html)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "the site: site/index.html"

matrix: $(STAMP) ## Write docs/support-matrix.md from tests/matrix.py
	$(BIN)/python -m tests.matrix

docs-test: $(STAMP) ## Run every command of README and docs/, shortened
	$(BIN)/python -m pytest tests/test_docs.py -m docs

bench: $(STAMP) ## Measure speed and memory against peers (an idle machine, please)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@for file in $(filter-out benchmarks/gpu.py benchmarks/llama.py,$(sort $(wildcard benchmarks/[a-z]*.py))); do echo "$$file"; $(BIN)/python $$file || exit 1; done

gpu: $(STAMP) ## On a machine with a GPU: its tests and every benchmark at real sizes, 27 minutes (GPU="--device cpu --tiny" to try)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python benchmarks/gpu.py $(GPU)

studies: $(STAMP) ## All studies one after another, each from where it stopped (on two idle cores)
	@for name in $(STUDIES); do $(MAKE) --no-print-directory study NAME=$$name || failed="$$failed $$name"; done; \
	  test -z "$$failed" || { echo "error: not finished:$$failed" >&2; exit 1; }

study: $(STAMP) ## One study: make study NAME=prelora_vit
	@test -f experiments/$(NAME)/study.py || { echo "error: NAME=$(NAME): must be one of $(STUDIES)" >&2; exit 2; }
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m experiments.$(NAME).study

clean: ## Remove .venv and caches (runs/ stays)
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache src/*.egg-info
