VENV ?= .venv
PYTHON ?= python3
DATA ?= data
OUT ?= runs/deep

raw := $(DATA)/FashionMNIST/raw
bin := $(VENV)/bin
stamp := $(VENV)/.installed
tools := $(VENV)/.installed-tools
# A process for each core, with one thread each.
pytest := OMP_NUM_THREADS=1 $(bin)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: help setup data train test test-slow lint docs site bench gate gpu gpu-rehearsal

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(stamp) ## environment in VENV (.venv): the package with what training needs

$(stamp): setup.py pyproject.toml
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet -e '.[train]'
	touch $@

# What tests and checks need besides, the libraries whose models are converted included.
$(tools): $(stamp)
	$(bin)/python -m pip install --quiet -e '.[train,dev,docs,compat]'
	touch $@

# Without the Debian package, `efficient-densenet train` downloads the data itself.
data: ## Fashion-MNIST from Debian's package into DATA (data), where there is apt
	test -e $(raw) || { mkdir -p $(dir $(raw)) && folder=$$(mktemp -d) && (cd $$folder && \
		apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .) && \
		mv $$folder/usr/share/datasets/fashion-mnist $(raw); rm -rf $$folder; } || true

train: setup data ## train a DenseNet-BC of 250 layers into OUT (runs/deep), or resume it there
	$(bin)/efficient-densenet train --model cifar-bc --depth 250 --growth-rate 6 --image-size 14 \
		--batch-size 64 --train-size 1920 --epochs 3 --data-dir $(DATA) --out $(OUT) --resume

test: $(tools) ## the tests, but for the slow ones
	$(pytest) -m "not slow"

test-slow: $(tools) ## the slow tests
	$(pytest) -m slow

lint: $(tools) ## ruff (check and format) and mypy
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

docs: $(tools) ## generated pages, tables and pictures from docs/results; which results are stale
	$(bin)/python -m docs.tables

site: $(tools) ## the documentation as a site, into build/site
	$(bin)/python -m sphinx -W --keep-going -q docs build/site

bench: $(tools) ## time and memory of a step, each competitor checked first
	$(bin)/python -m pytest benchmarks/ --benchmark-only

gate: setup ## has a step of ours grown beyond the committed baseline?
	$(bin)/python -m benchmarks.gate

# These two make no environment and fetch nothing: PYTHON has torch, torchvision, Triton and pytest.
# The programme keeps to its time by itself; `timeout` is for a driver that hangs.
gpu: ## tests and measurements on a GPU with PYTHON (python3)
	PYTHONPATH=. timeout --kill-after=5 530 $(PYTHON) -m benchmarks.gpu $(GPU_OPTIONS)

gpu-rehearsal: ## the same without a GPU: its numbers mean nothing
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --rehearse $(GPU_OPTIONS)
