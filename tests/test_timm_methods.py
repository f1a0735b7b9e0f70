"""Methods and attributes of timm's models that `forward` does not use work on pruned models as on dense ones."""

from __future__ import annotations

import pytest
import timm

from tests.timm_checks import faults

QUICK = ("repvgg_a0", "test_vit")
FAMILIES = (
    "levit_128s", "lcnetv2_small",
    "resnet18", "fastvit_t8", "mobileone_s0", "repvit_m0_9", "repghostnet_050", "ghostnet_050", "shvit_s1",
    "tiny_vit_5m_224", "efficientvit_m0", "efficientvit_b0", "efficientformer_l1", "mobilenetv2_100", "convnext_atto",
    "edgenext_xx_small", "pvt_v2_b0", "efficientvim_m1", "nextvit_small", "regnety_002", "starnet_s1",
    "mobilevit_xxs", "deit_tiny_patch16_224", "xcit_nano_12_p16_224", "densenet121", "vgg11", "res2net50d",
    "swin_tiny_patch4_window7_224",
)  # fmt: skip


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_what_timm_asks_of_its_models_holds_for_pruned_ones(name):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    assert not list(faults(name))
