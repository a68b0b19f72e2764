"""Every attention of timm ends up converted or refused by name; none is passed over, none mistaken for another."""

import importlib
import inspect
import pkgutil

import pytest
import timm
import timm.layers
import timm.models
from torch import nn

from vitrify import recipes
from vitrify.convert import adapters, convert_

pytestmark = pytest.mark.filterwarnings("ignore:Importing from timm")  # old names that only warn

CONVERTED = {
    "timm.layers.attention.Attention",
    "timm.models.pvt_v2.Attention",
    "timm.models.levit.Attention",
    "timm.models.levit.AttentionDownsample",
}


def timm_modules():
    """The nn.Module classes that timm defines."""
    found = set()
    for package in (timm.models, timm.layers):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            for _, cls in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
                if issubclass(cls, nn.Module) and cls.__module__ == info.name:
                    found.add(cls)
    return found


def test_exactly_these_classes_of_timm_have_an_adapter():
    classes = {adapters.qualified_name(cls): cls for cls in timm_modules()}
    named = {name for name in classes if name in adapters._ADAPTERS}
    assert named == CONVERTED
    for name in named:
        module_name, class_name = adapters._ADAPTERS[name]
        adapter = getattr(importlib.import_module(f"vitrify.convert.adapters.{module_name}"), class_name)
        assert adapter.source is classes[name]
        # The source's call, so that whoever calls the module need not know.
        assert list(inspect.signature(adapter.forward).parameters) == list(
            inspect.signature(classes[name].forward).parameters
        )


def test_reasons_are_given_for_classes_that_exist():
    classes = {adapters.qualified_name(cls) for cls in timm_modules()}
    assert set(adapters._REASONS) <= classes
    assert not set(adapters._REASONS) & CONVERTED


# Model, and the attention class that has to be refused in it (None: all of its attention converts).
FAMILIES = {
    "deit3_small_patch16_224": None,
    "vit_small_patch14_reg4_dinov2": None,
    "vit_base_patch16_siglip_gap_224": None,
    "vit_base_patch16_siglip_224": "timm.layers.attention_pool.AttentionPoolLatent",
    "pit_ti_224": None,
    "levit_128s": None,
    "levit_conv_128s": None,
    "mobilevit_xs": None,
    "pvt_v2_b0": None,
    "pvt_v2_b2_li": None,
    "crossvit_tiny_240": "timm.models.crossvit.CrossAttention",
    "vit_small_r26_s32_384": None,
    "xcit_nano_12_p16_224": "timm.models.xcit.XCA",
    "swin_tiny_patch4_window7_224": "timm.models.swin_transformer.WindowAttention",
    "swinv2_tiny_window8_256": "timm.models.swin_transformer_v2.WindowAttention",
    "cait_xxs24_224": "timm.models.cait.TalkingHeadAttn",
    "eva02_tiny_patch14_224": "timm.models.eva.EvaAttention",
    "beit_base_patch16_224": "timm.models.beit.Attention",
    "vit_relpos_small_patch16_224": "timm.models.vision_transformer_relpos.RelPosAttention",
    "mobilevitv2_050": "timm.models.mobilevit.LinearSelfAttention",
    "edgenext_xx_small": "timm.models.edgenext.CrossCovarianceAttn",
    "davit_tiny": "timm.models.davit.ChannelAttention",
    "coat_tiny": "timm.models.coat.FactorAttnConvRelPosEnc",
    "twins_pcpvt_small": "timm.models.twins.GlobalSubSampleAttn",
    "tnt_s_patch16_224": "timm.models.tnt.Attention",
    "visformer_tiny": "timm.models.visformer.Attention",
    "efficientformer_l1": "timm.models.efficientformer.Attention",
    "tiny_vit_5m_224": "timm.models.tiny_vit.Attention",
    "fastvit_sa12": "timm.models.fastvit.Attention",
    "nest_tiny": "timm.models.nest.Attention",
    "mvitv2_tiny": "timm.models.mvitv2.MultiScaleAttention",
    "maxvit_rmlp_pico_rw_256": "timm.models.maxxvit.AttentionCl",
    "volo_d1_224": "timm.models.volo.OutlookAttention",
    "hiera_tiny_224": "timm.models.hiera.MaskUnitAttention",
    "caformer_s18": "timm.models.metaformer.Attention",
    "poolformer_s12": "none",
    "resnet18": "none",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    model = timm.create_model(name)
    refused_class = FAMILIES[name]
    conversion = convert_(model, recipes.vitality())
    refused = {change.module_class for change in conversion.refused}
    assert not conversion.notes
    if refused_class is None:
        assert conversion.changed
        assert not refused
    elif refused_class == "none":
        assert not conversion.changed + conversion.kept + conversion.refused
    else:
        assert refused_class in refused
    for change in conversion.refused:
        assert change.module_class in change.detail
    # What computes softmax and was not refused would have been passed over in silence.
    listed = {change.name for change in conversion.changed + conversion.kept + conversion.refused}
    for module_name, module in model.named_modules():
        if hasattr(module, "num_heads") and isinstance(getattr(module, "qkv", None), nn.Module):
            assert module_name in listed
