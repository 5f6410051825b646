"""Which tokens a step tries, and which it keeps."""
