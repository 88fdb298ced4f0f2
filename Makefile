# Every target sets itself up from nothing: the first one run creates .venv with the exact versions
# of constraints.txt.
# PYTHON picks the interpreter (3.11 or newer); VENV the environment's folder.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EVAL := .venv-eval
DOCS_STAMP := $(VENV)/.docs-installed
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := 5.17.0
NEWEST := .venv-newest
# prints the declared requirement, as in "transformers>=5.17,<6"
DECLARED := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(next(d for d in project["dependencies"] if d.startswith("transformers")))
# what depends on the version of transformers: hooks, identities, reference traces, README, one type
# of each kind of attention
FACING := tests/test_readme.py tests/avl tests/avl_analysis/capture \
  tests/avl_analysis/conformance/test_types.py::test_a_representative_type_is_what_the_table_says
OUT ?= out
WORKERS ?= 2

# Two test processes with one thread each: two OpenMP pools on the same cores slow each other down
# many times over.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup report docs test test-slow test-oldest test-newest test-eval app check \
  format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything the other targets need

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { \
	  python=$${PYTHON:-}; \
	  for candidate in python3.11 python3.12 python3.13 python3; do \
	    test -z "$$python" \
	      && $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	      && python=$$candidate; \
	  done; \
	  test -n "$$python" || { \
	    echo "make: no Python >= 3.11 found; install one or name it:" \
	      "make setup PYTHON=/path/to/python" >&2; \
	    exit 1; }; \
	  $$python -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
	  --editable '.[app,ray,zarr,test,dev]'
	@touch $@

report: setup ## record the embedded model and build the report in out/report
	$(BIN)/avl report --out $(OUT)/report

test: setup ## run the tests (the slow ones apart: make test-slow)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-slow: setup ## run the slow tests
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m slow --timeout 1800 $(ARGS)

test-oldest: $(OLDEST)/.installed ## run the model-facing tests on the oldest supported transformers
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -n $(WORKERS) $(FACING) $(ARGS)

# A new release is noticed here and not by users, so what pip chooses is looked up every time.
test-newest: $(NEWEST)/.made ## run the model-facing tests on the newest transformers of today
	$(NEWEST)/bin/python -m pip install --quiet --upgrade "$$($(NEWEST)/bin/python -c '$(DECLARED)')"
	$(NEWEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(TEST_ENV) $(NEWEST)/bin/python -m pytest -n $(WORKERS) $(FACING) $(ARGS)

$(OLDEST)/.installed: $(OLDEST)/.made
	$(OLDEST)/bin/python -m pip install --quiet --upgrade 'transformers==$(OLDEST_TRANSFORMERS)'
	@touch $@

# Only transformers and what it insists on is installed anew; everything else is looked up in
# $(VENV).
$(OLDEST)/.made $(NEWEST)/.made: %/.made: $(STAMP)
	$(BIN)/python -m venv $*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$*/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

docs: $(DOCS_STAMP) ## build the site in out/docs, running its notebooks, and check its links
	$(TEST_ENV) $(BIN)/python -m sphinx -W --keep-going -q -b html docs $(OUT)/docs
	$(BIN)/python docs/check_links.py $(OUT)/docs

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

test-eval: $(EVAL)/.installed ## run lmms-eval with policies, in an environment of its own
	$(TEST_ENV) PYTHONPATH=tests/avl_analysis/lmms/stubs $(EVAL)/bin/python -m pytest -n0 -m slow \
	  tests/avl_analysis/lmms $(ARGS)

$(EVAL)/.installed: $(STAMP) tests/avl_analysis/lmms/requirements.txt
	$(BIN)/python -m venv $(EVAL)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(EVAL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(EVAL)/bin/python -m pip install --quiet --no-deps -r tests/avl_analysis/lmms/requirements.txt
	$(EVAL)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

app: setup ## start the dashboard on this machine only
	$(BIN)/avl app

check: setup ## lint, formatting, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove built files, not the environment
	rm -rf $(OUT) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
