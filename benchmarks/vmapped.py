"""The other way to train many models at once: torch.func.vmap over the plain module's gradient, and AdamW by hand on the stack.

torch.optim takes one rate for all of a tensor, so whoever stacks models writes the update; here as foreach operations where
one number serves all models, and element-wise where each has its own rate.
"""

import warnings

import torch
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from benchmarks.plain import Plain, decays, load
from etastar.recipe import Recipe


def trainer(recipe: Recipe, vocab: int, params_of_models: list[dict[str, torch.Tensor]]):
    """A function that trains all models one step on tokens (M, B, T + 1) and returns their losses (M,) before it."""
    warnings.filterwarnings("ignore", message=".*performance drop.*")  # attention has no batching rule: what is measured here
    params, buffers = stack_module_state([load(Plain(recipe.model, vocab), params) for params in params_of_models])
    params = {name: tensor.detach() for name, tensor in params.items()}  # else autograd records a second time around vmap
    skeleton = Plain(recipe.model, vocab).to("meta")
    gradient = vmap(grad_and_value(lambda p, b, tokens: functional_call(skeleton, (p, b), (tokens,))))
    update = adamw(params, recipe)

    def step(tokens_MxBxT1):
        grads, loss_M = gradient(params, buffers, tokens_MxBxT1)
        update([grads[name] for name in params])
        return loss_M

    return step


def adamw(params: dict[str, torch.Tensor], recipe: Recipe):
    """A function that clips each model's gradient and updates `params` in place."""
    by, tensors = recipe.optimizer, list(params.values())
    m, v = [torch.zeros_like(p) for p in tensors], [torch.zeros_like(p) for p in tensors]
    rate_M = torch.full((len(tensors[0]),), recipe.peak_lr)
    decayed = {id(p) for name, p in params.items() if decays(name)}
    steps = 0

    def update(grads):
        nonlocal steps
        steps += 1
        norm_M = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads]).norm(dim=0)
        torch._foreach_mul_(grads, [_by_model((by.clip_norm / (norm_M + 1e-6)).clamp(max=1), g) for g in grads])
        torch._foreach_lerp_(m, grads, 1 - by.beta1)
        torch._foreach_mul_(v, by.beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - by.beta2)
        roots = torch._foreach_sqrt(v)
        torch._foreach_div_(roots, (1 - by.beta2**steps) ** 0.5)
        torch._foreach_add_(roots, by.eps)
        for p, mean, root in zip(tensors, m, roots, strict=True):
            if id(p) in decayed:
                p.mul_(_by_model(1 - rate_M * by.weight_decay, p))
            p.addcdiv_(mean * _by_model(-rate_M / (1 - by.beta1**steps), p), root)

    return update


def _by_model(number_M: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return number_M.view(-1, *[1] * (like.dim() - 1))
