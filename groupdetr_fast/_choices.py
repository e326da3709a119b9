"""Which of several Triton kernels serves: what the environment asks for when the package is imported.

After that, tests and benchmarks choose (testing.py). For the compiled kernels csrc/choices.h does the same.
"""

import os
from typing import Literal

# Where the backward pass of grouped_attention is one kernel (ops/grouped_attention/one_block.py); nowhere as long as no
# GPU has timed it.
attention_one_block: Literal["never", "where it pays", "where it can"] = (
    "where it pays" if os.environ.get("GROUPDETR_FAST_ATTENTION_ONE_BLOCK") == "1" else "never"
)
