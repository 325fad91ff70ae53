# Every target prints the plain commands it runs; without make, copy them from here.
PYTHON ?= python3
MODEL ?= smollm2-135m
RUN = .venv/bin/python

.PHONY: demo test fast gpu lint install model browser clean

demo: install  ## a real model answers each prompt twice, dense and with the fewest bytes that keep its answers
	$(RUN) download.py --model_name $(MODEL) --keep_gguf
	$(RUN) partinfer.py --function compare --model_name $(MODEL) --num_tokens_to_generate 64

test: install model lint  ## everything, on tiny random models and on the demo model
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

fast: install  ## the tests that need no model
	$(RUN) -m pytest -m "not slow and not model"

gpu: install model  ## what only a machine with a GPU can prove, in 10 minutes: tests, then speeds
	$(RUN) -m pytest -m cuda
	$(RUN) -m pytest tests/transformers_patches/kernels/triton -m "not slow"
	$(RUN) benchmarks/gpu.py --seconds 420

lint: install
	$(RUN) -m ruff check .
	.venv/bin/lint-imports

install: .venv/installed

.venv/installed: requirements.txt requirements-serve.txt requirements-terminal.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch .venv/installed

model: install models/SmolLM2-135M-Instruct

models/SmolLM2-135M-Instruct: | .venv/installed
	$(RUN) download.py --model_name smollm2-135m --keep_gguf

browser:  ## Debian's Chromium, for the tests of the chat page, which are skipped without one
	command -v chromium || (apt-get update -q && apt-get install -y -q --no-install-recommends chromium)

clean:  ## removes the environment and what was downloaded
	rm -rf .venv models datasets results
