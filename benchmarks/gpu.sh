#!/bin/bash
# What RESULTS.md lacks for want of a GPU, on one card with random weights: nothing is downloaded.
#
#   bash benchmarks/gpu.sh                      # about an hour of an H200; full output in gpu-results/
#   ONLY=step bash benchmarks/gpu.sh results    # what starts with "step"
#   SMALL=1 bash benchmarks/gpu.sh              # the same commands at toy sizes on a CPU: do they run?
#   PEER=../peer bash benchmarks/gpu.sh         # torchvision for flow.py, where it lies apart
cd "$(dirname "$0")/.." || exit
out=$(realpath -m "${1:-gpu-results}")
mkdir -p "$out"
step="--preset wan1.3b --batch 1 --discriminator_batch 4"
sampling="--dim 1536 --ffn 8960 --layers 30 --vae 96 --frames 81 --height 480 --width 832 --steps 10 --pairs 2"
dit="--frames 21 --height 60 --width 104 --layers 6" vae="--latents 7 --height 60 --width 104" flow="--height 480 --width 832"
window=20 half="--device cuda --dtype bfloat16" full="--device cuda"
if [ "$SMALL" ]; then
    step="--preset toy --batch 2 --discriminator_batch 2" window=4 half="--pairs 1" full="--pairs 1"
    sampling="--frames 5 --height 32 --width 32 --dim 128 --steps 3" dit="--dim 128 --height 8 --width 8 --layers 1"
    vae="--latents 2 --height 4 --width 4" flow="--frames 3 --height 128 --width 128"
fi

try() {
    name=$1 script=$2
    shift 2
    [[ $name == ${ONLY}* ]] || return
    echo "== $name: $script $*"
    timeout 900 python "benchmarks/$script" "$@" > "$out/$name.txt" 2>&1 || echo "ended with code $?: $out/$name.txt says why"
    grep -E "RESULT|out of memory" "$out/$name.txt"
}

# The paper's step on one card, and what each measure buys.
try step step.py $step
try step-all-pairs step.py $step --pairs 1000
try step-no-checkpointing step.py $step --no-checkpointing
try step-latents-1 step.py $step --latents 1
try step-latents-6 step.py $step --latents 6
try step-whole-clip step.py $step --window $window
try step-trace step.py $step --trace 12
compiled=$(mktemp -d)
cp -r ./*.py toy benchmarks "$compiled"
(cd "$compiled" && git apply "$OLDPWD/hacks/compile.patch" && try step-compiled step.py $step)
rm -r "$compiled"
# Against the peers. Ten steps with guidance stand for fifty: the time of a step does not depend on their number.
try sampling sampling.py $sampling $half
try dit dit.py $dit $half
try vae vae.py $vae $half
PYTHONPATH=$PEER try flow flow.py $flow $full
