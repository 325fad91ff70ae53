#!/bin/sh
# Makes the neuron files of the demo model that ship with the project, from the project's built-in texts.
# A few minutes on two cores. Started again, it goes on where it was interrupted and does nothing that is done.
set -e
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}"
MODEL=models/SmolLM2-135M-Instruct
OUT=neuron_files/SmolLM2-135M-Instruct

profile() { # task type, the prompt as partinfer.py puts it to a model with a chat template
  "$PYTHON" -m profiler run --dataset builtin --task_type "$1" --template "$2" --chat_template \
    --checkpoint_path "$MODEL" --max_new_tokens 64 --batch_size 16 --resume
}

profile QA '{text}'
profile Summarize 'Summarize the following document:
{text}'
profile translate_de_en 'Translate from German to English. Answer with the translation only.
{text}'
[ -f "$OUT/model.safetensors" ] ||
  "$PYTHON" -m profiler merge "$OUT/qa.safetensors" "$OUT/summarize.safetensors" "$OUT/translate_de_en.safetensors" \
    --output "$OUT/model.safetensors"
[ -f "$OUT/random.safetensors" ] ||
  "$PYTHON" -m profiler random --checkpoint_path "$MODEL" --output "$OUT/random.safetensors"
