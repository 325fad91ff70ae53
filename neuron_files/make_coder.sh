#!/bin/sh
# Makes the neuron file of Qwen2.5-Coder-1.5B-Instruct that ships with the project, from the project's built-in questions.
# Some 25 minutes on two cores, with up to 20 GB of memory for the gradients of the byte ladder.
set -e
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}"
TEXTS="--checkpoint_path models/Qwen2.5-Coder-1.5B-Instruct --dataset builtin --task_type QA --chat_template"

# shellcheck disable=SC2086 # several arguments
"$PYTHON" -m profiler run $TEXTS --limit 202 --resume
# shellcheck disable=SC2086
"$PYTHON" -m profiler loss neuron_files/Qwen2.5-Coder-1.5B-Instruct/qa.safetensors --ladder $TEXTS
