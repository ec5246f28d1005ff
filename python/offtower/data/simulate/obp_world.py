"""OBP's synthetic bandit feedback, with the parts that its 0.4.1 release lacks.

Of `obp.dataset.SyntheticBanditDataset` 0.4.1 this uses the logistic reward function and the drawing
of contexts, actions and binary rewards, and adds:

- vectors for actions in place of one-hot ones;
- the behavior policy pi_b = softmax(beta q), returned as `pi_b`;
- a seed for the rounds apart from the seed of the world. OBP draws its coefficients and its first
  contexts from the same random numbers, and two logs of one world need a stream each;
- the true value of a policy.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.errors import ConfigError, MissingExtraError

BanditFeedback = dict[str, Any]


class ObpWorld:
    """One synthetic world of OBP: its logs share contexts' distribution, actions and rewards.

    q(x,a) = sigmoid(<coef_a, x> + <coef, action_context_a>) with coefficients uniform in [0, 1] and
    x and action_context standard normal.

    Args:
        n_actions: number of actions, at least 2.
        dim_context: dimension of the context.
        dim_action_context: dimension of the actions' vectors.
        beta: the behavior policy is softmax(beta q(x, .)).
        seed: of the world.

    Raises:
        MissingExtraError: obp is not installed.
        ConfigError: a number is out of its range.
    """

    def __init__(
        self,
        n_actions: int = 10,
        dim_context: int = 5,
        dim_action_context: int = 5,
        beta: float = 1.0,
        seed: int = 12345,
    ) -> None:
        if n_actions < 2 or dim_context < 1 or dim_action_context < 1:
            raise ConfigError("an OBP world needs at least 2 actions and dimensions of at least 1")
        obp_dataset = import_obp("obp.dataset", "synthetic bandit feedback of OBP")
        self.n_actions = n_actions
        self.beta = beta
        self._reward_function = obp_dataset.logistic_reward_function
        self._dataset = obp_dataset.SyntheticBanditDataset(
            n_actions=n_actions,
            dim_context=dim_context,
            reward_type="binary",
            reward_function=self._reward_function,
            behavior_policy_function=self._behavior_policy,
            random_state=seed,
        )
        rng = np.random.default_rng([seed, 1])
        self._dataset.action_context = rng.standard_normal((n_actions, dim_action_context))

    @property
    def action_context(self) -> NDArray[np.float64]:
        """(n_actions, dim_action_context)."""
        vectors: NDArray[np.float64] = self._dataset.action_context
        return vectors

    def expected_reward(self, context: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, n_actions) q of each context and action."""
        rewards: NDArray[np.float64] = self._dataset.calc_expected_reward(context)
        return rewards

    def sample(self, n_rounds: int, seed: int) -> BanditFeedback:
        """Draw a log: OBP's bandit-feedback dict, with `expected_reward` and `pi_b`.

        `pi_b` has OBP's shape of action distributions, (n_rounds, n_actions, 1).
        """
        self._dataset.random_ = np.random.RandomState(seed % 2**32)
        feedback: BanditFeedback = self._dataset.obtain_batch_bandit_feedback(n_rounds)
        feedback["pi_b"] = _softmax(self.beta * feedback["expected_reward"])[:, :, None]
        return feedback

    def _behavior_policy(
        self, context: NDArray[np.float64], action_context: NDArray[np.float64], random_state: int
    ) -> NDArray[np.float64]:
        expected = self._reward_function(context, action_context, random_state)
        return _softmax(self.beta * expected)


def obp_synthetic(
    n_rounds: int,
    n_actions: int = 10,
    dim_context: int = 5,
    beta: float = 1.0,
    seed: int = 0,
    *,
    dim_action_context: int = 5,
    world_seed: int = 12345,
) -> BanditFeedback:
    """Synthetic bandit feedback of OBP with logistic binary rewards.

    Two calls with one `world_seed` and two `seed`s give a training and a test log of one world.

    Returns:
        OBP's dict: n_rounds, n_actions, context (n, dim_context), action_context (n_actions,
        dim_action_context), action (n,), position None, reward (n,), pscore (n,), expected_reward
        (n, n_actions), and `pi_b` (n, n_actions, 1).

    Raises:
        MissingExtraError: obp is not installed.
    """
    world = ObpWorld(n_actions, dim_context, dim_action_context, beta, world_seed)
    return world.sample(n_rounds, seed)


def true_value(feedback: BanditFeedback, action_dist: NDArray[np.floating]) -> float:
    """Value of a policy on the contexts of `feedback`: mean_i sum_a pi(a|x_i) q(x_i, a).

    Args:
        feedback: with `expected_reward` (n, n_actions).
        action_dist: (n, n_actions) or OBP's (n, n_actions, 1) probabilities.

    Raises:
        ConfigError: the shapes differ.
    """
    expected = np.asarray(feedback["expected_reward"], dtype=np.float64)
    policy = np.asarray(action_dist, dtype=np.float64)
    if policy.ndim == 3 and policy.shape[2] == 1:
        policy = policy[:, :, 0]
    if policy.shape != expected.shape:
        raise ConfigError(
            f"action_dist must have shape {expected.shape} or {(*expected.shape, 1)}, "
            f"but has {np.shape(action_dist)}"
        )
    return float((policy * expected).sum(axis=1).mean())


def import_obp(module: str, purpose: str) -> Any:
    """Import a module of obp; its import otherwise sets the root logger to INFO.

    Raises:
        MissingExtraError: obp is not installed.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "obp":
            raise MissingExtraError("obp", "obp", purpose) from error
        raise
    finally:
        root.setLevel(level)
        for handler in list(root.handlers):
            if handler not in handlers:
                root.removeHandler(handler)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponential = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: NDArray[np.float64] = exponential / exponential.sum(axis=1, keepdims=True)
    return result
