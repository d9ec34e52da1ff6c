"""Softmax cross-entropy for PyTorch: `torch.nn.functional.cross_entropy`'s names and shapes over ce-kernels' Triton kernels."""

from torch_api.losses import RowOutputs as RowOutputs
from torch_api.losses import cross_entropy as cross_entropy
from torch_api.losses import cross_entropy_rows as cross_entropy_rows
from torch_api.module import CrossEntropyLoss as CrossEntropyLoss
