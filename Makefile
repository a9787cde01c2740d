# etastar. Every target sets itself up first; `make` alone lists them.

PRESET ?= auto
STUDY ?= all
MINUTES ?=
BENCH ?=
TEST_WORKERS ?= 2

PYTHON = $(shell for p in python3.12 python3.11 python3; do \
  $$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PY := .venv/bin/python
ETASTAR := $(PY) -m etastar.cli
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_WORKERS)
STAMP := .venv/.setup-$(shell { cat requirements.lock pyproject.toml; pwd; } | cksum | cut -d ' ' -f 1)

.PHONY: help setup reproduce test test-all lint lab data report bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv from requirements.lock (Python 3.11 or newer is needed; done once per lock)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "etastar needs Python 3.11 or newer with its venv module: no python3.12, python3.11 or \
	python3 here is one (on Debian and Ubuntu: apt install python3 python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --requirement requirements.lock
	$(PY) -m pip install --no-deps --no-build-isolation --editable .
	@rm -f .venv/.setup-* && touch $@

reproduce: $(STAMP) ## run the notebooks, write results/PRESET/report.html [PRESET=auto|smoke|cpu|night|gpu|paper] [STUDY=all|NAME] [MINUTES=M]
	$(ETASTAR) reproduce --preset $(PRESET) --study $(STUDY) $(if $(MINUTES),--minutes $(MINUTES))

test: $(STAMP) ## the quick tests, a few minutes on two cores
	$(PYTEST) -m "not slow and not browser"

test-all: $(STAMP) ## all tests, the slow ones and those that need Chromium, a GPU or published logs too
	$(PYTEST)

lint: $(STAMP) ## ruff over code and notebooks; notebooks must hold no outputs
	$(PY) -m ruff check .
	$(PY) -m nbstripout --verify --keep-id notebooks/*.ipynb

lab: $(STAMP) ## JupyterLab on 127.0.0.1; it prints the address with its token
	$(PY) -m jupyterlab --ServerApp.ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root)

data: $(STAMP) ## download the published run logs and check their sha256
	$(ETASTAR) fetch archives

report: $(STAMP) ## write the report of a preset's results again [PRESET=]
	$(ETASTAR) report --preset $(PRESET)

bench: $(STAMP) ## speed and memory of this machine beside named references [BENCH=train|optimizer|fits|data|plan]
	$(ETASTAR) bench $(BENCH)

clean: ## remove caches, build products and results/; runs/, kept evaluations and .venv stay
	@test ! -d results || find results -mindepth 1 -maxdepth 1 ! -name evaluations -exec rm -rf {} +
	rm -rf build dist lib/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find lib tests notebooks -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +
