import zlib
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


def stream(
    seed: int, # of the experiment, >= 0
    purpose: str, # what the numbers are for, such as 'tasks', 'env', 'action'
    *index: int, # where they belong: outer step, task, ...
) -> np.random.Generator:
    "A generator that depends on nothing but its key, so results do not depend on batch size, order or the number of machines."
    if seed < 0: raise ValueError(f'seed={seed} is negative; take an integer >= 0')
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *index])


SPLITS = {'train': range(0, 8), 'validation': range(8, 9), 'held_out': range(9, 10)}  # tenths of all tasks


def split_of(
    task: dict, # field -> value
) -> str: # 'train', 'validation' or 'held_out'
    "The one split that a task belongs to, from a checksum of its own values: no seed can bring a held-out task into training."
    data = b''.join(np.ascontiguousarray(task[k]).tobytes() for k in sorted(task))
    tenth = zlib.crc32(data) % 10
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


class Family:
    "A family of environments that differ in their task: subclass it to bring your own."
    observation_space: spaces.Box
    action_space: spaces.Space
    reset_noise = 0 # uniform numbers that one reset consumes

    def draw_task(self, rng) -> dict:
        "One task: field -> float32 array or scalar."
        raise NotImplementedError
    def reset(self, tasks, noise):
        "State [N, ...] at the start of an episode; tasks: field -> [N, ...]; noise [N, reset_noise] in [0, 1)."
        raise NotImplementedError
    def step(self, state, action, tasks):
        "Next state [N, ...], reward [N], terminated [N]."
        raise NotImplementedError
    def observe(self, state, tasks):
        "Observation [N, O]: all that a policy sees."
        raise NotImplementedError
    def nothing(self, state, tasks):
        "Action [N, ...] of someone who does nothing."
        raise NotImplementedError
    def oracle(self, state, tasks):
        "Action [N, ...] of someone who knows the task."
        raise NotImplementedError


FAMILIES = {}


def register_family(
    name: str, # Gymnasium id, such as 'MetaGymToy-v0'
): # class decorator
    "Make a `Family` known to `EnvBatch`, and to `gymnasium.make` and `make_vec` under the same name."
    def decorate(cls):
        if name in FAMILIES: raise ValueError(f'family {name!r} is registered already, by {FAMILIES[name].__name__}; choose another name')
        if not issubclass(cls, Family): raise TypeError(f'{cls.__name__} is not a subclass of Family')
        FAMILIES[name] = cls
        gym.register(name, entry_point=lambda **kw: TaskEnv(EnvConfig(name, 1, **kw)),
                     vector_entry_point=lambda num_envs=1, **kw: EnvBatch(EnvConfig(name, num_envs, **kw)))
        return cls
    return decorate


@dataclass(frozen=True)
class EnvConfig:
    "Which environments, how many, how long, and the seed of their randomness."
    env_name: str = 'MetaGymToy-v0' # a registered family
    num_envs: int = 8 # K, environments in a batch; trajectories per task in a rollout
    time_limit: int = 200 # T, steps until truncation
    seed: int = 0 # of tasks and resets

    def __post_init__(self):
        if self.env_name not in FAMILIES: raise ValueError(f'env_name={self.env_name!r} is not one of {", ".join(map(repr, FAMILIES))}; register_family adds one')
        for name in ('num_envs', 'time_limit'):
            if getattr(self, name) < 1: raise ValueError(f'{name}={getattr(self, name)} is not a positive integer')
        if self.seed < 0: raise ValueError(f'seed={self.seed} is negative; take an integer >= 0')

    @property
    def family(self): return FAMILIES[self.env_name]()


def sample_tasks(
    config: EnvConfig, # family and seed
    n: int, # how many
    split: str = 'train', # 'train', 'validation' or 'held_out'
    step: int = 0, # outer step: another step, other tasks
    start: int = 0, # index of the first task
) -> list: # of n tasks, plain dicts
    "Tasks `start` to `start + n - 1` of a split; each depends on seed, split, step and its own index alone."
    if split not in SPLITS: raise ValueError(f'split={split!r} is not one of {", ".join(map(repr, SPLITS))}')
    if n < 1: raise ValueError(f'n={n} is not a positive number of tasks')
    family = config.family
    def one(i):
        rng = stream(config.seed, f'tasks/{split}', step, i)
        while split_of(task := family.draw_task(rng)) != split: pass
        return task
    return [one(i) for i in range(start, start + n)]


class EnvBatch(VectorEnv):
    "A batch of environments of one family, each with its own task, stepped together (Gymnasium vector API, autoreset disabled)."
    metadata = {'autoreset_mode': AutoresetMode.DISABLED}

    def __init__(self,
                 config: EnvConfig, # family, number of environments, time limit, seed
                 tasks: list = None): # one per environment; None: the first training tasks
        self.config, self.family, self.num_envs = config, config.family, config.num_envs
        self.single_observation_space, self.single_action_space = self.family.observation_space, self.family.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.seeds, self.episode = [config.seed + i for i in range(self.num_envs)], np.zeros(self.num_envs, int)
        self.state, self.t = None, np.zeros(self.num_envs, int)
        self.terminated, self.truncated = np.zeros((2, self.num_envs), bool)
        self.set_tasks(self.sample_tasks(self.num_envs) if tasks is None else tasks)

    def sample_tasks(self, n, split='train', step=0): return sample_tasks(self.config, n, split, step)

    def set_tasks(self,
                  tasks: list): # one per environment
        "Give each environment its task; takes effect at once, so reset before the next step."
        if len(tasks) != self.num_envs: raise ValueError(f'{len(tasks)} tasks for {self.num_envs} environments; give one each')
        fields = set(self._task_fields())
        for i, task in enumerate(tasks):
            if set(task) != fields: raise ValueError(f'task {i} has fields {sorted(task)}; {self.config.env_name} needs {sorted(fields)}')
        self.tasks = {k: np.stack([np.asarray(t[k], np.float32) for t in tasks]) for k in sorted(fields)}

    def _task_fields(self): return self.family.draw_task(np.random.default_rng(0))

    def get_tasks(self): return [{k: v[i].copy() for k, v in self.tasks.items()} for i in range(self.num_envs)]

    def reset(self, *, seed=None, options=None):
        "Observations [N, O] and an empty info; `options={'reset_mask': bool [N]}` resets some."
        N = self.num_envs
        mask = np.ones(N, bool) if not options or 'reset_mask' not in options else np.asarray(options['reset_mask'])
        if mask.shape != (N,) or mask.dtype != bool: raise ValueError(f'reset_mask is {mask.dtype} {mask.shape}; it must be bool ({N},)')
        if self.state is None and not mask.all(): raise ValueError('the first reset must reset all environments')
        if seed is not None:
            seeds = [seed + i for i in range(N)] if isinstance(seed, (int, np.integer)) else list(seed)
            if len(seeds) != N: raise ValueError(f'{len(seeds)} seeds for {N} environments; give one each, or one integer')
            self.seeds = [new if m and new is not None else old for new, old, m in zip(seeds, self.seeds, mask)]
            self.episode[mask] = 0
        noise = np.zeros((N, self.family.reset_noise), np.float32)
        if self.family.reset_noise:
            for i in np.flatnonzero(mask): noise[i] = stream(self.seeds[i], 'env', int(self.episode[i])).random(self.family.reset_noise, np.float32)
        fresh = self.family.reset(self.tasks, noise)
        self.state = fresh if self.state is None else np.where(mask.reshape(-1, *[1] * (fresh.ndim - 1)), fresh, self.state)
        self.t = np.where(mask, 0, self.t)
        self.terminated, self.truncated = self.terminated & ~mask, self.truncated & ~mask
        self.episode[mask] += 1
        return self.family.observe(self.state, self.tasks), {}

    def step(self,
             actions: np.ndarray): # [N, A], or int [N]
        "One step of all; an environment whose episode is over stays as it is, with reward 0, until it is reset."
        if self.state is None: raise RuntimeError('step before reset; call reset() first')
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape: raise ValueError(f'actions have shape {actions.shape}; expected {self.action_space.shape}')
        if not np.isfinite(actions).all():
            bad = np.flatnonzero(~np.isfinite(actions).reshape(self.num_envs, -1).all(1))
            raise ValueError(f'actions of environments {bad.tolist()} are not finite; check the policy that chose them')
        state, reward, terminated = self.family.step(self.state, actions, self.tasks)
        live = ~(self.terminated | self.truncated)
        self.state = np.where(live.reshape(-1, *[1] * (state.ndim - 1)), state, self.state)
        self.t = self.t + live
        self.terminated = np.where(live, terminated, self.terminated)
        self.truncated = np.where(live, ~terminated & (self.t >= self.config.time_limit), self.truncated)
        return self.family.observe(self.state, self.tasks), np.where(live, reward, np.float32(0)), self.terminated.copy(), self.truncated.copy(), {}


class TaskEnv(gym.Env):
    "One environment of a family: a batch of one behind the single-environment API."
    metadata = {'render_modes': []}

    def __init__(self, config: EnvConfig, render_mode=None):
        self.batch, self.render_mode = EnvBatch(config), render_mode
        self.observation_space, self.action_space = self.batch.single_observation_space, self.batch.single_action_space

    def sample_tasks(self, n, split='train', step=0): return self.batch.sample_tasks(n, split, step)
    def set_task(self, task): self.batch.set_tasks([task])
    def get_task(self): return self.batch.get_tasks()[0]

    def reset(self, *, seed=None, options=None):
        "`options={'task': task}` sets the task; else the last one stays."
        super().reset(seed=seed)
        if options and 'task' in options: self.set_task(options['task'])
        obs, info = self.batch.reset(seed=seed)
        return obs[0], info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.batch.step(np.asarray(action)[None])
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


@register_family('MetaGymToy-v0')
class PointNavigation(Family):
    "Find a hidden goal in the plane (Finn et al., ICML 2017): start at the origin, see (x, y), pay the distance to the goal."
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-0.1, 0.1, (2,), np.float32)

    def draw_task(self, rng): return {'goal': rng.uniform(-0.5, 0.5, 2).astype(np.float32)}
    def reset(self, tasks, noise): return np.zeros_like(tasks['goal'])
    def step(self, state, action, tasks):
        state = state + np.clip(action, -0.1, 0.1).astype(np.float32)
        gap = state - tasks['goal']
        return state, -np.sqrt((gap * gap).sum(-1)), (np.abs(gap) < 0.01).all(-1)
    def observe(self, state, tasks): return state.copy()
    def nothing(self, state, tasks): return np.zeros_like(state)
    def oracle(self, state, tasks): return np.clip(tasks['goal'] - state, -0.1, 0.1)
