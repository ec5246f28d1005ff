"""offtower: learn, evaluate and serve two-tower retrieval policies from logged feedback."""

import sys

# While Python looks for the module of `python -m offtower.cli`, the working folder is the first
# entry. It may hold a stranger's files (torch.py beside a run's config.yaml), so nothing is
# imported from it. `python -P -m offtower.cli` does not add it in the first place.
if (
    sys.argv[:1] == ["-m"]
    and not sys.flags.safe_path
    and any(part.startswith(("offtower.", "-mofftower.")) for part in sys.orig_argv)
):
    del sys.path[0]

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from offtower.learner import TwoTowerPolicyLearner

__all__ = ["TwoTowerPolicyLearner", "__version__"]


def __getattr__(name: str) -> Any:
    # The learner pulls in torch; `offtower --help` and `import offtower` should not wait for it.
    if name == "TwoTowerPolicyLearner":
        from offtower.learner import TwoTowerPolicyLearner

        return TwoTowerPolicyLearner
    raise AttributeError(f"module 'offtower' has no attribute '{name}'")
