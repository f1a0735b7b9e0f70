"""SCAP as the abstract says it, with every field materialised: the oracle of the factorised one."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata


def samples(x, y, bins, balance):
    """Unit samples of the complex fields Z = X + i (1 ⊗ Y_k), (N, K, 2CP); zero for dead channels."""
    y = F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False)
    shape = (len(x), y.shape[1], *x.shape[1:])  # N, K, C, H, W
    parts = []
    for part in (x[:, None].expand(shape) + 0j, 1j * y[:, :, None].expand(shape)):
        spectrum = torch.fft.fft2(part, norm="ortho")
        for axis in (3, 4):
            low = torch.fft.fftfreq(min(bins, shape[axis])) * min(bins, shape[axis])
            spectrum = spectrum.index_select(axis, low.round().long() % shape[axis])
        centred = spectrum - spectrum.mean(0)
        energy = centred.abs().square().sum((0, 2, 3, 4), keepdim=True)
        live = energy > 1e-24 * spectrum.abs().square().sum((0, 2, 3, 4), keepdim=True)
        parts.append(torch.where(live, centred / energy.sqrt() if balance else centred, 0))
    field = torch.view_as_real(parts[0] + parts[1]).flatten(2) * live.flatten(1)[..., None]
    return torch.nan_to_num(field / field.norm(dim=-1, keepdim=True))


def fidelity(x, y, bins=7, latent=16, balance=True):
    """Mean cosine between each channel's samples and their reconstruction by PCA, (K,)."""
    unit = samples(x, y, bins, balance)
    _, value, direction = torch.linalg.svd(unit.flatten(0, 1), full_matrices=False)
    decoder = direction[: min(latent, int((value > 1e-7 * value[0]).sum()))]
    restored = unit @ decoder.T @ decoder
    cosine = (unit * restored).sum(-1) / restored.norm(dim=-1).clamp(min=1e-30)
    return torch.where(unit.norm(dim=-1) > 0, cosine, 1).mean(0)


def rank(values):
    return (rankdata(np.round(values.numpy(), 7)) - 0.5) / len(values)


def importance(x, y, weight, a=0.5, **options):
    """I = a rank(1 - fidelity) + (1 - a) rank(L1) of the filters of `weight`, (K,)."""
    l1 = weight.detach().abs().flatten(1).sum(1)
    return torch.from_numpy(a * rank(1 - fidelity(x, y, **options)) + (1 - a) * rank(l1))
