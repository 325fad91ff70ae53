#!/bin/sh
# The numbers of docs/results.md: neuron files and a fit from the calibration halves of the data sets, then tasks and
# perplexity of every method on seeded samples of the report halves, then the tables in the page. For a night: a step that
# fails is named at the end, and the others go on. Started again, it goes on where it stopped: finished steps are
# skipped, and all others go on inside. $OUT/make_results.log says when each step began and ended.
#
# Usage: DATA=path/to/data [MODEL=NAME] [SIZE=full|small] sh docs/make_results.sh [STAGE…]
#
#   Stages, all of them in this order if none is named:
#     profile      neuron files
#     fit          the fit; without it, tasks and perplexity have compensation mean in place of refit
#     tasks        task scores; GSM8K and IFEval too where $DATA has gsm8k/ and ifeval/
#     perplexity   loss on wikitext-2, TriviaQA and SQuAD
#     baselines    loss of CATS, TEAL and WINA on wikitext-2
#     page         tables and figures in docs/results.md, between the lines that name the model
#
#   METHODS   configurations (the six of the original, and partinfer as it is now, with the fit)
#   SIZE      of the samples. full: for a small model; small: for one of billions of parameters, which is profiled once,
#             on the mix of texts that the fit takes, instead of for every task
#   PYTHON    the interpreter (python3)
set -e
cd "$(dirname "$0")/.."
: "${DATA:?set DATA to the folder with triviaqa, truthfulqa, squad_v1, piqa, ntrex and wikitext2}"
: "${MODEL:=SmolLM2-135M-Instruct}"
: "${METHODS:=dense,dense+partial,original,partinfer,coreinfer,coreinfer+partial,coreinfer_random_loading}"
: "${SIZE:=full}"
: "${PYTHON:=python3}"
: "${OUT:=results}"
ONE= FAILED=
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
NEURONS=$OUT/neurons/$MODEL
FIT=$NEURONS/mix.fit.safetensors
BYTES="--sparsity 0.4 --loaded_neurons_percent 0.7" # the original's; without them partinfer's are chosen by --max_loss

# A step: its words. What it prints is seen, when it ran is in the log.
step() {
    mkdir -p "$OUT"
    echo "$(date '+%F %T') begins: $*" >>"$OUT/make_results.log"
    code=0
    "$@" || code=$?
    echo "$(date '+%F %T') ended with $code: $*" >>"$OUT/make_results.log"
    [ "$code" -ne 130 ] || exit 130 # Ctrl-C
    [ "$code" -eq 0 ] || FAILED="$FAILED
  $*"
}

# name, texts, data set, then arguments of run. The first half of every data set has more texts than are taken.
neurons() {
    name=$1 texts=$2 dataset=$3
    shift 3
    $PYTHON -m profiler run --resume --quiet --checkpoint_path "models/$MODEL" --batch_size 16 \
        --dataset "$DATA/$dataset" --limit "$texts" --output "$NEURONS/$name.safetensors" "$@"
}

# name, names of the files to merge, then arguments of merge
merged() {
    name=$1 parts=$2
    shift 2
    [ -f "$NEURONS/$name.safetensors" ] && return
    for part in $parts; do set -- "$@" "$NEURONS/$part.safetensors"; done
    $PYTHON -m profiler merge --output "$NEURONS/$name.safetensors" "$@"
}

# The fit is for all tasks: its texts are a mix of all of them.
fit() {
    mix="--checkpoint_path models/$MODEL --dataset $NEURONS/mix.jsonl --task_type text --max_new_tokens 0"
    mix="$mix --max_length 384"
    [ -f "$FIT" ] && return
    [ -f "$NEURONS/mix.jsonl" ] || $PYTHON docs/mix_texts.py "$DATA" --texts "$MIX" --output "$NEURONS/mix.jsonl" || return
    # shellcheck disable=SC2086 # several arguments
    $PYTHON -m profiler run --resume --quiet $mix --output "$NEURONS/mix.safetensors" || return
    # shellcheck disable=SC2086
    $PYTHON -m profiler fit --resume $mix --neurons "$NEURONS/mix.safetensors" --output "$FIT"
}

# neuron file, rows, worked examples, task, then arguments of evaluate_task.py
tasks() {
    dataset=$1 rows=$2 fewshot=$3 task=$4
    shift 4
    [ ! -f "$FIT" ] || set -- --fit_filepath "$FIT" "$@"
    # shellcheck disable=SC2086 # several arguments
    $PYTHON evaluation/evaluate_task.py --model_name "$MODEL" --task_name "$task" --method "$METHODS" $BYTES \
        --limit "$rows" --shuffle --num_fewshot "$fewshot" --batch_size 8 --data_dir "$DATA" \
        --dataset_neurons_filepath "$NEURONS/${ONE:-$dataset}.safetensors" \
        --model_neurons_filepath "$NEURONS/${ONE:-model}.safetensors" --output_path "$OUT" --skip_finished "$@"
}

# name, neuron file, examples, data set, then arguments of evaluate_perplexity.py
perplexity() {
    result=$OUT/$MODEL/$1.json dataset=$2 examples=$3 data=$4
    shift 4
    [ -f "$result" ] && return
    compensations=none,mean
    [ ! -f "$FIT" ] || { set -- --fit_filepath "$FIT" "$@" && compensations=$compensations,refit; }
    $PYTHON evaluation/evaluate_perplexity.py --model_name "$MODEL" --method "$METHODS,griffin+partial" \
        --selection up --compensation "$compensations" \
        --dataset "$DATA/$data" --limit "$examples" --batch_size 8 \
        --dataset_neurons_filepath "$NEURONS/${ONE:-$dataset}.safetensors" \
        --model_neurons_filepath "$NEURONS/${ONE:-model}.safetensors" --skip_finished --json "$result" "$@"
}

# CATS, TEAL and WINA, calibrated on the valid text
baselines() {
    result=$OUT/$MODEL/baselines.json
    [ -f "$result" ] && return
    $PYTHON evaluation/evaluate_perplexity.py --model_name "$MODEL" --method dense,cats,teal_uniform,wina_uniform \
        --paper_sparsity 0.25,0.4,0.5 --calibration "$DATA/wikitext2/valid.txt" --dataset "$DATA/wikitext2/test.txt" \
        --limit "$WINDOWS" --batch_size 8 --skip_finished --json "$result"
}

page() {
    $PYTHON evaluation/report.py "$OUT" && $PYTHON docs/results_page.py "$OUT" "$MODEL"
}

all_neurons() {
    [ -z "$ONE" ] || return 0
    step neurons triviaqa "$TEXTS" triviaqa/triviaqa_sm_sub.jsonl --task_type QA --max_new_tokens 16
    step neurons truthfulqa "$TEXTS" truthfulqa/generation.jsonl --task_type QA --max_new_tokens 16
    step neurons piqa "$TEXTS" piqa/validation.jsonl --task_type QA --text_field goal --max_new_tokens 16
    step neurons squad "$TEXTS" squad_v1/validation_xquad_en.jsonl --task_type QA --max_new_tokens 16
    step neurons translate "$TEXTS" ntrex/newstest2019_de-en.jsonl --task_type translate_de_en --max_new_tokens 16
    step neurons wikitext2 "$TEXTS" wikitext2/valid.txt --task_type text --max_length 256 --max_new_tokens 0
    step merged qa "triviaqa truthfulqa piqa squad" --task_type QA
    step merged model "qa translate wikitext2"
}

all_tasks() {
    step tasks qa "$PAIRS" 0 local_piqa
    step tasks qa "$QUESTIONS" 5 local_triviaqa
    step tasks translate "$FEW" 3 local_translation_de_en
    step tasks qa "$CHOICES" 0 local_truthfulqa_mc2
    step tasks qa "$FEW" 1 local_squad
    step tasks qa "$FEW" 0 local_truthfulqa_gen
    step tasks qa "$FEW" 0 local_truthfulqa_mc1
    step tasks wikitext2 1 0 local_wikitext
    if [ -f "$DATA/gsm8k/test.jsonl" ]; then step tasks qa "$FEW" 5 local_gsm8k; fi
    if [ -f "$DATA/ifeval/input_data.jsonl" ]; then step tasks model "$FEW" 0 local_ifeval --apply_chat_template; fi
    step tasks model 26 0 local_instructions --apply_chat_template
}

all_perplexities() {
    step perplexity wikitext2 wikitext2 "$WINDOWS" wikitext2/test.txt
    step perplexity triviaqa qa "$ANSWERS" triviaqa/triviaqa_sm_sub.jsonl --half second
    step perplexity squad qa "$ANSWERS" squad_v1/validation_xquad_en.jsonl --half second \
        --target_template ' {answers[text][0]}'
}

case $SIZE in
    full) MIX=300 TEXTS=160 PAIRS=80 QUESTIONS=48 ANSWERS=80 CHOICES=32 FEW=20 WINDOWS=40 ;;
    small) MIX=110 ONE=mix PAIRS=24 QUESTIONS=16 ANSWERS=24 CHOICES=6 FEW=8 WINDOWS=10 ;;
    *) echo "error: SIZE must be full or small, got $SIZE" >&2 && exit 2 ;;
esac
[ $# -gt 0 ] || set -- profile fit tasks perplexity baselines page
for part; do
    case $part in
        profile) all_neurons ;;
        fit) step fit ;;
        tasks) all_tasks ;;
        perplexity) all_perplexities ;;
        baselines) step baselines ;;
        page) step page ;;
        *) echo "error: expected profile, fit, tasks, perplexity, baselines or page, got $part" >&2 && exit 2 ;;
    esac
done
[ -z "$FAILED" ] || { echo "error: failed, start again to repeat these only:$FAILED" >&2 && exit 1; }
