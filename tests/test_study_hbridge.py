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


def test_arms_start_from_what_is_there_but_for_the_bridge() -> None:
    whole = build(study.PAINTER)
    known = {n for n, _ in whole.named_parameters()}
    for arm in study.STUDY.arms:
        recipe = recipe_of(study.STUDY, arm, 0)
        model = build(recipe)
        fresh = {n for n, _ in model.named_parameters() if not matches(n, list(recipe.init))}
        assert {n for n in fresh if ".there." not in n and ".back." not in n} == \
            {n for n in ("semantic_tokens", "semantic_out.weight", "semantic_out.bias") if arm.name != "plain"}
        bridged = study.DEPTH - sum(recipe.config["apart"])
        assert len(fresh) == 4 * bridged + (0 if arm.name == "plain" else 3)
        for name, source in recipe.init.items():
            if source.startswith("@painter"):
                assert source == f"@painter#{name}" and any(matches(n, [name]) for n in known)


def test_only_the_painter_learns() -> None:
    recipe = recipe_of(study.STUDY, study.STUDY.arm("middle"), 0)
    model = build(recipe)
    names = trained_names(model, recipe.stages[0], fixed_names(model))
    inside = {n for n in names if n.startswith("trunk.")}
    assert inside == {n for n, _ in model.named_parameters() if n.startswith("trunk.time.") or
                      n.startswith("trunk.norm.1") or (n.startswith("trunk.layers.") and n.split(".")[4] == "1")}
    assert names - inside == {f"{part}.{kind}" for part in ("latent_in", "latent_out", "semantic_out")
                              for kind in ("weight", "bias")} | {"semantic_tokens"}


def test_the_middle_shares_half() -> None:
    torch.manual_seed(0)
    found = {apart: study.shared_attention(HBridge(config.merge(HBridge.tiny(), {"apart": apart}, where="a test")), 2)
             for apart in ((0, 0), (1, 1), (4, 0))}
    for name, value in found[0, 0].items():
        assert value == 2 * found[1, 1][name] > 0 == found[4, 0][name]
