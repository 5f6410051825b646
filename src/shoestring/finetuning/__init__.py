"""Training what goes with causal language models: look-ahead embeddings (PaSS)."""
