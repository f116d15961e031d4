#!/bin/sh
# Fixed against progressive resolution: the demo's drawings and model at 48 pixels, three seeds each. STEPS=1600 is the
# length of the demo. Prints the last evaluation of each run, on the drawings of the other style.
set -eu
steps=${STEPS:-1600}
[ -f data/emoji/classes.txt ] || evaclip data emoji data/emoji
for seed in 0 1 2; do
    for kind in fixed progressive; do
        parts='[]'
        [ $kind = fixed ] || parts='[{image_size: 32, fraction: 0.72}]'
        evaclip train emoji --resume auto --set "name=$kind-$seed" "seed=$seed" "schedule.resolutions=$parts" \
            model.options.vision.image_size=48 "schedule.steps=$steps" "schedule.warmup_steps=$((steps / 10))"
        echo "$kind-$seed $(grep '"eval"' "runs/$kind-$seed/log.jsonl" | tail -n 1)"
    done
done
