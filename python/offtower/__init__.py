"""offtower: learn, judge and serve two-tower retrieval policies from logged feedback."""

from __future__ import annotations

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
