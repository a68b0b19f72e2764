"""`python -m vitrify`, and `accelerate launch -m vitrify finetune ...` for several GPUs."""

import sys

from vitrify.cli import main

sys.exit(main())
