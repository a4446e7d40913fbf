"""The last layer of a language model."""

from limbeck.contracts import Unembedding

__all__ = ["Unembedding"]
