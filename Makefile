# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo app test test-all test-app lint table table-full pictures test-mmseg test-mmdet clean

demo: $(VENV)/.ready
	$(BIN)/cleandift demo --out demo

# A page where one sees the features, on this machine.
app: $(VENV)/.ready-app
	$(BIN)/cleandift app

# Its tests in headless Chromium, which apt installs if it is missing and we are root.
test-app: $(VENV)/.ready-dev $(VENV)/.ready-app
	@for name in chromium chromium-browser google-chrome; do command -v $$name > /dev/null && exit 0; done; \
	    { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
	    { echo "test-app needs Chromium: apt-get install chromium, as root" >&2; exit 1; }
	$(BIN)/python -c "import gradio, playwright"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/visualize/test_app.py tests/app

# The fast tests: minutes on two free cores.
test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=20

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mmsegmentation and mmdetection, in an environment of their own: mmdetection wants an older numpy.
MM_VENV ?= .venv-mm
MM := $(MM_VENV)/bin/python
MM_TEST = $(MM) -c "import mmseg, mmdet, mmcv.ops" && OMP_NUM_THREADS=1 $(MM) -m pytest -n 2

test-mmseg: $(MM_VENV)/.ready
	$(MM_TEST) tests/mm/test_mm.py tests/mm/test_mm_checks.py tests/mm/test_mmseg.py tests/test_fixtures_mm.py
	$(MM) -m pytest tests/test_wheel.py -k mmseg

test-mmdet: $(MM_VENV)/.ready
	$(MM_TEST) tests/mm/test_mm_configs.py tests/mm/test_mmdet.py

# The compiled operators are kept outside the checkout, see tools/build_mmcv.sh.
$(MM_VENV)/.ready: pyproject.toml setup.py tools/build_mmcv.sh
	$(PYTHON) -m venv $(MM_VENV)
	$(MM) -m pip install --quiet torch torchvision
	tools/build_mmcv.sh $(MM)
	$(MM) -m pip install --quiet --editable ".[mmseg,mmdet,text]" pytest pytest-xdist "setuptools>=77,<82"
	touch $@

# The held-out pictures (needs npm), and the tables of docs/results.md: on 120 concepts (minutes on two cores), and on
# all of them over six timesteps (more than an hour).
data/emoji: $(VENV)/.ready-dev
	$(BIN)/python tools/tiny/make_pictures.py --out data/emoji

table: data/emoji
	$(BIN)/cleandift evaluate --suite emoji --data data/emoji --out results

table-full: data/emoji
	$(BIN)/cleandift evaluate --suite emoji --full --data data/emoji --out results/full

$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/.ready-app: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

clean:
	rm -rf $(VENV) $(MM_VENV) demo build *.egg-info
