"""Models that are no classifiers: what stood in the way of their analysis, each as small as it gets."""

import pytest
import torch
import transformers

import scap_hub
from scap_hub.channels.oracle import randomize
from scap_hub.training.evaluate import count
from tests.independent import TOLERANCE, copied, difference, leaves, reference
from tests.test_task_doors import SIZE, depth, detector, segmenter, tower

IMAGES = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(1))
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 64}


def relative_positions():
    """Its attention leaves tensors in an order of memory that views depend on."""
    config = transformers.Data2VecVisionConfig(**VIT, use_relative_position_bias=True)
    return transformers.Data2VecVisionModel(config)


def mask_transformer():
    """It looks at the values of a buffer."""
    config = transformers.EomtConfig(**VIT | {"num_hidden_layers": 3}, num_blocks=1, num_queries=5, num_labels=3)
    return transformers.EomtForUniversalSegmentation(config)


def queries_by_score(kind="RTDetr"):
    """It gathers the best queries, as many numbers as there are channels; D-FINE multiplies with a vector as well."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 24, 24], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[16, 24, 24], encoder_attention_heads=2,
        encoder_ffn_dim=24, d_model=16, num_queries=5, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=24,
        decoder_layers=2, decoder_attention_heads=2, num_labels=3, freeze_backbone_batch_norms=False,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


MODELS = {
    "segmenter": segmenter,
    "detector": detector,
    "depth": depth,
    "tower": tower,
    "relative positions": relative_positions,
    "mask transformer": mask_transformer,
    "queries by score": queries_by_score,
    "distributions": lambda: queries_by_score("DFine"),
}


LONG = ("depth", "detector", "distributions", "queries by score")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in MODELS])
def test_a_pruned_model_computes_what_the_masked_one_does(name):
    """By the oracle and by a check of its own; the plan takes random channels, half of those that can go."""
    torch.manual_seed(0)
    model = randomize(MODELS[name]()).eval()
    groups = scap_hub.channel_groups(model, IMAGES)
    scores = {group.name: torch.rand(group.size) for group in groups.prunable}
    plan = scap_hub.select(groups, scores, "ratio=0.5", round_to=1)
    assert scap_hub.verify(model, plan, IMAGES) < 1e-9
    assert count(scap_hub.apply_plan(model, plan), SIZE)["macs"] < 0.9 * count(model, SIZE)["macs"]
    assert not any("which has no rule" in (group.pinned_because or "") for group in groups)
    # The reference knows layer norms over the last dimension alone.
    known = {group.name: 0.5 for group in groups.prunable if "layernorm2d" not in str(group.members)}
    plan = scap_hub.select(groups, scores, known, round_to=1)
    with torch.no_grad():
        expected = reference(model, plan, "all")(IMAGES.double())
        assert any(leaf.abs().max() > 1e-3 for leaf in leaves(expected)), "nothing to compare"
        small = copied(scap_hub.apply_plan(model, plan)).double()
        assert difference(small(IMAGES.double()), expected) < TOLERANCE
