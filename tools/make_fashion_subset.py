"""Write the Fashion-MNIST subset that ships with vitrify: the first 500 training and 100 test images of every class.

Run `python tools/make_fashion_subset.py` where Debian's package dataset-fashion-mnist is installed. The images keep the
order of the full set, and the files come out byte for byte the same each time.
"""

from __future__ import annotations

import numpy as np

from vitrify.data.fashion import CLASSES, SHIPPED_ROOT, FashionMnist

PER_CLASS = {"train": 500, "test": 100}


def main() -> None:
    """Write train.npz and test.npz (arrays `images` (N, 28, 28) and `labels` (N,), uint8) beside the licence."""
    for split, count in PER_CLASS.items():
        full = FashionMnist("debian", split)
        of_class = [np.flatnonzero(full.labels == label)[:count] for label in range(len(CLASSES))]
        chosen = np.sort(np.concatenate(of_class))
        path = SHIPPED_ROOT / f"{split}.npz"
        np.savez_compressed(path, images=full.images[chosen], labels=full.labels[chosen])
        print(f"{path}: {len(chosen)} images, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
