"Meta-reinforcement learning with state space models: a course that is a library."
__version__ = "0.0.1"

from ssm_metarl import envs  # registers the environments with Gymnasium; imports no torch
