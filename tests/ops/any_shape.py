"""How the kernels' property tests run: a few examples in the interpreter, which takes seconds each, many on a GPU."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ANY = settings(
    max_examples=8 if INTERPRETED else 200,
    deadline=None,
    derandomize=True,
    # Shrinking a failure takes the interpreter minutes, and the first example says enough.
    phases=[Phase.generate],
    # `nan_poison` poisons fresh memory, which no example uses up.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
