"""Made-up gradients of a stack, alike for an optimizer and its reference."""

import torch


def gradient(flat, step):
    """A gradient (M, P) in the layout of `flat`, another one every step, of sizes that a clip meets and does not meet."""
    grad = flat.like()
    for i, view in enumerate(flat.views(grad).values()):
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(1000 * step + i)) * (0.1 + step % 7))
    return grad
