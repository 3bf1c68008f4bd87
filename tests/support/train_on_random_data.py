"""The training command's run on random images.

    python -m support.train_on_random_data OUT [--devices N] [--num-nodes N]

A script of its own, since Lightning starts the other processes by calling it again.
"""

import argparse
import os
from pathlib import Path

import torch

from efficient_densenet.training import run as training
from efficient_densenet.training.config import TrainConfig
from support.images import write_data

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--num-nodes", type=int, default=1)
options = vars(parser.parse_args())
out = options.pop("out")

torch.set_num_threads(1)
data = out / f"data{os.getpid()}"  # each process writes the same images
size = {"depth": 10, "growth_rate": 4, "image_size": 8, "batch_size": 8, "epochs": 2}
config = TrainConfig.of("cifar-bc", **size, **options)
training.run(config, out / "run", data, manifest=write_data(data))
