"""Image sides that would lose pixels are refused, for patches of one size and for stages of patches."""

import pytest
import timm

from vitrify.errors import InputError
from vitrify.models.image_size import check_image_size


@pytest.mark.parametrize(
    ("name", "fitting", "refused", "advice"),
    [
        ("test_vit", 160, 170, "side 16: take 160 or 176"),
        ("test_vit", 16, 8, "side 16: take 16$"),
        ("vit_mini_patch2_28", 28, 29, "side 2: take 28 or 30"),
        ("pvt_v1_tiny", 96, 112, "side 32: take 96 or 128"),
    ],
)
def test_sides_that_cut_patches(name, fitting, refused, advice):
    model = timm.create_model(name)
    check_image_size(model, fitting, "--img-size")
    with pytest.raises(InputError, match=f"--img-size {refused} is not a multiple of the model's patch {advice}"):
        check_image_size(model, refused, "--img-size")


@pytest.mark.parametrize(("name", "arguments"), [("pvt_mini_56", {}), ("test_vit", {"dynamic_img_pad": True})])
def test_overlapping_and_padded_patches_take_any_side(name, arguments):
    check_image_size(timm.create_model(name, **arguments), 57, "--img-size")
