#!/bin/sh
# Profiles the demo model on texts from the calibration halves (the first half of each data set) and draws the figures
# of docs/profiler.md. Can be stopped and started again at any time; what is complete is not done again.
# Usage: DATA=path/to/data sh docs/make_profiler_figures.sh
set -e
: "${DATA:?set DATA to the folder with triviaqa, truthfulqa, squad_v1, piqa, ntrex and wikitext2}"
OUT=results/profiler

profile() { # name, then arguments of run
    name=$1
    shift
    python -m profiler run --resume --batch_size 16 --output "$OUT/$name.safetensors" "$@"
}

TRIVIAQA="--dataset $DATA/triviaqa/triviaqa_sm_sub.jsonl --task_type QA --max_new_tokens 16"
NTREX="--dataset $DATA/ntrex/newstest2019_de-en.jsonl --task_type translate_de_en --max_new_tokens 16"
WIKITEXT="--dataset $DATA/wikitext2/valid.txt --task_type text --max_length 256 --max_new_tokens 0"

# two samples of one data set each, to see how much samples of the same task agree
profile triviaqa_a $TRIVIAQA --limit 300
profile triviaqa_b $TRIVIAQA --skip 750 --limit 300
profile ntrex_a $NTREX --limit 200
profile ntrex_b $NTREX --skip 500 --limit 200
profile truthfulqa --dataset "$DATA/truthfulqa/generation.jsonl" --task_type QA --limit 300 --max_new_tokens 16
profile piqa --dataset "$DATA/piqa/validation.jsonl" --task_type QA --limit 300 --max_new_tokens 16
profile wikitext2_a $WIKITEXT --limit 100
profile wikitext2_b $WIKITEXT --skip 250 --limit 100
profile squad --dataset "$DATA/squad_v1/validation_xquad_en.jsonl" --task_type QA --limit 200 --max_new_tokens 16
