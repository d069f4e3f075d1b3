# Every task of the project.  `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# with bytecode: pytest's rewritten assertions are kept for every worker and part, which takes each 5 s of CPU otherwise
# and with memory in huge pages, where the kernel gives them: a fork copies the table of all pages (the tests of engines and
# checkpoints, which fork much, took 8 % less)
PYTEST := env -u PYTHONDONTWRITEBYTECODE GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m pytest
CORES := $(shell getconf _NPROCESSORS_ONLN)
# More workers than cores, because many tests wait for servers, signals and processes: of the quick part, which computes, one
# more, of all three.  WORKERS=N instead.
more = $(shell echo $$(( $(CORES) + $(1) )))
QUICK := -m "not slow" -n $(or $(WORKERS),$(call more,1)) --dist worksteal
# in one call, because to collect the tests takes every worker seconds; by files, whose tests share what they build
TOGETHER := -m "not serial" -n $(or $(WORKERS),$(call more,3)) --dist loadfile --no-loadscope-reorder
# by their files: to import all the others takes seconds of one process
SERIAL := -m serial $$(grep -rlw mark.serial tests --include='test_*.py')
DEMO_ARGS ?=
DEMO_MINUTES ?= 15
FUZZ_SECONDS ?= 3600
FUZZ_SEED ?= 0
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-segment demo-detect demo-video proof ablations test test-fast test-gpu test-slurm fuzz bench lint format types clean

help:  ## list the tasks
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv with everything pinned (constraints.txt)

# torch first, and no build isolation: deepspeed and fairscale are source packages that look for torch when they are
# built, and in an isolated build they would fetch one of their own.
$(STAMP): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v else f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq -c constraints.txt torch torchvision numpy setuptools wheel packaging py-cpuinfo ninja
	$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup  ## pre-train and fine-tune on CIFAR-10, 2 processes, within DEMO_MINUTES=15; DEMO_ARGS="KEY=VALUE ..." overrides
	@$(BIN)/python scripts/demo.py --minutes $(DEMO_MINUTES) $(DEMO_ARGS)

demo-segment: setup  ## segmentation of composed scenes, from SimMIM weights and from none; apt or data/scenes; DEMO_ARGS
	@$(BIN)/python scripts/demo_segment.py $(DEMO_ARGS)

demo-detect: setup  ## detection: composed garments, from SimMIM weights and from none, and trees from the air; DEMO_ARGS
	@$(BIN)/python scripts/demo_detect.py $(DEMO_ARGS)

demo-video: setup  ## which way does the camera move?  clips of real footage; image weights, none, and one frame alone; DEMO_ARGS
	@$(BIN)/python scripts/demo_video.py $(DEMO_ARGS)

test: setup  ## the whole test suite: what may run side by side, what must be alone, and tests/gpu on a card, if there is one
	code=0; $(PYTEST) $(TOGETHER) || code=$$?; $(PYTEST) $(SERIAL) || code=$$?; \
	$(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || exit $$code; \
	$(PYTEST) tests/gpu && exit $$code

test-fast: setup  ## the quick part of the tests
	$(PYTEST) $(QUICK)

test-gpu: setup  ## the kernels and the step on the card of this machine; on the CPU, in an interpreter, without one
	$(PYTEST) tests/gpu

test-slurm: setup  ## the launch files on a real SLURM (Debian: apt-get install slurm-wlm munge)
	$(PYTEST) tests/slurm

fuzz: setup  ## strangers' files, mutated, for an hour; FUZZ_SECONDS=N FUZZ_SEED=N; inputs that fail stay in fuzz-failures/
	@$(BIN)/python -m tests.fuzz.campaign --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

bench: setup  ## the training step beside other implementations of SwinV2; BENCH_ARGS="--quick ..."
	@$(BIN)/python scripts/benchmark.py $(BENCH_ARGS)

proof: setup  ## does pre-training pay?  CIFAR-10 with 1, 10 and 100 % of the labels; two cores, less than two hours
	@$(BIN)/python scripts/proof.py

ablations: setup  ## SwinV2's norms, attention and position bias beside what they replaced; two cores, about an hour
	@$(BIN)/python scripts/fetch_cifar10.py --out data/cifar10
	@$(BIN)/python scripts/ablations.py

lint: setup  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## check types of the package
	$(BIN)/mypy

clean:  ## remove caches and builds (not runs, data or .venv)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
