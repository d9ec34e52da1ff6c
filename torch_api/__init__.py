"""Softmax cross-entropy for PyTorch, over ce-kernels' Triton kernels: `torch.nn.functional.cross_entropy`'s names."""

from importlib.util import find_spec

from ce_kernels.spec import fail

if find_spec("torch") is None:
    fail(ImportError, "torch_api without torch", "torch", "pip install 'ce-kernels[torch]'")

from torch_api.linear import linear_cross_entropy as linear_cross_entropy
from torch_api.linear import linear_cross_entropy_rows as linear_cross_entropy_rows
from torch_api.linear_module import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from torch_api.losses import RowOutputs as RowOutputs
from torch_api.losses import cross_entropy as cross_entropy
from torch_api.losses import cross_entropy_rows as cross_entropy_rows
from torch_api.module import CrossEntropyLoss as CrossEntropyLoss
from torch_api.patching import functional_cross_entropy as functional_cross_entropy
from torch_api.patching import patch as patch
from torch_api.trainers import causal_lm_loss as causal_lm_loss
from torch_api.trainers import for_causal_lm_loss as for_causal_lm_loss
