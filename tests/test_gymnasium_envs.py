"Gymnasium's own environments as families: physics that change, processes, ends, and what a user may get wrong."
import gc
import importlib
import pickle
from configparser import ConfigParser
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from ssm_metarl.env_checks import check_family
from ssm_metarl.batch import EnvBatch, play_actions
from ssm_metarl.envs import EnvConfig, register_family, sample_tasks, unregister_family
from ssm_metarl.evaluation import reference_returns
from ssm_metarl.gymnasium_envs import MAX_WAITING, WAITING, GymnasiumBatch, GymnasiumFamily, HalfCheetahVel
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.rollout import collect


@register_family('EnvsTestPole-v0')
class Pole(GymnasiumFamily):
    env_id, ranges = 'CartPole-v1', {'length': (.25, 1.), 'force': (5., 15.)}

    def apply(self, env, task):
        pole = env.unwrapped
        pole.length, pole.force_mag, pole.polemass_length = float(task['length']), float(task['force']), pole.masspole * float(task['length'])


@register_family('EnvsTestLake-v0')
class Lake(GymnasiumFamily):
    "Integer observations, which become one-hot vectors; no task changes anything."
    env_id, make_options, ranges = 'FrozenLake-v1', {'is_slippery': False}, {'nothing': (0., 1.)}
    def apply(self, env, task): pass


@pytest.fixture(scope='module', autouse=True)
def clean():
    yield
    for name in ('EnvsTestPole-v0', 'EnvsTestLake-v0'): unregister_family(name)


@pytest.mark.parametrize('options', [{}, {'parallel': True}])
@pytest.mark.parametrize('name', ['EnvsTestPole-v0', 'EnvsTestLake-v0'])
def test_families_are_sound(name, options): check_family(name, 2, 30, **options)


def test_each_environment_has_the_physics_of_its_task():
    "Against single environments that were changed by hand, over partial resets and new tasks."
    config = EnvConfig('EnvsTestPole-v0', 3, 500)
    env, rng = EnvBatch(config, sample_tasks(config, 3, 'held_out')), np.random.default_rng(0)
    assert isinstance(env, GymnasiumBatch)
    singles = [gym.make('CartPole-v1', max_episode_steps=-1).unwrapped for _ in range(3)]
    def copy(i, task):
        single = singles[i]
        single.reset()
        single.state = np.array(env.envs.get_attr('state')[i])
        single.length, single.force_mag, single.polemass_length = float(task['length']), float(task['force']), .1 * float(task['length'])
    env.reset(seed=1)
    for i, task in enumerate(env.get_tasks()): copy(i, task)
    for t in range(200):
        actions = rng.integers(2, size=3)
        obs, reward, terminated, truncated, _ = env.step(actions)
        for i in range(3):
            wanted, one, over, *_ = singles[i].step(actions[i])
            np.testing.assert_allclose(obs[i], wanted, 1e-6, 1e-6)
            assert (reward[i], terminated[i], truncated[i]) == (one, over, False)
        if terminated.any():
            env.set_tasks(env.sample_tasks(int(terminated.sum()), step=t), terminated)
            env.reset(options={'reset_mask': terminated})
            for i in np.flatnonzero(terminated): copy(i, env.get_tasks()[i])
    env.close()


def test_an_integer_observation_becomes_a_vector():
    env = EnvBatch(EnvConfig('EnvsTestLake-v0', 2, 10))
    assert env.single_observation_space == spaces.Box(0, 1, (16,), np.float32)
    obs, reward, terminated, _ = play_actions(env, np.array([[1, 2], [1, 2], [2, 2], [1, 2], [2, 2], [2, 2]]))  # to the goal at 15, and along the wall
    assert obs[:, 0].argmax(-1).tolist() == [0, 4, 8, 9, 13, 14, 15] and reward[:, 0].tolist() == [0, 0, 0, 0, 0, 1] and terminated[-1].tolist() == [True, False]


def test_environments_of_a_batch_that_is_gone_serve_the_next_one():
    config = EnvConfig('EnvsTestPole-v0', 2, 20, seed=3)
    tasks, actions = sample_tasks(config, 4), np.ones((15, 2), int)
    first = EnvBatch(config, tasks[2:], freeze=True)
    made = first.envs
    one = play_actions(first, actions)
    del first
    gc.collect()
    assert made in WAITING.values()
    second = EnvBatch(config, tasks[:2], freeze=True)
    assert second.envs is made and made not in WAITING.values()
    other, third = play_actions(second, actions), EnvBatch(config, tasks[2:], freeze=True)
    assert third.envs is not made  # it is in use
    for x, y in zip(one, play_actions(third, actions)): np.testing.assert_array_equal(x, y)
    assert not np.array_equal(one[0], other[0])
    second.close()
    del second
    gc.collect()
    assert made not in WAITING.values()  # what was closed stays closed


def test_few_batches_wait():
    "Batches of ever new sizes; those that waited longest are closed."
    for n in range(1, 12):
        batch = EnvBatch(EnvConfig('EnvsTestLake-v0', n))
        last = batch.envs
        del batch
        gc.collect()
        assert len(WAITING) <= MAX_WAITING and last in WAITING.values() and not last.closed


def test_no_environment_is_made_twice(monkeypatch):
    config = EnvConfig('EnvsTestPole-v0', 3, 20)
    EnvBatch(config).close()
    made = []
    monkeypatch.setattr(Pole, 'make_env', lambda self, original=Pole.make_env: made.append(self) or original(self))
    env = EnvBatch(config)
    assert len(made) == 3
    for step in range(3):
        env.set_tasks(env.sample_tasks(3, step=step))
        env.reset()
    del env
    gc.collect()
    EnvBatch(config, sample_tasks(config, 3, 'held_out')).reset()
    assert len(made) == 3


@pytest.mark.parametrize('parallel', [False, True])
def test_environments_that_failed_do_not_come_back(parallel):
    @register_family('EnvsTestFragile-v0')
    class Fragile(Pole):
        def apply(self, env, task):
            if task['length'] > .9: raise ArithmeticError('too long')
            super().apply(env, task)

    config, short, long = EnvConfig('EnvsTestFragile-v0', 2, options={'parallel': parallel}), {'length': .5, 'force': 10}, {'length': .95, 'force': 10}
    env = EnvBatch(config, [short, long])
    with pytest.raises(ArithmeticError): env.reset()
    del env
    gc.collect()
    env = EnvBatch(config, [short, short])
    env.reset()
    env.step(np.array([0, 1]))
    env.close()
    unregister_family('EnvsTestFragile-v0')


def test_an_environment_may_truncate_itself():
    gym.register('EnvsTestShort-v0', entry_point=lambda: gym.wrappers.TimeLimit(gym.make('CartPole-v1').unwrapped, 3))
    @register_family('EnvsTestCut-v0')
    class Cut(Pole): env_id = 'EnvsTestShort-v0'

    for mode in (AutoresetMode.DISABLED, AutoresetMode.SAME_STEP):
        env = EnvBatch(EnvConfig('EnvsTestCut-v0', 2, 20), autoreset_mode=mode)
        env.reset()
        ends = np.array([env.step(np.array([0, 1]))[2:4] for _ in range(3)])
        assert not ends[:, 0].any() and ends[:, 1].tolist() == [[False] * 2, [False] * 2, [True] * 2]
        env.close()
    unregister_family('EnvsTestCut-v0')
    gym.registry.pop('EnvsTestShort-v0')


def test_a_policy_rolls_out():
    config = EnvConfig('EnvsTestPole-v0', num_envs=2, time_limit=30)
    family, tasks = config.family, sample_tasks(config, 2)
    policy = SSMMetaPolicy(family.observation_space, family.action_space, PolicyConfig(hidden_dim=8, state_dim=4), 0)
    traj = collect(policy, dict(policy.named_parameters()), tasks, config)
    assert traj.obs.shape == (2, 2, 30, 4) and (traj.returns == traj.mask.sum(-1)).all()  # a point for each real step
    again = collect(policy, dict(policy.named_parameters()), tasks[1:], config, start=1)
    assert (again.obs[0] == traj.obs[1]).all()


def test_there_is_no_reference_where_a_family_has_none():
    config = EnvConfig('EnvsTestPole-v0', num_envs=2, time_limit=30)
    assert list(reference_returns(sample_tasks(config, 3), config)) == ['random']


def test_mistakes():
    with pytest.raises(gym.error.NameNotFound):
        class Unknown(GymnasiumFamily): env_id = 'NoSuchThing-v0'
        Unknown()
    with pytest.raises(TypeError, match="'MetaGymToy-v0' is not a GymnasiumFamily"): GymnasiumBatch(EnvConfig())
    with pytest.raises(ValueError, match="options of 'EnvsTestPole-v0' are parallel"): EnvConfig('EnvsTestPole-v0', options={'async': True})
    env = EnvBatch(EnvConfig('EnvsTestPole-v0', 2))
    with pytest.raises(ValueError, match=r'environments \[1\] are not integers from 0 to 1'): env.reset() and env.step([0, 2])
    env.close()
    with pytest.raises(RuntimeError, match='closed'): env.reset()


# Spaces, seeds and settings of foreign environments.

class Strict(gym.Env):
    "Sees and does what it is told to, refuses any action that is no member of its space, and needs a seed that NumPy's old generator takes."
    def __init__(self, seen=spaces.Box(-1, 1, (2,), np.float32), done=spaces.Discrete(2), render_mode=None): self.observation_space, self.action_space = seen, done
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None: np.random.RandomState(seed)
        return self.observation_space.sample(), {}
    def step(self, action):
        assert self.action_space.contains(action), f'{action!r} is no member of {self.action_space}'
        return self.observation_space.sample(), 0., False, False, {}


class StrictFamily(GymnasiumFamily):
    env_id, ranges = 'EnvsTestStrict-v0', {'nothing': (0., 1.)}
    def apply(self, env, task): pass


@pytest.fixture
def strict():
    "A function: spaces -> the name of a family that has them."
    gym.register('EnvsTestStrict-v0', entry_point=Strict)
    def make(**options):
        register_family('EnvsTestStrictFamily-v0')(type('StrictFamily', (StrictFamily,), {'make_options': options, '__module__': __name__, '__qualname__': 'StrictFamily'}))
        return 'EnvsTestStrictFamily-v0'
    yield make
    unregister_family('EnvsTestStrictFamily-v0')
    gym.registry.pop('EnvsTestStrict-v0')


def roll_out(name, steps=6, **options):
    config = EnvConfig(name, num_envs=2, time_limit=steps, options=options)
    family = config.family
    policy = SSMMetaPolicy(family.observation_space, family.action_space, PolicyConfig(hidden_dim=8, state_dim=4, init_log_std=1.), 0)
    return collect(policy, policy.get_params(), sample_tasks(config, 2), config)


@pytest.mark.parametrize('done', [
    spaces.Box(-.5, .5, (2,), np.float32), spaces.Box(0, np.inf, (2,), np.float64), spaces.Box(np.array([-np.inf, -1, 0]), np.array([np.inf, np.inf, 1]), dtype=np.float16),
    spaces.Box(-100, 100, (1,), np.int8), spaces.Box(-2**63, 2**63 - 1, (2,), np.int64), spaces.Discrete(3, start=-7), spaces.Discrete(5, start=2)], ids=str)
def test_actions_are_members_of_their_space(strict, done): assert roll_out(strict(done=done)).mask.all()


def test_doing_nothing_is_a_member_of_the_space(strict):
    family = EnvConfig(strict(done=spaces.Box(np.array([1, -1, -3]), np.array([2, 1, -2]), dtype=np.float32))).family
    assert family.nothing(np.zeros((2, 2)), {}).tolist() == [[1, 0, -2]] * 2


def test_an_option_that_changes_a_space(strict):
    "As an option of the family, and as a changed class attribute: spaces, and environments that wait, belong to their options."
    class Sized(StrictFamily):
        def __init__(self, size: int = 3, parallel: bool = False):
            self.make_options = {'seen': spaces.Box(-1, 1, (size,), np.float32)}
            super().__init__(parallel)

    strict()
    register_family('EnvsTestSized-v0')(Sized)
    for size in (3, 5, 3): assert roll_out('EnvsTestSized-v0', size=size).obs.shape[-1] == size
    unregister_family('EnvsTestSized-v0')
    name = strict(seen=spaces.Box(-1, 1, (3,), np.float32))
    assert roll_out(name).obs.shape[-1] == 3
    EnvConfig(name).family.make_options['seen'] = spaces.Box(-1, 1, (4,), np.float32)
    assert roll_out(name).obs.shape[-1] == 4


def test_spaces_are_found_once_for_each_option(monkeypatch):
    found = []
    monkeypatch.setattr(Lake, 'find_spaces', lambda self, original=Lake.find_spaces: found.append(self) or original(self))
    Lake.found_spaces = {}
    for _ in range(3): EnvConfig('EnvsTestLake-v0').family
    assert len(found) == 1


def test_seeds_suit_old_generators(strict):
    "`numpy.random.RandomState` takes seeds below 2^32, others below 2^31."
    name, seeds = strict(), []
    env = EnvBatch(EnvConfig(name, 50))
    for one in env.envs.envs: one.env.reset = lambda original=one.env.reset, **kw: seeds.append(kw['seed']) or original(**kw)
    env.reset(seed=2**63)
    assert len(set(seeds)) == 50 and 0 <= min(seeds) and 2**30 < max(seeds) < 2**31
    env.close()


@pytest.mark.parametrize('seen, part', [
    (spaces.Sequence(spaces.Box(0, 1, (2,))), 'observation is Sequence'), (spaces.Graph(spaces.Box(0, 1, (2,)), None), 'observation is Graph'),
    (spaces.Box(0, 1, (0,)), 'observation is the empty Box'), (spaces.Dict(image=spaces.Box(0, 1, (7, 7, 3)), mission=spaces.Text(10)), r"observation\['mission'\] is Text"),
    (spaces.Tuple([spaces.Discrete(2), spaces.Sequence(spaces.Discrete(2))]), r'observation\[1\] is Sequence')], ids=lambda x: type(x).__name__)
def test_observations_that_are_no_vectors(strict, seen, part):
    with pytest.raises(ValueError, match=f'EnvsTestStrict-v0: {part}.* override plain_env') as error: EnvConfig(strict(seen=seen)).family
    assert '\n' not in str(error.value)


def test_a_wrapper_in_plain_env_leaves_a_text_out(strict):
    class Reader(StrictFamily):
        make_options = {'seen': spaces.Dict(mission=spaces.Text(10), where=spaces.Box(-1, 1, (3,)))}
        def plain_env(self): return gym.wrappers.FilterObservation(super().plain_env(), ['where'])
    strict()
    assert Reader().observation_space.shape == (3,)


def test_images_are_flattened_and_cost_something(strict):
    name = strict(seen=spaces.Dict(view=spaces.Box(0, 255, (40, 30, 3), np.uint8), speed=spaces.Box(-1, 1, (2,))))
    with pytest.warns(UserWarning, match=r'EnvsTestStrict-v0: an array of shape \(40, 30, 3\) becomes a vector of 3,600 numbers.*14 kB'): family = EnvConfig(name).family
    assert family.observation_space.shape == (3602,)
    small = strict(seen=spaces.Box(0, 255, (7, 7, 3), np.uint8))
    assert EnvConfig(small).family.observation_space.shape == (147,)


def test_an_integer_that_does_not_start_at_zero_becomes_one_hot(strict):
    assert roll_out(strict(seen=spaces.Discrete(4, start=-2))).obs.sum(-1).eq(1).all()


def test_forgotten_and_wrong_settings():
    class Nameless(GymnasiumFamily): ranges = {'length': (0, 1)}
    class Texts(GymnasiumFamily): env_id, make_options = 'CartPole-v1', 'sutton_barto_reward=True'
    with pytest.raises(ValueError, match="Nameless: env_id=None is not a Gymnasium id"): Nameless()
    with pytest.raises(ValueError, match="Texts: make_options='sutton_barto_reward=True' is not a dict"): Texts()
    with pytest.raises(ValueError, match="Pole: parallel='no' is not True or False"): Pole('no')


def test_a_batch_that_is_collected_closes_nothing():
    "Gymnasium 1.1 closes a vector environment when it is collected; later releases do not."
    env = EnvBatch(EnvConfig('EnvsTestPole-v0', 2))
    env.__del__()
    assert not env.envs.closed and not env.closed
    env.close()


def newest(name):
    "The newest registered version of an environment."
    versions = [int(i.removeprefix(f'{name}-v')) for i in gym.registry if i.startswith(f'{name}-v') and i.removeprefix(f'{name}-v').isdigit()]
    return f'{name}-v{max(versions)}'


@pytest.mark.parametrize('name, module', [
    ('MountainCar', None), ('MountainCarContinuous', None), ('Acrobot', None), ('Pendulum', None), ('Taxi', None), ('FrozenLake', None), ('CliffWalking', None), ('Blackjack', None),
    ('LunarLander', 'Box2D'), ('Ant', 'mujoco'), ('Hopper', 'mujoco'), ('popgym-RepeatPreviousEasy', 'popgym'), ('popgym-AutoencodeEasy', 'popgym'), ('MiniGrid-Empty-5x5', 'minigrid')])
def test_foreign_environments(name, module):
    if module: importlib.import_module(module) if importlib.util.find_spec(module) else pytest.skip(f'{module} is not installed')
    class Foreign(GymnasiumFamily):
        env_id, ranges = newest(name), {'nothing': (0., 1.)}
        def apply(self, env, task): pass
        def plain_env(self):
            env = super().plain_env()
            return gym.wrappers.FilterObservation(env, ['image', 'direction']) if name.startswith('MiniGrid') else env
    register_family('EnvsTestForeign-v0')(Foreign)
    check_family('EnvsTestForeign-v0', 2, 12)
    traj = roll_out('EnvsTestForeign-v0', steps=20)
    assert traj.obs.isfinite().all() and traj.mask[..., 0].all() and traj.obs.shape[-1] == EnvConfig('EnvsTestForeign-v0').family.observation_space.shape[0]
    unregister_family('EnvsTestForeign-v0')


def test_meta_world_reach():
    pytest.importorskip('metaworld')
    if int(pytest.importorskip('mujoco').__version__.split('.')[0]) > 3: pytest.skip('Meta-World 3 needs MuJoCo 3')
    class Reach(GymnasiumFamily):
        env_id, make_options, ranges = 'Meta-World/MT1', {'env_name': 'reach-v3'}, {'nothing': (0., 1.)}
        def apply(self, env, task): pass
    register_family('EnvsTestReach-v0')(Reach)
    assert roll_out('EnvsTestReach-v0').obs.shape[-1] == 39
    unregister_family('EnvsTestReach-v0')


# The half-cheetah.

def cheetah(name, tasks, **options):
    pytest.importorskip('mujoco')
    return EnvBatch(EnvConfig(name, len(tasks), 30, options=options), tasks)


def test_without_mujoco_the_message_names_an_extra_and_the_repository_that_exist(monkeypatch):
    def missing(family): raise gym.error.DependencyNotInstalled('no MuJoCo')
    monkeypatch.setattr(HalfCheetahVel, 'find_spaces', missing)
    monkeypatch.setattr(HalfCheetahVel, 'found_spaces', {}, raising=False)
    with pytest.raises(ImportError, match='the half-cheetah needs MuJoCo; install the extra `mujoco`') as info: HalfCheetahVel()
    settings = ConfigParser(delimiters=['='])
    settings.read(Path(__file__).parents[1] / 'settings.ini', encoding='utf-8')
    assert f"pip install 'ssm-metarl[mujoco] @ git+{settings['DEFAULT']['git_url']}'" in str(info.value) and 'mujoco_requirements' in settings['DEFAULT']


def test_rewards_of_the_half_cheetah():
    "From positions and actions: velocity is the way of the torso in 0.05 s, as MuJoCo tells it."
    rng = np.random.default_rng(0)
    for name, field, values, rule in (('MetaHalfCheetahDir-v0', 'direction', (1, -1), lambda v, x: v * x), ('MetaHalfCheetahVel-v0', 'velocity', (.5, 2), lambda v, x: -abs(v - x))):
        env = cheetah(name, [{field: v} for v in values])
        env.reset(seed=2)
        before = np.array([data.qpos[0] for data in env.envs.get_attr('data')])
        for _ in range(20):
            a = rng.uniform(-1, 1, (2, 6)).astype(np.float32)
            reward = env.step(a)[1]
            after = np.array([data.qpos[0] for data in env.envs.get_attr('data')])
            np.testing.assert_allclose(reward, rule(np.array(values), (after - before) / .05) - .05 * (a**2).sum(-1), 1e-4, 1e-4)
            before = after
        env.close()


def test_masses_are_edited_and_come_back():
    env = cheetah('MetaHalfCheetahVel-v0', [{'velocity': 1, 'mass': m} for m in (.5, 1.5)], mass=.5)
    env.reset()
    original = gym.make('HalfCheetah-v5').unwrapped.model
    for factor, model in zip((.5, 1.5), [e.model for e in env.envs.get_attr('unwrapped')]):
        np.testing.assert_allclose(model.body_mass, factor * original.body_mass)
        for name in ('body_inertia', 'body_subtreemass'): np.testing.assert_allclose(getattr(model, name), factor * getattr(original, name))
        assert (model.body_invweight0[1:] != original.body_invweight0[1:]).all()  # what contacts feel
    made = env.envs.get_attr('unwrapped')
    env.set_tasks([{'velocity': 1, 'mass': 1}] * 2)
    env.reset()
    assert env.envs.get_attr('unwrapped') == made
    for e in made:
        for name in ('body_mass', 'body_subtreemass', 'body_invweight0'): np.testing.assert_allclose(getattr(e.model, name), getattr(original, name), 1e-9)
    env.close()


@pytest.mark.parametrize('name, options', [('MetaHalfCheetahVel-v0', {}), ('MetaHalfCheetahDir-v0', {}), ('MetaHalfCheetahVel-v0', {'mass': .3})])
def test_half_cheetah_batches_are_sound(name, options):
    pytest.importorskip('mujoco')
    check_family(name, 2, 16, **options)
    env = gym.make_vec(name, num_envs=2, time_limit=5, autoreset_mode=AutoresetMode.SAME_STEP, **options)
    env.reset(seed=0)
    for _ in range(5): *_, truncated, info = env.step(np.zeros((2, 6), np.float32))
    assert truncated.all() and info['final_obs'].shape == (2, 17)
    env.close()


def test_a_config_can_be_sent_to_another_process():
    config = EnvConfig('EnvsTestPole-v0', options={'parallel': True})
    assert pickle.loads(pickle.dumps(config)) == config
