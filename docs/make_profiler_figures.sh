#!/bin/sh
# Profiles the demo model on texts from the calibration halves (the first half of each data set) and draws the figures
# of docs/profiler.md, with their numbers as text beside the neuron files. Can be stopped and started again at any
# time; what is complete is not done again.
# Usage: DATA=path/to/data sh docs/make_profiler_figures.sh
set -e
: "${DATA:?set DATA to the folder with triviaqa, truthfulqa, squad_v1, piqa, ntrex and wikitext2}"
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
OUT=results/profiler

profiler() { $PYTHON -m profiler "$@"; }

profile() { # name, then arguments of run
    name=$1
    shift
    profiler run --checkpoint_path "$MODEL" --resume --batch_size 16 --output "$OUT/$name.safetensors" "$@"
}

TRIVIAQA="--dataset $DATA/triviaqa/triviaqa_sm_sub.jsonl --task_type QA --max_new_tokens 16"
NTREX="--dataset $DATA/ntrex/newstest2019_de-en.jsonl --task_type translate_de_en --max_new_tokens 16"
WIKITEXT="--dataset $DATA/wikitext2/valid.txt --task_type text --max_length 256 --max_new_tokens 0"

# three data sets twice, to see how much two samples of the same texts agree
profile triviaqa_a $TRIVIAQA --limit 200
profile triviaqa_b $TRIVIAQA --skip 750 --limit 200
profile truthfulqa --dataset "$DATA/truthfulqa/generation.jsonl" --task_type QA --max_new_tokens 16 --limit 200
profile piqa --dataset "$DATA/piqa/validation.jsonl" --task_type QA --max_new_tokens 16 --limit 200
profile squad --dataset "$DATA/squad_v1/validation_xquad_en.jsonl" --task_type QA --max_new_tokens 16 --limit 100
profile ntrex_a $NTREX --limit 200
profile ntrex_b $NTREX --skip 500 --limit 200
profile wikitext2_a $WIKITEXT --limit 60
profile wikitext2_b $WIKITEXT --skip 250 --limit 60
profiler random --checkpoint_path "$MODEL" --output "$OUT/random.safetensors"

profiler merge "$OUT/triviaqa_a.safetensors" "$OUT/truthfulqa.safetensors" "$OUT/piqa.safetensors" \
    "$OUT/squad.safetensors" --task_type QA --output "$OUT/qa.safetensors"

for top in 0.1 0.3 0.7; do
    profiler compare --top $top --plot "$OUT/overlap_$top.png" \
        "$OUT/triviaqa_a.safetensors=TriviaQA (a)" "$OUT/triviaqa_b.safetensors=TriviaQA (b)" \
        "$OUT/truthfulqa.safetensors=TruthfulQA" "$OUT/piqa.safetensors=PIQA" "$OUT/squad.safetensors=SQuAD" \
        "$OUT/ntrex_a.safetensors=NTREX (a)" "$OUT/ntrex_b.safetensors=NTREX (b)" \
        "$OUT/wikitext2_a.safetensors=WikiText-2 (a)" "$OUT/wikitext2_b.safetensors=WikiText-2 (b)" \
        "$OUT/random.safetensors=random" >"$OUT/overlap_$top.txt"
done
cp "$OUT/overlap_0.3.png" docs/profiler_overlap.png
profiler show "$OUT/qa.safetensors" --plot docs/profiler_concentration.png >"$OUT/concentration.txt"
echo "figures: docs/profiler_overlap.png, docs/profiler_concentration.png; numbers: $OUT/*.txt"
