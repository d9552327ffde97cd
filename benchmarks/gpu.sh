#!/bin/sh
# All that needs a GPU, in at most eight minutes: the suite's GPU tests, then measurements. Results are written as they come.
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-benchmarks}
timeout 180 python -m pytest -q -p no:cacheprovider tests/test_ranking.py tests/test_distributed.py -k 'gpu or cuda' 2>&1 | tee "$OUT/gpu_tests.txt"
timeout 290 python benchmarks/gpu.py --out "$OUT/gpu.jsonl"
