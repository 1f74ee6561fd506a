"""A synthetic challenge with known truth: small cells seen by several microscopes, in the challenge's layout."""

from cellmap_pipe.phantom.challenge import write_challenge

__all__ = ["write_challenge"]
