# make demo   fine-tune a real model on this machine, through notebook 17; leaves runs/demo/
# make test   every test and every notebook: `make code` is pytest, `make architectures` compiles every kernel for every
#             architecture, `make notebooks` runs the notebooks by papermill and by nbval, and examines stored answers
# make lab    JupyterLab on the course; as root: make lab LAB_FLAGS=--allow-root
# make sanitize   on a GPU: the tests of each kernel under compute-sanitizer, memcheck and racecheck
# Each makes its own virtual environment in .venv first. PYTHON=... names another interpreter, VENV=... another folder.

PYTHON ?= python3
VENV ?= .venv
LAB_FLAGS ?=
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export JUPYTER_PLATFORM_DIRS := 1

.PHONY: demo test code architectures notebooks lint lab sanitize clean

demo: $(VENV)/.installed
	mkdir -p runs
	if [ -e runs/demo ]; then mv runs/demo "runs/demo-before-$$(date +%Y%m%d-%H%M%S)"; fi
	@echo "The bar counts cells. It stands still while the model trains: about 4 minutes on 2 cores."
	$(BIN)/python -m papermill notebooks/17_finetune.ipynb runs/17_finetune.ipynb --cwd notebooks -p output ../runs/demo
	mv runs/17_finetune.ipynb runs/demo/
	@$(BIN)/python -c 'import json; m = json.load(open("runs/demo/metrics.json")); print("validation loss: %.3f before, %.3f after" % tuple(m[when]["validation_loss"] for when in ("before", "after")))'
	@echo "runs/demo/ holds the executed notebook, the adapter and metrics.json"
	@echo "to see the notebook: $(BIN)/jupyter lab runs/demo/17_finetune.ipynb"

test: lint code architectures notebooks

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

code: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

architectures: $(VENV)/.installed
	$(BIN)/python -m pytest -m architectures tests/test_portability.py

notebooks: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m course tests/test_notebooks.py tests/test_capstone.py tests/test_answers.py
	rm -rf build/notebooks
	$(BIN)/python tests/prepare_notebooks.py build/notebooks
	$(BIN)/python -m pytest --nbval-lax --nbval-cell-timeout 900 -p no:cacheprovider build/notebooks

lab: $(VENV)/.installed
	$(BIN)/jupyter lab --notebook-dir notebooks $(LAB_FLAGS)

sanitize: $(VENV)/.installed
	$(BIN)/python tests/sanitize.py

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fastkit needs Python 3.11 or newer, this is ' + sys.version.split()[0] + ': make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[notebooks,test]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
