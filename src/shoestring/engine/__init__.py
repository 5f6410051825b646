"""One forward step of a causal language model over a tree of tokens."""
