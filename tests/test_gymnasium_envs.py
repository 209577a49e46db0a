"Gymnasium's own environments as families: physics that change, processes, ends, and what a user may get wrong."
import gc
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from ssm_metarl.env_checks import check_family
from ssm_metarl.envs import EnvBatch, EnvConfig, play_actions, register_family, sample_tasks, unregister_family
from ssm_metarl.evaluation import reference_returns
from ssm_metarl.gymnasium_envs import MAX_WAITING, WAITING, GymnasiumBatch, GymnasiumFamily
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


# The half-cheetah.

def cheetah(name, tasks, **options):
    pytest.importorskip('mujoco')
    return EnvBatch(EnvConfig(name, len(tasks), 30, options=options), tasks)


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
