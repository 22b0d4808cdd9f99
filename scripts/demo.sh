#!/usr/bin/env bash
# Quantize the shipped policy to 4 bits, verify the result, and let both policies act. `make demo` runs this.
set -euo pipefail
cd "$(dirname "$0")/.."

output=build/demo-w4a16
episodes_a_task=${ROLLOUTS:-20}
egl_packages="libegl1 libgl1-mesa-dri libgles2"

has_egl() { .venv/bin/python -c 'import ctypes.util, sys; sys.exit(ctypes.util.find_library("EGL") is None)'; }

install_egl() {
  echo "Installing the EGL libraries that the simulator draws its camera images with ($egl_packages) ..."
  # shellcheck disable=SC2086
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $egl_packages) >/dev/null
}

if ! has_egl && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  install_egl || echo "That did not work."
fi
if ! has_egl; then
  echo "The simulator cannot draw without EGL. On Debian or Ubuntu: sudo apt-get install -y $egl_packages"
  echo "Going on without simulated episodes: you will see the action error, but no success rates."
  episodes_a_task=0
fi

echo
echo "1/3  Quantizing examples/demo_policy to 4 bits (AWQ), writing $output and verifying it in a fresh process ..."
.venv/bin/vlaquant quantize --config configs/demo_w4a16_awq.yaml --output "$output" --overwrite

echo
echo "2/3  Comparing it with the float policy on recorded episodes and on $episodes_a_task simulated episodes a task (minutes) ..."
.venv/bin/vlaquant eval --model "$output" --reference examples/demo_policy --episodes examples/demo_episodes \
  --rollouts "$episodes_a_task" --videos "$output.videos" --json "$output.eval.json"

echo
echo "3/3  Timing one action by part, and writing all of it down on one page ..."
.venv/bin/vlaquant bench "$output" --reference examples/demo_policy --episodes examples/demo_episodes \
  --threads 1 --rounds 30 --json "$output.bench.json" >/dev/null
.venv/bin/vlaquant report "$output" --reference examples/demo_policy --episodes examples/demo_episodes \
  --eval "$output.eval.json" --bench "$output.bench.json" --output "$output.report.html"
