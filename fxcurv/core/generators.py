"""Random generators that do not advance the global generator."""

from __future__ import annotations

import torch

__all__ = ["fresh_generator"]


def fresh_generator(device: torch.device) -> torch.Generator:
    """Return a new generator, so that the caller's global generator is not advanced."""
    generator = torch.Generator(device)
    generator.seed()
    return generator
