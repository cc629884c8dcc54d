"""One script a claim. Each writes results/NAME.json; `python -m benchmarks` prints them all."""
