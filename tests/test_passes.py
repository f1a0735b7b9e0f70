"""What the first recorded pass does not show: training mode that runs in its own way, and other numbers of images."""

import contextlib
import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scap_hub
from scap_hub.errors import ModelError
from tests.independent import TOLERANCE, copied, difference, double, plans, random_values, reference
from tests.small_cases import Body, free, image, pruned_exactly


def drops_paths(net, x):
    """Draws on the CPU, as people write it, so that in training mode it does not run without weights."""
    x = net.a(x).relu()
    y = net.b(x).relu()
    if net.training:
        y = y * (torch.rand(len(x), 1, 1, 1, dtype=x.dtype) > 0.2)
        return net.head(y), net.aux(x).mean((2, 3))
    return net.head(y)


def pools_and_norms(net, x):
    """A norm of pooled features, of which one image is too few in training mode."""
    x = net.a(x).relu()
    y = net.b(x * net.norm(F.adaptive_avg_pool2d(x, 1)).sigmoid())
    return (net.head(y), net.aux(x).mean((2, 3))) if net.training else net.head(y)


@pytest.mark.parametrize(("forward", "images"), [(drops_paths, 2), (pools_and_norms, 1)])
def test_what_training_mode_alone_does_is_seen(forward, images):
    net = random_values(Body(forward, aux=nn.Conv2d(16, 5, 1), norm=nn.BatchNorm2d(16))).eval()
    groups = scap_hub.channel_groups(net, (image()[:images],))
    assert {"a", "b"} <= free(groups)
    for _, plan in plans(groups, 0):
        small = scap_hub.apply_plan(net, plan).train()
        sum(part.square().sum() for part in small(image())).backward()


def test_recording_draws_no_random_numbers_of_the_callers():
    net = Body(drops_paths, aux=nn.Conv2d(16, 5, 1))
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    scap_hub.channel_groups(net, (image(),))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("wrong", [False, True])
def test_garbage_is_collected_as_before_afterwards(wrong):
    before = gc.get_threshold()
    with pytest.raises(ModelError) if wrong else contextlib.nullcontext():
        scap_hub.channel_groups(Body(drops_paths, aux=nn.Conv2d(16, 5, 1)), (torch.zeros(2) if wrong else image(),))
    assert gc.get_threshold() == before


def test_several_threads_find_groups_at_the_same_time():
    before, interval = gc.get_threshold(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds, so that each runs in between the others
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: free(scap_hub.channel_groups(Body(), (image(),))), range(12)))
    finally:
        sys.setswitchinterval(interval)
    assert found == [{"a", "b"}] * 12
    assert gc.get_threshold() == before


def filters_by_image(net, x):
    x = net.a(x).relu()
    filters = net.filters.repeat(len(x), 1, 1, 1)
    y = F.conv2d(x.reshape(1, len(x) * 16, 8, 8), filters, padding=1, groups=len(x) * 16)
    return net.head(net.b(y.view(-1, 16, 8, 8)))


def rows_made(net, x):
    x = net.a(x).relu()
    return x.reshape(len(x) * 16, 64).relu().view(-1, 16, 8, 8)


def rows_of_images(net, x):
    return net.head(net.b(rows_made(net, x)))


@pytest.mark.parametrize("forward", [filters_by_image, rows_of_images])
@pytest.mark.parametrize("images", [1, 2])
def test_sizes_that_count_images_too_hold_for_any_number_of_images(forward, images):
    net = Body(forward, filters=nn.Parameter(torch.randn(16, 1, 3, 3)))
    groups = pruned_exactly(net, image()[:images])
    assert "b" in free(groups)
    more = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    for _, plan in plans(groups, 0):
        small = scap_hub.apply_plan(copied(net).double(), plan).eval()
        assert difference(small(more), reference(net, plan, "all")(*double((more,)))) < TOLERANCE


def rows_beside_a_fixed_width(net, x):
    y = net.c(net.b(rows_made(net, x)).relu())
    if y.shape[1] != 12:
        raise ValueError("not 12 channels")
    return net.head(y)


@pytest.mark.parametrize("images", [1, 2])
def test_sizes_that_count_images_too_are_found_beside_what_holds_channels(images):
    groups = pruned_exactly(Body(rows_beside_a_fixed_width, c=nn.Conv2d(12, 12, 1)), image()[:images])
    assert free(groups) == {"b"}


def asks_a_mask(net, x):
    mask = torch.ones(len(x), 8, dtype=torch.bool, device=x.device)
    return net.head(net.b(net.a(x).relu()) if mask.all() else x[:, :1])


def asks_sizes_that_it_wrote(net, x):
    sizes = torch.empty(2, 2, dtype=torch.long, device=x.device)
    for row in sizes:
        row[0], row[1] = x.shape[2], x.shape[3]
    assert (sizes[:, 0] * sizes[:, 1]).sum() == 2 * x[0, 0].numel()
    return net.head(net.b(net.a(x).relu()).reshape(-1, 12, int(sizes[0, 0]), int(sizes[0, 1])))


def counts(net, x):
    left = torch.zeros((), dtype=torch.long, device=x.device) + 2
    x = net.a(x).relu()
    while left > 0:
        left -= 1
        x = net.c(x).relu()
    return net.head(net.b(x))


@pytest.mark.parametrize("forward", [asks_a_mask, asks_sizes_that_it_wrote, counts])
def test_what_follows_from_constants_is_known_without_weights(forward):
    net = Body(forward, c=nn.Conv2d(16, 16, 3, padding=1))
    found = free(pruned_exactly(net, image()))
    assert {"a", "b"} <= found
    with torch.device("meta"):  # where there are no weights to run with
        unmade = Body(forward, c=nn.Conv2d(16, 16, 3, padding=1))
    assert free(scap_hub.channel_groups(unmade, (image().to("meta"),))) == found


def asks_a_parameter_that_it_wrote(net, x):
    asked = torch.zeros(2, device=x.device)
    part = asked.view(2, 1)[0]
    part.copy_(net.scale)
    return net.head((net.b if asked.abs().sum() > 0 else net.c)(net.a(x).relu()))


def asks_a_draw(net, x):
    drawn = torch.zeros(1, device=x.device).uniform_(1, 2)
    return net.head((net.b if drawn > 0.5 else net.c)(net.a(x).relu()))


@pytest.mark.parametrize("forward", [asks_a_parameter_that_it_wrote, asks_a_draw])
def test_what_follows_from_parameters_or_chance_is_asked_with_weights(forward):
    net = Body(forward, c=nn.Conv2d(16, 12, 1), scale=nn.Parameter(torch.ones(1)))
    groups = pruned_exactly(net, image())
    assert free(groups) == {"a", "b"}
    with torch.device("meta"):
        unmade = Body(forward, c=nn.Conv2d(16, 12, 1), scale=nn.Parameter(torch.ones(1)))
    with pytest.raises(ModelError, match="cannot capture"):
        scap_hub.channel_groups(unmade, (image().to("meta"),))
