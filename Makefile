# make setup | data | train | test | lint | bench | gate | gpu | gpu-rehearsal

VENV ?= .venv
PYTHON ?= python3
DATA ?= data
OUT ?= runs/deep

bin := $(VENV)/bin
stamp := $(VENV)/.installed
tools := $(VENV)/.installed-tools

.PHONY: setup data train test lint bench gate gpu gpu-rehearsal

setup: $(stamp)

$(stamp): setup.py pyproject.toml
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet -e '.[train]'
	touch $@

# What tests and checks need beside: the libraries whose models are converted, too.
$(tools): $(stamp)
	$(bin)/python -m pip install --quiet -e '.[train,dev,compat]'
	touch $@

# Without the Debian package, `efficient-densenet train` downloads the data itself.
data:
	test -e $(DATA)/FashionMNIST/raw || sh scripts/debian_data.sh $(DATA)/FashionMNIST/raw || true

# Takes the same run up again if it was interrupted.
train: setup data
	$(bin)/efficient-densenet train --model cifar-bc --depth 250 --growth-rate 6 --image-size 14 \
		--batch-size 64 --train-size 1920 --epochs 3 --data-dir $(DATA) --out $(OUT) --resume

# A process for each core, with one thread each.
test: $(tools)
	OMP_NUM_THREADS=1 $(bin)/python -m pytest --numprocesses auto --dist worksteal

lint: $(tools)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

bench: $(tools)
	$(bin)/python -m pytest benchmarks/ --benchmark-only

gate: setup
	$(bin)/python -m benchmarks.gate

# These two make no environment and fetch nothing: PYTHON has torch, torchvision, Triton and pytest.
# The programme keeps to its time by itself; `timeout` is for a driver that hangs.
gpu:
	PYTHONPATH=. timeout --kill-after=5 530 $(PYTHON) -m benchmarks.gpu $(GPU_OPTIONS)

gpu-rehearsal:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --rehearse $(GPU_OPTIONS)
