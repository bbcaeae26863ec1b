#!/usr/bin/env bash
# From a checkpoint to a model repository entry: export, three gates, and the entry, which is only made if all gates passed.
#
#   pipeline.sh                 everything in order; every gate is run, also after one was missed
#   pipeline.sh export|eval|verify|bench|package       one step, for pipelines with a job per step
#
# The environment says what to do; what has no default is needed by the steps that use it:
#   CHECKPOINT         the checkpoint
#   CALIB              calibration images, a folder
#   VAL                labelled images, DIR/<class>/*.jpg
#   OUT                folder of the results (out)
#   MIN_TOP1           smallest top-1 accuracy, percent
#   MAX_DISAGREEMENT   largest share of images with another class than the checkpoint gives, percent (2)
#   MIN_RATIO          smallest speed, as a multiple of the baseline's
#   BASELINE           the baseline (resnet50)
#   PRECISION          of the graph that the gates are for and that is packaged (int8)
#   EXPORT_OPTIONS     more options of `export`, separated by spaces
#
# Results: OUT/*.onnx, OUT/MODEL_CARD.md, OUT/deploy.toml, OUT/*.provenance.json, OUT/reports (JSON, HTML, JUnit),
# OUT/models (the entry). Exit status: that of the first step that failed; 3 means that a limit was missed.
set -uo pipefail

OUT=${OUT:-out}
PRECISION=${PRECISION:-int8}
REPORTS=$OUT/reports
mkdir -p "$REPORTS"

graph() {
    local found=("$OUT"/*."$PRECISION".onnx)
    [ -e "${found[0]}" ] || { echo "there is no $PRECISION graph in $OUT; run: $0 export" >&2; return 1; }
    printf '%s\n' "${found[0]}"
}

step_export() {
    # shellcheck disable=SC2086  # several options in one variable
    repvgg-deploy export "${CHECKPOINT:?}" --all --calib "${CALIB:?}" --val "${VAL:?}" -o "$OUT" ${EXPORT_OPTIONS:-} \
        --lock "$OUT/deploy.toml" --provenance --junit "$REPORTS/export.xml" --json >"$REPORTS/export.json"
}

step_eval() {
    local model
    model=$(graph) && repvgg-deploy eval "$model" --data "${VAL:?}" --min-top1 "${MIN_TOP1:?}" \
        --junit "$REPORTS/eval.xml" --json >"$REPORTS/eval.json"
}

step_verify() {
    local model
    model=$(graph) && repvgg-deploy verify "${CHECKPOINT:?}" "$model" --data "${VAL:?}" \
        --max-disagreement "${MAX_DISAGREEMENT:-2}" --junit "$REPORTS/verify.xml" --json >"$REPORTS/verify.json"
}

step_bench() {
    local model status
    model=$(graph) || return
    repvgg-deploy bench "$model" --baseline "${BASELINE:-resnet50}" --min-ratio "${MIN_RATIO:?}" \
        --junit "$REPORTS/bench.xml" -o "$REPORTS/bench.json" >"$REPORTS/bench.txt"
    status=$?
    cat "$REPORTS/bench.txt"
    # The page is wanted most of all when the limit was missed.
    [ ! -e "$REPORTS/bench.json" ] || repvgg-deploy report "$REPORTS/bench.json" -o "$REPORTS/bench.html" --quiet
    return "$status"
}

step_package() {
    local model
    model=$(graph) && repvgg-deploy package "$model" -o "$OUT/models" --triton --json >"$REPORTS/package.json"
}

# A step that fails early must not leave the reports of an earlier run, which a CI server would show.
step() {
    rm -f "$REPORTS/$1".*
    "step_$1"
}

all() {
    local status=0 gate
    step export || return
    for gate in eval verify bench; do
        step "$gate" || status=$(( status == 0 ? $? : status ))
    done
    [ "$status" -eq 0 ] || return "$status"
    step package
}

case ${1:-all} in
    all) all ;;
    export | eval | verify | bench | package) step "$1" ;;
    *)
        echo "usage: $0 [export|eval|verify|bench|package]" >&2
        exit 2
        ;;
esac
