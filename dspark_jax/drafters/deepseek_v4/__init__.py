"""DeepSeek-V4's own drafters, which lie in the target's files: three DSpark stages, or the preview's MTP-1 block.

Axes: R request slots (B rows in training), W rows of a commit, T context position, N blocks, K block position,
S residual streams, D hidden, H head dim, V vocab, m taps.
"""
