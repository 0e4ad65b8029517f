"""Hostile artifacts and killed compilations: what tools/fuzz_artifact.py and tools/kill_compile.py are made of."""
