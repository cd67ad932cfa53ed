"""Write the training images that `data.train_limit` leaves out, labeled by a network: extra images for a study.

    python jobs/train_tla.py --preset cifar10_small --method natural --data.root /data/cifar10 \
        --data.train_limit 30000 --name teacher
    python -m docs.make_extra_images runs/teacher/checkpoint cifar10 /data/cifar10 30000 /data/extra.npz

The network may be any: a folder, models:/... or runs:/....
"""

import sys

import numpy as np
import torch

import tla_service as tla
from tla_service.data.catalog import load_dataset
from tla_service.data.splits import stratified_subset

_BATCH = 500


def main(model: str, name: str, root: str, limit: str, output: str) -> None:
    """Write the file, and say how many of the network's labels are right."""
    network = tla.load_model(model)
    train = load_dataset(tla.DataConfig(name=name, root=root)).train
    left_out = torch.ones(len(train), dtype=torch.bool)
    left_out[stratified_subset(train.labels, int(limit))] = False
    rows = left_out.nonzero()[:, 0]
    images = train.fetch(rows)
    with torch.inference_mode():
        labels = torch.cat([network(part.float() / 255).logits.argmax(1) for part in images.split(_BATCH)])
    np.savez(output, image=images.permute(0, 2, 3, 1).numpy(), label=labels.numpy())
    right = (labels == train.labels[rows]).double().mean()
    print(f"{len(rows)} images in {output}, {right:.1%} labeled as in the data set")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
