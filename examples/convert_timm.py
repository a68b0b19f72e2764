"""Convert a timm ViT to linear attention, see what changed, save it and load it: `python examples/convert_timm.py`."""

import timm
import torch

import vitrify

model = timm.create_model("vit_base_patch16_224", img_size=384).eval()  # pretrained=True with a network
images = torch.randn(1, 3, 384, 384)

conversion = vitrify.convert_(model, vitrify.recipes.taylor())
print(conversion)

with torch.inference_mode():
    print("logits", tuple(model(images).shape))

vitrify.save(model, "runs/example")
restored = vitrify.load("runs/example")
with torch.inference_mode():
    print("equal after loading:", torch.equal(model(images), restored.eval()(images)))
