"""Artifact and prompt to tokens: attention function, cache, online basis, enable()."""
