"""Finding the cores of a model, whoever put them there."""

from torch import nn

from vitrify.nn import Attention, Softmax, Taylor
from vitrify.nn.attention import named_cores


def test_cores_are_found_by_name_in_the_models_order():
    second = Attention(8, 2, core=Softmax())
    model = nn.Sequential(nn.Sequential(nn.LayerNorm(8), Attention(8, 2)), nn.ModuleDict({"attn": second}))
    cores = named_cores(model)
    assert list(cores) == ["0.1.core", "1.attn.core"]
    assert [type(core) for core in cores.values()] == [Taylor, Softmax]


def test_a_model_that_is_itself_an_attention():
    attention = Attention(8, 2)
    assert named_cores(attention) == {"core": attention.core}
