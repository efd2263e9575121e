# Everything happens in .venv of this checkout. A second call finds it ready.
#
#   PYTHON       the interpreter that makes .venv (3.11 or newer; default python3.11, else python3)
#   TORCH        the version of torch for exports and tests
#   TORCH_INDEX  where to find a smaller, CPU-only build of torch, for example
#                make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= 2.13.0
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --retries 10 --timeout 60
TORCH_STAMP := $(VENV)/.torch-$(TORCH)
INSTALLED := $(VENV)/.installed
# For tests in processes of their own: transformers takes a torchvision that it finds for every image, and timm needs it;
# videos of SmolVLM need num2words.
TORCHVISION := build/torchvision/.installed
TIMM := build/timm/.installed

.PHONY: help demo test test-quick lint install clean

help:
	@echo "make demo     export the sample model and ask it about the example images"
	@echo "make test     the whole test suite"
	@echo "make test-quick  the part of it to run between two changes"
	@echo "make lint     ruff and mypy"
	@echo "make install  only set up .venv"
	@echo "make clean    remove .venv, caches and the demo's bundle"

demo: $(INSTALLED)
	$(BIN)/mllm-edge export examples/sample_vlm/model demo-bundle --recipe int4 --force
	$(BIN)/python examples/demo.py demo-bundle

test: $(INSTALLED) $(TORCHVISION) $(TIMM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadgroup

test-quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadgroup --quick

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mllm_edge benchmarks

install: $(INSTALLED)

clean:
	rm -rf $(VENV) demo-bundle build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3 found: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# torch comes first and exactly, so that nothing else chooses another build of it.
$(TORCH_STAMP): | $(BIN)/python
	$(PIP) install torch==$(TORCH) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	touch $@

$(INSTALLED): pyproject.toml $(TORCH_STAMP)
	$(PIP) install -e ".[export,cpu,guidance,rtx,test]"
	touch $@

$(TORCHVISION): $(INSTALLED)
	$(PIP) install --no-deps --upgrade --target $(@D) torchvision==0.28.0 num2words==0.5.14 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	touch $@

$(TIMM): $(INSTALLED)
	$(PIP) install --no-deps --upgrade --target $(@D) timm==1.0.31
	touch $@
