"""Decode attention over the compact cache: the layout contract, its readable torch twin and the Triton kernels.

`table` and `codes` fix how a layer's cache lies in memory, `decode_torch` says in plain torch what attention over it
means, `decode` computes the same with Triton. Nothing here imports the rest of the package, nothing runs at import,
and only `decode_kernels` needs Triton.
"""
