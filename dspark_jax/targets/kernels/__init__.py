"""Attention kernels for accelerators: rows of blocks over the cached positions that their requests hold.

`held.py` is the entry and chooses by platform; `held_tpu.py` and `held_gpu.py` are the kernels.
"""
