"""Decode attention over the compact cache: the layout contract, its readable torch twin and the Triton kernels.

`slabs`, `table` and `codes` fix how a layer's cache lies in memory, `measure` looks at segments before they are coded, `encode` writes all
their heads at once, `decode_torch` says in plain torch what attention over them means, `decode` computes the same with Triton. Nothing here
imports the rest of the package, nothing runs at import, and only modules named `*_kernels` and `decode_*`, but `decode_torch`, need Triton.
"""
