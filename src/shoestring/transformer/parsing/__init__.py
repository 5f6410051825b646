"""Constituency parsing as sequence-to-sequence (section 6.3; arXiv 1412.7449): trees, brackets, their F1, a grammar."""
