"""UltraFastBERT's shape: a crammed BERT (arXiv 2212.14034) whose feedforwards are trees or dense (arXiv 2311.10770)."""

from typing import Any

from transformers import PretrainedConfig

from shoestring.errors import RequestError, suggest

__all__ = ["UltraFastBertConfig"]

_CHOICES = {"feedforward": ("fff", "dense"), "positions": ("rotary", "sinusoidal", "learned")}


class UltraFastBertConfig(PretrainedConfig):
    """Shape and style of the encoder; the defaults are UltraFastBERT-1x11's.

    Args:
        feedforward: "fff": `trees` trees of `depth`; "dense": `width` neurons, all of them used.
        feedforward_bias: whether neurons have a bias (of either kind; the way out has none).
        feedforward_method: how trees are computed, see `FastFeedForward`.
        positions: "rotary", "learned", or "sinusoidal" with one learned factor, as crammed BERT has it.
        dropout: of the embeddings and of what each sub-layer adds; the paper pre-trains without.
    """

    model_type = "shoestring-ultrafastbert"
    attribute_map = {"num_attention_heads": "heads", "num_hidden_layers": "layers"}  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        layers: int = 16,
        heads: int = 12,
        feedforward: str = "fff",
        trees: int = 1,
        depth: int = 11,
        width: int = 3072,
        feedforward_bias: bool = True,
        feedforward_method: str = "auto",
        positions: str = "sinusoidal",
        max_positions: int = 512,
        dropout: float = 0.0,
        norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        classifier_width: int = 1024,
        pad_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.layers, self.heads = vocab_size, hidden_size, layers, heads
        self.feedforward, self.trees, self.depth, self.width = feedforward, trees, depth, width
        self.feedforward_bias, self.feedforward_method = feedforward_bias, feedforward_method
        self.positions, self.max_positions = positions, max_positions
        self.dropout, self.norm_eps, self.initializer_range = dropout, norm_eps, initializer_range
        self.classifier_width = classifier_width
        kwargs |= {"tie_word_embeddings": True, "pad_token_id": pad_token_id}
        super().__init__(**kwargs)

    @property
    def neurons(self) -> int:
        """Neurons of one layer's feedforward."""
        return self.width if self.feedforward == "dense" else self.trees * (2 ** (self.depth + 1) - 1)

    @property
    def active_neurons(self) -> int:
        """Neurons of one layer that one token uses."""
        return self.width if self.feedforward == "dense" else self.trees * (self.depth + 1)

    def training_operations(self, length: int, predicted: float) -> int:
        """Floating-point operations of one token's step, forward and backward, with trees in their masked-dense form.

        `length` is the sequence's, `predicted` the share of its tokens that the head is asked for.
        """
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.neurons + 2 * self.hidden_size * length
        head = predicted * self.hidden_size * self.vocab_size
        return round(3 * 2 * (self.layers * layer + head))

    def check(self) -> "UltraFastBertConfig":
        """Refuse a shape that cannot be.

        Raises:
            RequestError: with the values that do not fit.
        """
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise RequestError(
                    f"model.{name} is {value!r}{suggest(value, known)}; known: {', '.join(known)}"
                )
        if self.hidden_size % (2 * self.heads):
            raise RequestError(
                f"model.hidden_size is {self.hidden_size} and model.heads {self.heads}: a head needs an even width"
            )
        return self
