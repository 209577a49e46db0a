"Meta-reinforcement learning with state space models: a course that is a library."
__version__ = "0.0.1"

from ssm_metarl.stops import begin_program

begin_program()  # if this process is the program: from here on Ctrl-C ends it with one line

from ssm_metarl import envs  # registers the environments with Gymnasium; imports no torch
