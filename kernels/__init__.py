"""Decode attention over the compact cache: the layout contract, its readable torch twin and the Triton kernels.

`slabs`, `table` and `codes` fix how a layer's cache lies in memory, `encode` writes all heads of a segment at once, `decode_torch` says in
plain torch what attention over it means, `decode` computes the same with Triton. Nothing here imports the rest of the package, nothing runs
at import, and only `decode_kernels`, `decode_sides`, `decode_attend` and `encode_kernels` need Triton.
"""
