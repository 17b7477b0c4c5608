"""Comparing a module of ours with one of transformers: weights and gradients under our names."""

import re

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


def translate(tensors, rules):
    """Rename {their name: tensor} to ours.

    rules: list of (regular expression, replacement), applied in order; `{q,k,v}` in what comes out splits a tensor into
      that many equal parts; a replacement of None leaves those out whose name, then ours, matches.
    """
    ours = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = name if replacement is None else re.sub(pattern, replacement, name)
        head, *tail = re.split(r"\{(.*?)\}", name)
        letters = tail[0].split(",") if tail else [""]
        for letter, part in zip(letters, tensor.chunk(len(letters)) if tensor.ndim else [tensor]):
            ours[head + letter + (tail[1] if tail else "")] = part
    unwanted = [pattern for pattern, replacement in rules if replacement is None]
    return {name: tensor for name, tensor in ours.items() if not any(re.search(pattern, name) for pattern in unwanted)}


def copy_weights(ours, theirs, rules):
    """Load their parameters into ours; a name or shape left over on either side raises."""
    parameters = translate(dict(theirs.named_parameters()), rules)
    shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
    ours.load_state_dict(
        {name: tensor.detach().reshape(shapes.get(name, tensor.shape)) for name, tensor in parameters.items()}
    )
    return ours.eval()


def same_gradients(ours, theirs, rules, unused=()):
    """Every parameter of ours got the gradient of theirs; those named in `unused` got none."""
    gradients = translate({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}, rules)
    gradients_equal(ours, gradients, unused)
    assert all(name.startswith(tuple(unused)) for name in gradients.keys() - dict(ours.named_parameters()).keys())


def gradients_equal(ours, expected, unused=()):
    """Every parameter has the gradient expected under its name; those that begin with one of `unused` have none."""
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == name.startswith(tuple(unused)), name
        if parameter.grad is not None:
            gradient = expected[name].reshape(parameter.shape)
            close(parameter.grad, gradient, 1e-5 * max(1.0, float(gradient.abs().max())), msg=lambda text: f"{name}: {text}")
