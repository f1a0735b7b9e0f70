"""Elimination as least squares says it, and scap-set with every field and patch materialised: oracles of the fast ones.

For a convolution with a 3 x 3 kernel and padding 1 that alone reads the channels. Columns of its weight stand as
`unfold` gives them, (channel, kernel), with the bias behind them.
"""

import torch
import torch.nn.functional as F

from tests import scap_reference


def regular(moment, ridge):
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def least_squares(weight, moment, keep, ridge):
    """min over W' on the columns `keep` of tr((W' - W) (H + λ) (W' - W)ᵀ): its value and W'."""
    h = regular(moment, ridge)
    solved = torch.zeros_like(weight)
    solved[:, keep] = torch.linalg.solve(h[keep][:, keep], (weight @ h)[:, keep].T).T
    return (((solved - weight) @ h) * (solved - weight)).sum(), solved


def remaining(channel_of_column, gone):
    return [column for column, channel in enumerate(channel_of_column.tolist()) if channel not in gone]


def order(weight, moment, channel_of_column, ridge):
    """Channels in the order in which they leave: each time the one after which the least error is smallest."""
    gone, left = [], sorted(set(channel_of_column.tolist()) - {-1})
    while left:
        errors = [
            least_squares(weight, moment, remaining(channel_of_column, [*gone, k]), ridge)[0].item() for k in left
        ]
        gone.append(left.pop(errors.index(min(errors))))
    return gone


def with_bias(conv):
    return torch.cat([conv.weight.detach().flatten(1), conv.bias.detach()[:, None]], 1)


def patches(conv, x, constant=1.0):
    """(places of all images, columns), with a constant for the bias."""
    rows = F.unfold(x, conv.kernel_size, padding=conv.padding).transpose(1, 2).flatten(0, 1)
    return torch.cat([rows, rows.new_full((len(rows), 1), constant)], 1)


def patch_moment(conv, x, gradient=None):
    """With a gradient, (channels, *grid), of inputs that are filtered by its amplitude at each frequency."""
    if gradient is None:
        rows = patches(conv, x)
    else:
        power = sum(torch.fft.fft2(channel).abs().square() for channel in gradient)
        kernel = torch.fft.ifft2((power / power.mean()).sqrt()).real
        height, width = kernel.shape
        circular = torch.stack(
            [torch.roll(x, (i, j), (2, 3)) * kernel[i, j] for i in range(height) for j in range(width)]
        ).sum(0)
        rows = patches(conv, circular, kernel.sum())
    return rows.T @ rows / len(rows)


def channel_samples(maps, fields, bins):
    """The part i (1 ⊗ Y) / √C of a field with `fields` input channels, for each of the maps: (N, K, 2CP)."""
    spectrum = 1j * torch.fft.fft2(maps + 0j, norm="ortho")
    for axis in (2, 3):
        low = torch.fft.fftfreq(min(bins, maps.shape[axis])) * min(bins, maps.shape[axis])
        spectrum = spectrum.index_select(axis, low.round().long() % maps.shape[axis])
    part = spectrum[:, :, None].expand(-1, -1, fields, -1, -1) / fields**0.5
    return torch.view_as_real(part.contiguous()).flatten(2)


def code_moment(conv, x, y, bins, latent):
    """Second moment of the codes of what each place of the kernel sees of the channels y, with 0 for the bias."""
    unit = scap_reference.samples(x, y, bins, True)
    directions = torch.linalg.svd(unit.flatten(0, 1), full_matrices=False)[2][:latent]
    seen = F.unfold(y, conv.kernel_size, padding=conv.padding).unflatten(2, y.shape[2:])  # (N, columns, H, W)
    codes = channel_samples(seen, x.shape[1], bins) @ directions.T  # (N, columns, latent)
    codes = torch.cat([codes, codes.new_zeros(len(codes), 1, latent)], 1)
    return torch.einsum("nir,njr->ij", codes, codes)


def blended_moment(conv, x, y, bins, latent, blend, gradient=None):
    """(1 - b) P Pᵀ + b Z Zᵀ, of the same trace."""
    patch, code = patch_moment(conv, y, gradient), code_moment(conv, x, y, bins, latent)
    return (1 - blend) * patch + blend * code * patch.trace() / code.trace()
