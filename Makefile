# Every target prints the plain commands it runs; without make, copy them from here.
PYTHON ?= python3
MODEL = models/SmolLM2-135M-Instruct
RUN = .venv/bin/python

.PHONY: demo test fast lint install model clean

demo: install model  ## a real model answers, 70 % of its FFN neurons loaded, 40 % computed
	$(RUN) partinfer.py --function predefined_prompts --num_tokens_to_generate 64

test: install model lint  ## everything, on tiny random models and on the demo model
	$(RUN) -m pytest -m "not slow"

fast: install  ## the tests that need no model
	$(RUN) -m pytest -m "not slow and not model"

lint: install
	$(RUN) -m ruff check .
	.venv/bin/lint-imports

install: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch .venv/installed

model: install $(MODEL)

$(MODEL): | .venv/installed
	$(RUN) download.py --model_name smollm2-135m --keep_gguf

clean:  ## removes the environment and what was downloaded
	rm -rf .venv models datasets results
