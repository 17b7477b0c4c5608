"""Comparing numbers of ours with those of another implementation, with every parameter moved."""

import torch

CLOSE = dict(atol=1e-5, rtol=1e-5)


def close(found, expected, atol=1e-5, rtol=1e-4, **options):
    """Fail unless tensors, or lists of them, are equal but for the rounding of float32."""
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol, **options)


def perturb(module, spread=0.05):
    """Move every parameter off its start, so that biases, norms and gates count; returns the module, evaluating."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return module.eval()
