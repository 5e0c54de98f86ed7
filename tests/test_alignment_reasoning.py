"""UnifiedReward-Think: published outputs."""
from pathlib import Path

from safetensors.torch import load_file

from diptych.adapters import parity

GOLDEN = Path(__file__).parent / "goldens" / "unified-reward-think"


def test_all_published_outputs_are_reproduced() -> None:
    cases = parity.run("unified-reward-think", GOLDEN)
    assert all(c.passed for c in cases), parity.table(cases)
    stored = {k.replace(".output", "") for k in load_file(GOLDEN / "golden.safetensors") if ".output" in k}
    assert stored <= {c.name for c in cases} and len(stored) == 37
    assert max(c.relative for c in cases) < 1e-6
