"""Softmax cross-entropy as three Triton row kernels: the contract, the kernels, their launches and their tuning.

Framework-neutral: imports neither jax nor torch, and triton only when a kernel is about to run. The front ends are
`jax_api` and `torch_api`; the formula stands in `ce_kernels.spec`.
"""

from ce_kernels.launch import Launch as Launch
from ce_kernels.launch import Problem as Problem
from ce_kernels.launch import plan_fused as plan_fused
from ce_kernels.launch import plan_grad as plan_grad
from ce_kernels.launch import plan_stats as plan_stats
from ce_kernels.spec import Options as Options

__version__ = "0.1.0"
