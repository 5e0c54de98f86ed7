"""The study of HBridge: what arms start from and train, what is counted."""
import torch

from diptych import config
from diptych.replication.runner import recipe_of
from diptych.replication.studies import hbridge as study
from diptych.systems.hbridge import HBridge
from diptych.training.recipe import Recipe
from diptych.training.stages import fixed_names, matches, trained_names


def build(recipe: Recipe) -> HBridge:
    with torch.device("meta"):
        return HBridge(config.merge(HBridge.small(), recipe.config, where="a study"))


def test_arms_start_from_the_bundled_model_but_for_semantic_tokens() -> None:
    """Layers, bridged or apart, have the same tensors."""
    fresh = {"semantic_tokens", "semantic_out.weight", "semantic_out.bias"}
    for arm in study.STUDY.arms:
        recipe = recipe_of(study.STUDY, arm, 0)
        names = {n for n, _ in build(recipe).named_parameters()}
        assert {n for n in names if not matches(n, list(recipe.init))} == (set() if arm.name == "plain" else fresh)


def test_only_the_painter_learns() -> None:
    recipe = recipe_of(study.STUDY, study.STUDY.arm("middle"), 0)
    model = build(recipe)
    names = trained_names(model, recipe.stages[0], fixed_names(model))
    inside = {n for n in names if n.startswith("trunk.")}
    assert inside == {n for n, _ in model.named_parameters() if n.startswith("trunk.norm.1") or
                      (n.startswith("trunk.layers.") and n.split(".")[4] == "1")}
    assert {n.split(".")[0] for n in names - inside} == {"latent_in", "latent_out", "semantic_out", "semantic_tokens",
                                                         "time"}


def test_the_middle_shares_half() -> None:
    torch.manual_seed(0)
    found = [study.joint_attention(HBridge(config.merge(HBridge.tiny(), {"apart": apart}, where="a test")), 2)
             for apart in ((0, 0), (1, 1), (4, 0))]
    assert found[0] == 2 * found[1] > 0 == found[2]
