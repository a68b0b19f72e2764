"""The checkpoints that GNT's authors released (VITA-Group/GNT): their file layout and names, read into our `GNT`.

A file is a dict of state dicts: `net_coarse`, `feature_net`, with a second network `net_fine`, and the optimiser's.
Their names on the left, ours on the right; i counts blocks, j residual blocks:

    net_coarse (net_fine)                      coarse (fine)
      rgbfeat_fc.{0,2}                           embed.{fc1,fc2}
      view_crosstrans.i  (over the views)        blocks.i.view
      view_selftrans.i   (along the ray)         blocks.i.ray
        attn_norm, ff_norm, ff                     attn_norm, mlp_norm, mlp
        attn.{q_fc,k_fc,v_fc,out_fc}               attn.{query,key,value,out}
        attn.pos_fc.{0,2}, attn.attn_fc.{0,2}      attn.position.{fc1,fc2}, attn.score.{fc1,fc2}
      q_fcs.i.{0,2}      (i even)                blocks.i.ray.place.{fc1,fc2}
      norm, rgb_fc                               norm, colour
    feature_net                                encoder
      conv1, bn1                                 stem, stem_norm
      layer{1,2,3}.j.{conv,bn}{1,2}              stages.{0,1,2}.j.{conv,norm}{1,2}
      layer{1,2,3}.j.downsample.{0,1}            stages.{0,1,2}.j.shortcut.{0,1}
      upconv{3,2}.conv.{conv,bn}                 {up1,up2}.{up,up_norm}
      iconv{3,2}.{conv,bn}                       {up1,up2}.{join,join_norm}
      out_conv                                   out
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrify.artefact.checkpoints import mismatch, read_torch
from vitrify.errors import InputError
from vitrify.nvs.model import GNT
from vitrify.nvs.presets import create

NETS = {"net_coarse": "coarse", "net_fine": "fine", "feature_net": "encoder"}
FINE_POINTS = 64  # the released code's default where there is a second network

_LAYERS = {"0": "fc1", "2": "fc2"}
_UP = {"3": "up1", "2": "up2"}
_RENAMED = {"ff_norm": "mlp_norm", "ff": "mlp", "q_fc": "query", "k_fc": "key", "v_fc": "value", "out_fc": "out"}


def _transformer(match: re.Match[str]) -> str:
    kind = "view" if match[1] == "cross" else "ray"
    rest = [_RENAMED.get(part, part) for part in match[3].split(".")]
    for theirs, ours in (("pos_fc", "position"), ("attn_fc", "score")):
        if theirs in rest:
            rest = ["attn", ours, _LAYERS[rest[2]], *rest[3:]]
    return ".".join(["blocks", match[2], kind, *rest])


# Patterns of their names within a network; what is not listed is called the same here.
_RULES: list[tuple[str, Any]] = [
    (r"rgbfeat_fc\.(\d)\.(.*)", lambda m: f"embed.{_LAYERS[m[1]]}.{m[2]}"),
    (r"view_(cross|self)trans\.(\d+)\.(.*)", _transformer),
    (r"q_fcs\.(\d+)\.(\d)\.(.*)", lambda m: f"blocks.{m[1]}.ray.place.{_LAYERS[m[2]]}.{m[3]}"),
    (r"rgb_fc\.(.*)", lambda m: f"colour.{m[1]}"),
    (r"conv1\.(.*)", lambda m: f"stem.{m[1]}"),
    (r"bn1\.(.*)", lambda m: f"stem_norm.{m[1]}"),
    (r"layer(\d)\.(\d+)\.downsample\.(.*)", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.shortcut.{m[3]}"),
    (r"layer(\d)\.(\d+)\.bn(.*)", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.norm{m[3]}"),
    (r"layer(\d)\.(\d+)\.(conv.*)", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.{m[3]}"),
    (r"upconv(\d)\.conv\.conv\.(.*)", lambda m: f"{_UP[m[1]]}.up.{m[2]}"),
    (r"upconv(\d)\.conv\.bn\.(.*)", lambda m: f"{_UP[m[1]]}.up_norm.{m[2]}"),
    (r"iconv(\d)\.conv\.(.*)", lambda m: f"{_UP[m[1]]}.join.{m[2]}"),
    (r"iconv(\d)\.bn\.(.*)", lambda m: f"{_UP[m[1]]}.join_norm.{m[2]}"),
    (r"out_conv\.(.*)", lambda m: f"out.{m[1]}"),
]


def our_name(name: str) -> str:
    """Return what a tensor of one of their networks is called in ours; unknown names come back as they are.

    >>> our_name("view_crosstrans.3.attn.q_fc.weight")
    'blocks.3.view.attn.query.weight'
    """
    for pattern, rule in _RULES:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        try:
            return str(rule(match))
        except (KeyError, IndexError):  # no layer of theirs; the comparison of names will show it
            return name
    return name


def load(path: str | Path, **changes: Any) -> GNT:
    """Read a released `.pth` file and return the model, in eval mode on the CPU; no code in the file is run.

    Widths, depth and whether there is a second network follow from the tensors; `changes` replace other fields of the
    `Architecture` (points, fine_points). Heads are 4, as in all that was released. Cameras and pixels must be those of
    `nvs.rays`: the released code numbers pixels from 0, half a pixel off. Places in the world are inputs, too: in
    forward-facing scenes the released code has y up and z backward, `nvs.scenes_io.normalised` y down and z forward.

    Raises InputError where the file is missing or damaged, is of another kind, or its tensors do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: expected a .pth file of the released GNT")
    content = read_torch(path)
    if not isinstance(content, Mapping) or not {"net_coarse", "feature_net"} <= content.keys():
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(
            f"{path} is no checkpoint of the released GNT: it needs net_coarse and feature_net, not {found}"
        )
    tensors: dict[str, Tensor] = {}
    for theirs, ours in NETS.items():
        net = content.get(theirs, {})
        if not isinstance(net, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in net.items()
        ):
            raise InputError(f"{path} is no checkpoint of the released GNT: its {theirs} is no dict of tensors")
        for name, tensor in net.items():
            tensors[f"{ours}.{our_name(name.removeprefix('module.'))}"] = tensor
    model = create("gnt", **{**_architecture(tensors, path), **changes})
    if problem := mismatch(model.state_dict(), tensors):
        raise InputError(f"{path} does not fit a GNT: {problem}")
    model.load_state_dict(tensors)
    return model.eval()


def _architecture(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the fields of the Architecture that follow from the tensors' shapes."""
    try:
        width, inputs = tensors["coarse.embed.fc1.weight"].shape
        placed = tensors["coarse.blocks.0.ray.place.fc1.weight"].shape[1] - width
        fine_net = any(name.startswith("fine.") for name in tensors)
        return {
            "width": width,
            "depth": _count(tensors, r"coarse\.blocks\.(\d+)\."),
            "squeeze": tensors["coarse.blocks.0.view.attn.score.fc1.weight"].shape[0],
            "features": inputs - 3,
            "frequencies": (placed // 6 - 1) // 2,
            "fine_net": fine_net,
            "fine_points": FINE_POINTS if fine_net else 0,
            "channels": tuple(tensors[f"encoder.stages.{i}.0.conv1.weight"].shape[0] for i in range(3)),
            "blocks": tuple(_count(tensors, rf"encoder\.stages\.{i}\.(\d+)\.") for i in range(3)),
        }
    except KeyError as error:
        raise InputError(f"{path} is no checkpoint of the released GNT: it has no {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} is no checkpoint of the released GNT: a tensor has too few dimensions") from error


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in tensors if (match := re.match(pattern, name)))
