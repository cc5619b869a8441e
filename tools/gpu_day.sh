#!/bin/sh
# Everything that needs a GPU, in one go: tools/gpu_day.sh [OUTPUT]
#
# Runs the CUDA tests, the benchmarks, CIFAR-10 and a kill with resumption, about a day of one GPU,
# and writes OUTPUT/gpu.md (OUTPUT: output/gpu if not given): a section for each command, with what
# it printed. A command that fails is marked, and the others still run. PYTHON is the interpreter.
set -u
cd -- "$(dirname -- "$0")/.." || exit 1
python=${PYTHON:-python}
output=${1:-output/gpu}
page=$output/gpu.md
mkdir -p "$output" || exit 1

if ! found=$("$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' 2>/dev/null); then
    echo "gpu_day.sh: no GPU was found by $python" >&2
    exit 1
fi
printf '# Measured on a GPU\n\n%s, commit %s.\n' "$found" "$(git rev-parse --short HEAD)" >"$page"
failed=0

part() { # part TITLE WORD...: run Python with the words, and append a section
    title=$1
    shift
    echo "== $title"
    started=$(date +%s)
    "$python" "$@" >"$output/last.txt" 2>&1
    status=$?
    seconds=$(($(date +%s) - started))
    {
        printf '\n## %s\n\n`python %s`: ' "$title" "$*"
        [ $status -eq 0 ] || printf '**failed with status %s**, ' $status
        printf '%s s\n\n```\n' "$seconds"
        tail -n 60 "$output/last.txt"
        printf '```\n'
    } >>"$page"
    [ $status -eq 0 ] || failed=$((failed + 1))
}

part "Tests" -m pytest tests/unit/test_augment.py tests/unit/test_fuse.py tests/unit/test_engine.py \
    tests/unit/test_joined.py tests/slow/test_main.py
part "Tests of the CUDA path" -m pytest tests/slow --ignore tests/slow/test_main.py -k device
part "Networks" -m tools.benchmark --device cuda --batch-size 128 --dtype bfloat16 --memory \
    --csv "$output/networks.csv" --plot "$output/networks.png"
part "Detection backbones" -m tools.benchmark.backbone --device cuda --batch-size 2 --dtype float16 \
    --input-size 800 1344

cifar="--data-set CIFAR10 --data-path data --download"
for net in visformer_small swin_visformer_small_v2 convit_small fastvit_sa12 vit_base_patch16_224; do
    for flag in "--augment-on device" "--augment-on workers" --channels-last --no-channels-last \
        --compile; do
        # shellcheck disable=SC2086
        part "Training of $net, $flag" main.py $cifar --model $net --input-size 224 --batch-size 128 \
            --amp --epochs 2 --warmup-epochs 0 --num_workers 8 --overwrite $flag \
            --output_dir "$output/rates"
    done
done
# shellcheck disable=SC2086
part "CIFAR-10 to 95 %" main.py -c configs/cifar10_scratch.yaml $cifar --amp --overwrite \
    --output_dir "$output/cifar10"
part "Kills and resumptions, bit by bit" -m tests.crash --kills 8 --ranks 1 -- --device cuda \
    --deterministic
rm -f "$output/last.txt"
echo "$page: $failed parts failed"
[ $failed -eq 0 ]
