"""Other ways to make a KV cache small, behind our cache, windows and byte counts; `registry.py` lists them."""
