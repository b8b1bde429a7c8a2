# make demo   set everything up, start the stack, have its language model make a caption of a terse idea and its video
#             model the video: out/demo.mp4, out/demo.png, out/demo-timeline.html
# make test   set everything up, then linters, types and the whole test suite
#
# Both need only Python 3.11 or newer, pip and make.
#
# make gpu-check   on a machine with an NVIDIA GPU: the tests that need one, then the published Open-Sora 1.2 and language
#                  models of 7 billion weights measured with random weights, a few minutes; figures in out/gpu.json and
#                  out/gpu-llm.json. Without a GPU it fails.

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

# Small machines: many processes with one thread each, and threads that wait sleep.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

# One seed, so that the demo is the same video everywhere.
DEMO_PROMPT ?= ball go right, red
DEMO_SEED ?= 1

.PHONY: setup demo test lint gpu-check clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

demo: $(INSTALLED)
	@mkdir -p out
	$(BIN)/triptych video "$(DEMO_PROMPT)" --expand --seed $(DEMO_SEED) --start \
		-o out/demo.mp4 --sheet out/demo.png --timeline out/demo-timeline.html

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -m 'not alone' -n 2 --dist loadfile
	$(BIN)/pytest -m alone

gpu-check: $(INSTALLED)
	@mkdir -p out
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit( \
		"gpu-check: torch sees no GPU here, so that nothing was checked; this needs an NVIDIA GPU and its driver")'
	$(BIN)/pytest -m gpu
	$(BIN)/loadgen bench gpu --json out/gpu.json
	$(BIN)/loadgen bench gpu-llm --json out/gpu-llm.json

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
