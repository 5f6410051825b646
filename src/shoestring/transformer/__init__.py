"""The Transformer of 2017 (arXiv 1706.03762): model, data, training, beam search, translation, parsing, figures."""
