"A config that uses all four; the files beside this one can be imported by their names."
import reservoir  # each of these registers its class
import stay_close
import windy
import worst_first

from ssm_metarl.config import ExperimentConfig, register_config
from ssm_metarl.meta_learner import MetaConfig
from ssm_metarl.policy import PolicyConfig
from ssm_metarl.policy_steps import AdaptConfig


@register_config('windy-lab')
def windy_lab():
    return ExperimentConfig(
        env_name='WindyNavigation-v0', time_limit=50, learner='worst-first',
        meta=MetaConfig(outer_steps=100, tasks_per_batch=10),
        policy=PolicyConfig(hidden_dim=32, state_dim=16, core='reservoir', history=True),
        adapt=AdaptConfig(strategy='l2-sp'))
