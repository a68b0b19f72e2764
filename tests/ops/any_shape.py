"""How the kernels' property tests run: few examples, of which each takes seconds, in the interpreter or to compile."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ANY = settings(
    # On a GPU nearly each example has widths of its own, and so up to eight kernels that no other has compiled.
    max_examples=8 if INTERPRETED else 20,
    deadline=None,
    derandomize=True,
    # Shrinking a failure takes the interpreter minutes, and the first example says enough.
    phases=[Phase.generate],
    # `nan_poison` poisons fresh memory, which no example uses up.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
