"""What may run the operators between the matrix products."""

from __future__ import annotations

EAGER = "eager"
"""PyTorch, one by one."""
TRITON = "triton"
"""Groups of them, each a kernel of the program's own."""
INDUCTOR = "inductor"
"""The same groups, each a function that torch.compile compiles."""
KERNELS = (EAGER, TRITON, INDUCTOR)
"""Where two are predicted to take the same time, the first is taken."""
