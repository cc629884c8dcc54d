"""The main job: parse a config, carry out its run.

python train.py --config=configs/quickstart.py [--config.optimizer.learning_rate=3e-4 ...]
"""

import sys

from llm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
