"""DeepSeek-V4 targets (Flash, Pro): four residual streams, windowed and compressed attention, hash and routed experts.

Axes in this folder: *n any leading axes of token rows, R request, W rows of a block, T keys, S residual streams,
D hidden, Q query heads, H head dim, P rotated channels of a head, M compression ratio, N compressed entries,
C channels of an entry, E experts, K experts of a token, F expert width, G output groups, V vocab.
"""
