# make venv | demo | test | check | docs | test-slow | test-gpu | gpu-kit | test-oldest | bench | reproduce | lock
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
export HF_HUB_OFFLINE ?= 1

.PHONY: venv demo test check docs test-slow test-gpu gpu-kit test-oldest bench reproduce lock

venv: $(READY)

# torch first and with its dependencies: which build it is decides what else it needs
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/pip install --quiet --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: venv
	$(BIN)/aletheia demo --out demo-run --overwrite

# tiny models: two tests at a time on one thread each are quicker than one test on two; tests of a file stay together
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# into build/docs; with --quiet, mkdocs would count no warnings. The variable silences an advertisement.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-slow: venv
	$(BIN)/python -m pytest -m slow

# a test that hangs says where after two minutes
GPU_TESTS := tests/test_gpu_steps.py tests/test_gpu_runs.py tests/test_liger.py tests/test_kernel_loss.py tests/test_torch_norms.py
test-gpu: venv
	$(BIN)/python -m pytest -m gpu -o faulthandler_timeout=120 $(GPU_TESTS)

# into .gpu-kit: what a machine with a GPU and no network needs; KIT has options, such as --with unsloth
gpu-kit: venv
	$(BIN)/python benchmarks/gpu_kit.py $(KIT)

# the lower bounds of pyproject.toml, in an environment of their own: the lock first, then what is older than it;
# import-linter is left out, as it asks for a newer rich
OLDEST := .venv-oldest
$(OLDEST)/ready: requirements-oldest.txt requirements.lock pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet $$(grep '^torch==' requirements-oldest.txt)
	grep -vE '^(#|torch=|import-linter=)' requirements.lock | $(OLDEST)/bin/pip install --quiet --no-deps -r /dev/stdin
	$(OLDEST)/bin/pip install --quiet -r requirements-oldest.txt
	$(OLDEST)/bin/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

test-oldest: $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2

bench: venv
	$(BIN)/python benchmarks/bench.py

# hours; an interrupted call goes on where it stopped
DATA ?= ../shared/data
CAMPAIGNS := speed behaviour-gsm8k behaviour-gsm8k-compute behaviour-instruct
reproduce: venv $(CAMPAIGNS:%=reproduce-%)

reproduce-%: venv
	$(BIN)/aletheia campaign run campaigns/$*.yaml --out results/$* --data-dir $(DATA); code=$$?; \
	$(BIN)/aletheia campaign report results/$* && \
	$(BIN)/python benchmarks/campaign_results.py results/$* docs/results/$* && exit $$code

lock: venv
	{ sed -n '/^#/p' requirements.lock; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//'; } > requirements.new
	mv requirements.new requirements.lock
