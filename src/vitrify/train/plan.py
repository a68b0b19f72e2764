"""Plans: a conversion in stages, each a recipe and its own fine-tuning, as ShiftAddViT's authors train theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vitrify.convert import LinearSpec, Recipe, convert_, recipes
from vitrify.convert.recipe import read_yaml
from vitrify.errors import InputError, unknown
from vitrify.train.config import TrainConfig
from vitrify.train.loop import finetune
from vitrify.train.run_folder import Resume
from vitrify.train.tasks import Task


@dataclass(frozen=True)
class Stage:
    """One step of a plan.

    recipe    what the model is converted to at its start; a str is a recipe's name or file, a mapping a whole recipe
    epochs    how long it is then trained; None: as long as the run's settings say
    lr        peak learning rate; None: the settings'
    """

    recipe: Recipe
    epochs: int | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        recipe: Any = self.recipe
        if isinstance(recipe, str):
            recipe = recipes.get(recipe)
        elif isinstance(recipe, Mapping):
            recipe = Recipe.from_dict(recipe)
        if not isinstance(recipe, Recipe):
            raise InputError(f"stage.recipe must be a recipe, its name, or its file, not {recipe!r}")
        object.__setattr__(self, "recipe", recipe)
        TrainConfig(**self._own(), min_lr=0.0, warmup_epochs=0.0)  # checks them

    def config(self, settings: TrainConfig) -> TrainConfig:
        """Return the settings of this stage's training."""
        changed = settings.to_dict() | self._own()
        changed["min_lr"] = min(settings.min_lr, changed["lr"])
        changed["warmup_epochs"] = min(settings.warmup_epochs, changed["epochs"])
        return TrainConfig(**changed)

    def _own(self) -> dict[str, Any]:
        return {name: value for name in ("epochs", "lr") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Plan:
    """Stages, in order.

    >>> [stage.recipe.mlp.primitive for stage in get_plan("shiftaddvit").stages]
    ['multiply', 'mixture']
    """

    stages: tuple[Stage, ...]

    @classmethod
    def from_yaml(cls, path: Path) -> Plan:
        """Read a plan: a mapping with the one key `stages`, a list of mappings with recipe, epochs and lr.

        Raises InputError naming the file and the stage that is wrong.
        """
        data = read_yaml(path, "plan file")
        if not isinstance(data, Mapping) or set(data) != {"stages"} or not isinstance(data["stages"], list):
            raise InputError(f"plan file {str(path)!r} must have the one key 'stages', with a list")
        if not data["stages"]:
            raise InputError(f"plan file {str(path)!r} has no stage")
        stages = []
        for number, stage in enumerate(data["stages"], 1):
            where = f"plan file {str(path)!r}, stage {number}"
            if not isinstance(stage, Mapping) or "recipe" not in stage:
                raise InputError(f"{where} must be a mapping with a recipe, not {stage!r}")
            known = [field.name for field in dataclasses.fields(Stage)]
            for key in stage:
                if key not in known:
                    raise unknown(f"key in {where}", str(key), known)
            try:
                stages.append(Stage(**stage))
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
        return cls(tuple(stages))


def in_two_stages(recipe: Recipe) -> Plan:
    """Return the plan that converts attention first, and the linear layers once that has been trained."""
    multiply = LinearSpec()
    first = dataclasses.replace(recipe, name=f"{recipe.name}, attention", projections=multiply, mlp=multiply)
    return Plan((Stage(first), Stage(recipe)))


_PLANS: dict[str, Callable[[], Recipe]] = {"shiftaddvit": recipes.shiftaddvit, "vitrify": recipes.vitrify}


def get_plan(name_or_path: str) -> Plan:
    """Return the plan of that name (its recipe in two stages), or the one in that YAML file."""
    if name_or_path in _PLANS:
        return in_two_stages(_PLANS[name_or_path]())
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".json") or "/" in name_or_path:
        return Plan.from_yaml(path)
    raise unknown("plan", name_or_path, sorted(_PLANS))


def run_plan(
    model: nn.Module,
    plan: Plan,
    task: Task,
    settings: TrainConfig,
    output_dir: str | Path,
    *,
    convert: Callable[[nn.Module, Recipe, Path], object] | None = None,
    teacher: nn.Module | None = None,
    resume: Resume = "auto",
) -> Path:
    """Convert and train `model` stage by stage; return the path of the final artefact, `output_dir`/model.

    The last stage's run is in `output_dir` itself, those before it in `output_dir`/stages/1, 2, ...: a stopped plan
    goes on where it was. `convert(model, recipe, folder of the stage's run)` is called at the start of each stage; by
    default that is `convert_`. Errors as `finetune`'s.
    """
    output_dir = Path(output_dir)
    for number, stage in enumerate(plan.stages, 1):
        last = number == len(plan.stages)
        folder = output_dir if last else output_dir / "stages" / str(number)
        if convert is None:
            convert_(model, stage.recipe)
        else:
            convert(model, stage.recipe, folder)
        final = finetune(model, task, stage.config(settings), folder, teacher=teacher, resume=resume)
    return final
