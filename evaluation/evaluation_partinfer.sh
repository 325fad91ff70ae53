#!/usr/bin/env bash
# The experiments of the original: six configurations over eight tasks. Every variable below can be set in the
# environment; a run whose result is already in $OUTPUT_PATH is skipped, so an interrupted series can be started again.
#
#   METHOD                       all, or one of partinfer, original, dense, coreinfer, coreinfer_random_loading
#                                (original: partinfer as it was published; all: the six with partinfer as it is now)
#   USE_PARTINFER_IMPROVEMENTS   dense and coreinfer with partial loading: true, false, or both
#   TASKS, INCLUDE_PATH          other tasks, by name, and a folder with own task YAMLs
#   DATA_DIR                     where the local_* tasks find their files
#   *_NEURONS_FILEPATH           neuron files; not set, they are looked up in neuron_files/<model>/
#   DRY_RUN=true                 print the commands only
#
# Example: MODEL_NAME=SmolLM2-135M-Instruct TASKS="local_piqa local_squad" DATA_DIR=~/data LIMIT=100 \
#            evaluation/evaluation_partinfer.sh
set -u

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

: "${PYTHON:=python3}"
: "${MODEL_NAME:=Llama-3.2-3B}"
: "${METHOD:=all}"
: "${USE_PARTINFER_IMPROVEMENTS:=both}"
: "${TASKS:=triviaqa squadv2 piqa mlqa_en_en wmt16-de-en wmt16-ro-en cnn_dailymail xsum}"
: "${INCLUDE_PATH:=}"
: "${DATA_DIR:=${PARTINFER_DATA_DIR:-}}"
: "${OUTPUT_PATH:=$here/../results}"
: "${LIMIT:=}"
: "${SHUFFLE:=false}" # draw the LIMIT rows with SEED instead of taking the first
: "${NUM_FEWSHOT:=}"
: "${BATCH_SIZE:=1}"
: "${SEED:=0}"
: "${TOKEN_SPARSITY:=0.2}"
: "${SPARSITY:=0.4}"
: "${START_NUM:=}"
: "${END_NUM:=}"
: "${BASE_NEURONS_PERCENT:=}" # 0.3, or SPARSITY where that is smaller
: "${BASE_NEURONS_TYPE:=dataset}"
: "${LOADED_NEURONS_PERCENT:=}" # 0.7, or SPARSITY where that is larger
: "${QA_NEURONS_FILEPATH:=}"
: "${SUMMARIZE_NEURONS_FILEPATH:=}"
: "${TRANSLATE_NEURONS_FILEPATH:=}"
: "${MODEL_NEURONS_FILEPATH:=}"
: "${RANDOM_NEURONS_FILEPATH:=}"
: "${PREFILL_TOKENS:=256}"
: "${SCORED_TOKENS:=128}"
: "${DRY_RUN:=false}"

wrong_usage() {
  echo "error: $1" >&2
  exit 2
}

# The configurations of a method: without partial loading, with it, or both.
forms() {
  case "$USE_PARTINFER_IMPROVEMENTS" in
    true) echo "$1+partial" ;;
    false) echo "$1" ;;
    both) echo "$1,$1+partial" ;;
    *) return 1 ;;
  esac
}

dense="$(forms dense)" && coreinfer="$(forms coreinfer)" ||
  wrong_usage "USE_PARTINFER_IMPROVEMENTS must be true, false or both, got $USE_PARTINFER_IMPROVEMENTS"
case "$METHOD" in
  all) methods="$dense,partinfer,$coreinfer,coreinfer_random_loading" ;;
  dense) methods="$dense" ;;
  coreinfer) methods="$coreinfer" ;;
  partinfer | original | coreinfer_random_loading) methods="$METHOD" ;;
  *) wrong_usage "METHOD must be all, partinfer, original, dense, coreinfer or coreinfer_random_loading, got $METHOD" ;;
esac

# The neuron file of a task's group, empty if it is to be looked up.
neurons_of() {
  case "$1" in
    *cnn_dailymail* | *xsum* | *samsum*) echo "$SUMMARIZE_NEURONS_FILEPATH" ;;
    wmt* | *translation*) echo "$TRANSLATE_NEURONS_FILEPATH" ;;
    *wikitext*) echo "" ;;
    *) echo "$QA_NEURONS_FILEPATH" ;;
  esac
}

failed=()
for task in $TASKS; do
  command=("$PYTHON" "$here/evaluate_task.py" --task_name "$task" --model_name "$MODEL_NAME" --method "$methods"
    --sparsity "$SPARSITY" --token_sparsity "$TOKEN_SPARSITY" --base_neurons_type "$BASE_NEURONS_TYPE"
    --prefill_tokens "$PREFILL_TOKENS" --scored_tokens "$SCORED_TOKENS"
    --batch_size "$BATCH_SIZE" --seed "$SEED" --output_path "$OUTPUT_PATH" --skip_finished)
  neurons="$(neurons_of "$task")"
  [[ -n "$neurons" ]] && command+=(--dataset_neurons_filepath "$neurons")
  [[ -n "$MODEL_NEURONS_FILEPATH" ]] && command+=(--model_neurons_filepath "$MODEL_NEURONS_FILEPATH")
  [[ -n "$RANDOM_NEURONS_FILEPATH" ]] && command+=(--random_neurons_filepath "$RANDOM_NEURONS_FILEPATH")
  [[ -n "$BASE_NEURONS_PERCENT" ]] && command+=(--base_neurons_percent "$BASE_NEURONS_PERCENT")
  [[ -n "$LOADED_NEURONS_PERCENT" ]] && command+=(--loaded_neurons_percent "$LOADED_NEURONS_PERCENT")
  [[ -n "$START_NUM" ]] && command+=(--start_num "$START_NUM")
  [[ -n "$END_NUM" ]] && command+=(--end_num "$END_NUM")
  [[ -n "$LIMIT" ]] && command+=(--limit "$LIMIT")
  [[ "$SHUFFLE" == true ]] && command+=(--shuffle)
  [[ -n "$NUM_FEWSHOT" ]] && command+=(--num_fewshot "$NUM_FEWSHOT")
  [[ -n "$INCLUDE_PATH" ]] && command+=(--include_path "$INCLUDE_PATH")
  [[ -n "$DATA_DIR" ]] && command+=(--data_dir "$DATA_DIR")
  if [[ "$DRY_RUN" == true ]]; then
    printf '%q ' "${command[@]}"
    echo
    continue
  fi
  "${command[@]}"
  code=$?
  [[ $code -eq 130 ]] && exit 130
  [[ $code -ne 0 ]] && failed+=("$task")
done

if [[ ${#failed[@]} -gt 0 ]]; then
  echo "failed: ${failed[*]} (start again to repeat these only)" >&2
  exit 1
fi
