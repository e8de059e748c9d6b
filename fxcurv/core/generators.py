"""Random generators that leave the global one alone."""

from __future__ import annotations

import torch

__all__ = ["fresh_generator"]


def fresh_generator(device: torch.device) -> torch.Generator:
    """A generator of its own, so that the caller's global one is left alone."""
    generator = torch.Generator(device)
    generator.seed()
    return generator
