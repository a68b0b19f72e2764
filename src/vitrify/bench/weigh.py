"""A fresh process that weighs one contender: `python -m vitrify.bench.weigh '{"benchmark": ..., "case": ...}'`."""

from __future__ import annotations

import json
import sys

import torch

from vitrify.bench.memory import resident_peak_mib
from vitrify.bench.registry import prepare


def main() -> None:
    """Read the request that `runner` wrote, and print the peak in MiB."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    prepared = prepare(request["benchmark"], request["case"])
    contender = next(c for c in prepared.contenders if c.name == request["contender"])
    argument = prepared.inputs(request["seed"])
    print(resident_peak_mib(lambda: contender.run(argument)))


if __name__ == "__main__":
    main()
