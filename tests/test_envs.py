"Properties of `envs` that hold for any number of environments, seed, task and order of events."
import copy
import importlib.util
import inspect
import json
import pickle
import subprocess
import sys
import warnings
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssm_metarl.env_checks import check_family, check_vector_env, play_on
from ssm_metarl.batch import (BatchMember, EnvBatch, Luck, ResetNeeded, TaskEnv, UnknownOption, play_actions,
    splitmix64, stack_tasks, stream, uniform_numbers, unstack_tasks)
from ssm_metarl.envs import (FAMILIES, SPLITS, EnvConfig, Family, PointNavigation, TaskDistribution,
    checksum_split, family_class, register_family, sample_tasks, unregister_family)

few = settings(max_examples=25, deadline=None, derandomize=True)

NAMES = ['MetaGymToy-v0', 'EnvsTestWalk-v0', 'EnvsTestLever-v0']
names, seeds, size = st.sampled_from(NAMES), st.integers(0, 2**31), st.integers(1, 6)


@pytest.fixture(scope='module', autouse=True)
def families():
    "Two more families: starts that are random, and integer actions with an observation of three numbers and episodes that end early."
    @register_family('EnvsTestWalk-v0')
    class Walk(PointNavigation):
        reset_noise = 2
        def reset(self, tasks, noise): return noise - .5

    @register_family('EnvsTestLever-v0')
    class Lever(Family):
        observation_space, action_space, reset_noise = spaces.Box(-np.inf, np.inf, (3,), np.float32), spaces.Discrete(2, start=1), 1
        def draw_task(self, rng): return {'end': rng.uniform(2, 8), 'slope': rng.uniform(-1, 1, 3)}
        def reset(self, tasks, noise): return noise
        def step(self, state, action, tasks, noise):
            state = state + action[:, None].astype(np.float32)
            return state, tasks['slope'].sum(-1) * state[:, 0], state[:, 0] > tasks['end']
        def observe(self, state, tasks): return tasks['slope'] * state

    yield
    for name in NAMES[1:]: unregister_family(name)


def random_actions(config, T, seed):
    space = config.family.action_space
    shape, rng = (T, config.num_envs, *space.shape), stream(seed, 'test')
    return rng.integers(space.start, space.start + space.n, shape) if isinstance(space, spaces.Discrete) else rng.uniform(-.15, .15, shape).astype(np.float32)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True): np.testing.assert_array_equal(x, y, strict=True)


# One environment does not feel the others.

@few
@given(names, size, seeds, st.data())
def test_rows_do_not_depend_on_the_batch(name, N, seed, data):
    rows = data.draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True))
    config = EnvConfig(name, N, time_limit=6, seed=3)
    tasks, actions, keys = sample_tasks(config, N), random_actions(config, 8, seed), [seed + 11 * i for i in range(N)]
    together = play_actions(EnvBatch(config, tasks, freeze=True), actions, keys)
    some = play_actions(EnvBatch(replace(config, num_envs=len(rows)), [tasks[i] for i in rows], freeze=True), actions[:, rows], [keys[i] for i in rows])
    assert_same([x[:, rows] for x in together], some)


@few
@given(names, size, seeds, st.data())
def test_a_batch_is_so_many_single_environments(name, N, seed, data):
    "Any order of steps, partial resets and seeds."
    config = EnvConfig(name, N, time_limit=4)
    tasks = sample_tasks(config, N)
    batch, singles = EnvBatch(config, tasks, freeze=True), [EnvBatch(replace(config, num_envs=1), [task], freeze=True) for task in tasks]
    batch.reset(seed=seed)
    obs = np.concatenate([e.reset(seed=seed + i)[0] for i, e in enumerate(singles)])
    for a in random_actions(config, 12, seed):
        if data.draw(st.booleans()):
            mask = np.array(data.draw(st.lists(st.booleans(), min_size=N, max_size=N)))
            new = data.draw(st.lists(st.none() | seeds, min_size=N, max_size=N))
            for i in np.flatnonzero(mask): obs[i] = singles[i].reset(seed=[new[i]])[0][0]
            np.testing.assert_array_equal(batch.reset(seed=new, options={'reset_mask': mask})[0], obs)
        got, wanted = batch.step(a)[:4], [np.concatenate(x) for x in zip(*[e.step(a[i:i + 1])[:4] for i, e in enumerate(singles)])]
        assert_same(got, wanted)
        obs = got[0].copy()


# Episodes.

@few
@given(names, size, st.integers(1, 6), seeds)
def test_finished_environments_freeze(name, N, time_limit, seed):
    config = EnvConfig(name, N, time_limit)
    obs, reward, terminated, truncated = play_actions(EnvBatch(config, freeze=True), random_actions(config, 9, seed), seed)
    over = terminated | truncated
    for x in (terminated, truncated, over): assert (x[1:] >= x[:-1]).all()  # once over, over
    assert not (terminated & truncated).any()
    assert over[time_limit - 1:].all() and not truncated[:time_limit - 1].any()
    for t in range(1, 9):
        np.testing.assert_array_equal(obs[t + 1][over[t - 1]], obs[t][over[t - 1]])
        assert not reward[t][over[t - 1]].any()


@few
@given(names, seeds)
def test_episodes_are_keyed_by_seed_and_number(name, seed):
    env = EnvBatch(EnvConfig(name, 3))
    first, second = (env.reset(seed=s)[0] for s in (seed, None))
    assert_same([first, second], [env.reset(seed=s)[0] for s in (seed, None)])
    assert (first != second).any() == (name != 'MetaGymToy-v0')  # only there every start is the same
    start, again = (EnvBatch(EnvConfig(name, 3, seed=seed), env.get_tasks()).reset()[0] for _ in range(2))
    assert_same([start], [again])


@few
@given(names, size, st.integers(1, 6), seeds)
def test_restarting_is_freezing_and_resetting(name, N, time_limit, seed):
    "Both modes give the same episodes: SAME_STEP shows the last observation in `final_obs`, and goes on with what `reset_mask` would have given."
    config = EnvConfig(name, N, time_limit)
    ours, theirs = EnvBatch(config, autoreset_mode=AutoresetMode.SAME_STEP), EnvBatch(config)
    assert_same(ours.reset(seed=seed)[:1], theirs.reset(seed=seed)[:1])
    for a in random_actions(config, 12, seed):
        obs, *rest, info = ours.step(a)
        last, *wanted, _ = theirs.step(a)
        assert_same(rest, wanted)
        over = rest[1] | rest[2]
        assert ('final_obs' in info) == over.any()
        if over.any():
            assert_same([info['final_obs'], info['_final_obs']], [last, over])
            last = theirs.reset(options={'reset_mask': over})[0]
        assert_same([obs], [last])


@few
@given(names, size, st.data())
def test_some_environments_get_new_tasks(name, N, data):
    env = EnvBatch(EnvConfig(name, N, time_limit=3))
    old, mask = env.get_tasks(), np.array(data.draw(st.lists(st.booleans(), min_size=N, max_size=N)))
    env.reset()
    new = env.sample_tasks(int(mask.sum()), start=N) if mask.any() else []
    env.set_tasks(new, mask)
    wanted = [new.pop(0) if m else task for m, task in zip(mask, old)]
    for a, b in zip(env.get_tasks(), wanted, strict=True): assert_same([a[k] for k in sorted(a)], [np.float32(b[k]) for k in sorted(b)])
    actions = random_actions(env.config, 1, 0)[0]
    if mask.any():
        with pytest.raises(RuntimeError, match='have a new task; reset them first'): env.step(actions)
        env.reset(options={'reset_mask': mask})
    env.step(actions)


def test_luck_within_an_episode_is_keyed_like_its_start():
    "Numbers of step t do not depend on when the other environments started."
    @register_family('EnvsTestDice-v0')
    class Dice(PointNavigation):
        reset_noise, step_noise = 2, 3
        def reset(self, tasks, noise): return noise
        def step(self, state, action, tasks, noise): return noise[:, :2], noise[:, 2], noise[:, 0] > .8

    config = EnvConfig('EnvsTestDice-v0', 5, 4)
    check_family('EnvsTestDice-v0', 5)
    obs, reward, terminated, truncated = play_on(EnvBatch(config, autoreset_mode=AutoresetMode.SAME_STEP), np.zeros((3000, 5, 2)), 1)
    numbers = np.concatenate([reward.ravel(), obs[1:][~(terminated | truncated)].ravel() / .8])
    assert stats.kstest(reward.ravel(), 'uniform').pvalue > .01 and len(set(reward.ravel())) > .99 * reward.size
    assert 0 < numbers.min() and reward.max() < 1
    luck = splitmix64(np.array([1], np.uint64))
    assert_same([uniform_numbers(luck, 8)[0]], [np.concatenate([obs[0, 0], *[np.r_[o, r] for o, r in zip(obs[1:3, 0], reward[:2, 0])]])])
    unregister_family('EnvsTestDice-v0')


def test_returned_arrays_are_new():
    env = EnvBatch(EnvConfig(num_envs=2, time_limit=2), freeze=True)
    kept = [env.reset()[0]]
    copies = [kept[0].copy()]
    for _ in range(4):
        out = env.step(np.full((2, 2), .1, np.float32))[:4]
        kept, copies = kept + list(out), copies + [x.copy() for x in out]
    assert_same(kept, copies)
    for x in kept: x[:] = 1
    assert env.t.tolist() == [2, 2] and not env.terminated.any() and not (env.state == 1).any()


def test_actions_belong_to_the_caller():
    "A family may keep an action as its state; the caller's array stays writable, and nothing that happens to it reaches the state."
    @register_family('EnvsTestKeep-v0')
    class Keep(PointNavigation):
        def step(self, state, action, tasks, noise): return action, action[:, 0], np.zeros(len(action), bool)

    env, buffer = EnvBatch(EnvConfig('EnvsTestKeep-v0', 2)), np.ones((3, 2, 2), np.float32)
    env.reset()
    env.step(buffer[0])
    buffer[0] = 7
    assert (env.state == 1).all()
    Keep.step = lambda self, state, action, tasks, noise: (np.clip(action, -.1, .1, out=action), action[:, 0], action[:, 0] > 1)
    with pytest.raises(ValueError, match='read-only'): env.step(buffer[1])
    unregister_family('EnvsTestKeep-v0')


def test_a_reset_that_fails_is_still_due():
    env = EnvBatch(EnvConfig('EnvsTestWalk-v0', 2))
    env.reset()
    env.set_tasks(env.sample_tasks(2, step=1))
    env.family.reset = lambda tasks, noise: 1 / 0
    with pytest.raises(ZeroDivisionError): env.reset()
    with pytest.raises(RuntimeError, match=r'environments \[0, 1\] have a new task'): env.step(np.zeros((2, 2)))


def test_copies_go_their_own_way():
    for copies in (copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))):
        env = EnvBatch(EnvConfig(num_envs=2))
        env.reset(seed=3)
        twin = copies(env)
        assert_same([env.step(np.full((2, 2), .1))[0]], [twin.step(np.full((2, 2), .1))[0]])
        env.step(np.full((2, 2), .1))
        assert (env.t, twin.t)[0][0] == twin.t[0] + 1


def test_a_family_cannot_change_state_or_tasks_in_place():
    @register_family('EnvsTestInPlace-v0')
    class InPlace(PointNavigation):
        def step(self, state, action, tasks, noise): return super().step(state, action, self.spoil(state, tasks), noise)

    env = EnvBatch(EnvConfig('EnvsTestInPlace-v0', 2))
    for spoil in (lambda self, state, tasks: state.fill(0), lambda self, state, tasks: tasks['goal'].fill(0)):
        InPlace.spoil = spoil
        env.reset()
        with pytest.raises(ValueError, match='read-only'): env.step(np.zeros((2, 2)))
    unregister_family('EnvsTestInPlace-v0')


# Tasks.

@few
@given(names, st.sampled_from(sorted(SPLITS)), st.integers(0, 10**6), st.integers(0, 50), st.integers(1, 8), st.integers(0, 8))
def test_a_task_depends_on_its_own_index_alone(name, split, seed, step, n, start):
    config = EnvConfig(name, seed=seed)
    some, all_ = sample_tasks(config, n, split, step, start), sample_tasks(config, start + n, split, step)
    for a, b in zip(some, all_[start:], strict=True): assert_same([a[k] for k in sorted(a)], [b[k] for k in sorted(b)])
    assert {checksum_split(task) for task in some} == {split}


@few
@given(names, seeds)
def test_a_record_keeps_its_split(name, seed):
    "Through the batch, a text file, another order of fields and another dtype."
    env = EnvBatch(EnvConfig(name, 4, seed=seed))
    tasks = env.sample_tasks(4, 'held_out')
    env.set_tasks(tasks)
    text = json.loads(json.dumps([{k: np.asarray(v).tolist() for k, v in task.items()} for task in env.get_tasks()]))
    for form in (env.get_tasks(), text, [dict(reversed(t.items())) for t in text], [{k: np.float64(v) for k, v in t.items()} for t in text]):
        assert [checksum_split(task) for task in form] == ['held_out'] * 4
        env.set_tasks(form)


def test_splits_do_not_overlap_and_stay_uniform():
    goals = {split: np.concatenate([[task['goal'] for task in sample_tasks(EnvConfig(seed=seed), 1200, split)] for seed in range(3)]) for split in SPLITS}
    assert len({tuple(g) for x in goals.values() for g in x}) == 3 * 3 * 1200  # 10 800 goals, all different
    for x in goals.values():
        for axis in x.T: assert stats.kstest(axis, 'uniform', (-.5, 1)).pvalue > .01
        quadrant = np.bincount((x > 0) @ [1, 2], minlength=4)
        assert stats.chisquare(quadrant).pvalue > .01


def test_a_short_key_is_filled_up_with_zeros():
    "The reason for: within one purpose equally many indices."
    assert stream(1, 'x').random() == stream(1, 'x', 0, 0).random() != stream(1, 'x', 0, 1).random()


def test_out_of_distribution_is_out_of_distribution():
    tasks = TaskDistribution(PointNavigation(rotation=1), seed=3)
    far = tasks.sample_tasks(300, 'far')
    assert tasks.splits == (*SPLITS, 'far') and {tasks.split_of(task) for task in far} == {'out of distribution'}
    assert all(tasks.split_of(task) == split for split in SPLITS for task in tasks.sample_tasks(20, split))
    goals = np.array([task['goal'] for task in far])
    assert (abs(goals).max(1) > .5).all() and (abs(goals) <= 1).all()


def test_tasks_survive_a_file(tmp_path):
    config = EnvConfig(options={'rotation': 3., 'bias': .1})
    tasks = sample_tasks(config, 5)
    np.savez(tmp_path / 'tasks.npz', **stack_tasks(tasks, config.family))
    with np.load(tmp_path / 'tasks.npz', allow_pickle=False) as file: back = unstack_tasks(dict(file))
    for a, b in zip(back, tasks, strict=True): assert_same([a[k] for k in sorted(a)], [b[k] for k in sorted(b)])


def test_hidden_rotation_gain_and_bias():
    "Against complex numbers: a turn by an angle is a product."
    env = EnvBatch(EnvConfig(num_envs=50, options={'rotation': 3.14, 'gain': .5, 'bias': .2}), freeze=True)
    actions, tasks = random_actions(env.config, 5, 0), env.tasks
    obs, reward, *_ = play_actions(env, actions)
    moves = np.clip(actions, -.1, .1) @ [1, 1j] * tasks['gain'] * np.exp(1j * tasks['rotation'])
    place = np.cumsum(moves, 0)
    np.testing.assert_allclose(obs[1:] @ [1, 1j], place + tasks['bias'] @ [1, 1j], 1e-4, 1e-6)
    np.testing.assert_allclose(reward, -abs(place - tasks['goal'] @ [1, 1j]), 1e-4, 1e-6)
    env.reset()
    for _ in range(60): reward = env.step(env.family.oracle(env.state, tasks))[1]
    assert (reward > -.01 * 2**.5).all()


# Families and Gymnasium.

@pytest.mark.parametrize('name', NAMES)
def test_families_are_sound(name): check_family(name)


def test_a_name_belongs_to_one_class():
    def define():
        class Twice(PointNavigation): pass
        return register_family('EnvsTestTwice-v0')(Twice)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        define()
        assert define() is FAMILIES['EnvsTestTwice-v0']
    with pytest.raises(ValueError, match='is registered already'): register_family('EnvsTestTwice-v0')(Family)
    unregister_family('EnvsTestTwice-v0')
    assert 'EnvsTestTwice-v0' not in FAMILIES and 'EnvsTestTwice-v0' not in gym.registry


@pytest.mark.parametrize('name', NAMES)
def test_gymnasium_finds_nothing_wrong(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for meant in ('.*observation space (min|max)imum value is -?infinity', '.*symmetric and normalized space'): warnings.filterwarnings('ignore', meant)
        check_env(gym.make(name, time_limit=20).unwrapped)


def test_make_make_vec_and_wrappers():
    single, vector = gym.make('EnvsTestWalk-v0', time_limit=5, seed=2), gym.make_vec('EnvsTestWalk-v0', num_envs=3, time_limit=5, seed=2)
    assert isinstance(single.unwrapped, TaskEnv) and vector.config == EnvConfig('EnvsTestWalk-v0', 3, 5, 2)
    np.testing.assert_array_equal(single.reset(seed=8)[0], vector.reset(seed=8)[0][0])
    env = RecordEpisodeStatistics(vector)
    env.reset()
    total = sum(env.step(np.zeros((3, 2), np.float32))[1] for _ in range(5))
    np.testing.assert_allclose(env.return_queue, total, 1e-5)
    env.reset(options={'reset_mask': np.array([True, False, False])})
    env.close()
    assert vector.closed


def test_a_task_env_is_a_batch_of_one():
    config = EnvConfig('EnvsTestWalk-v0', num_envs=8, time_limit=5)
    task, actions = sample_tasks(config, 1, 'held_out')[0], random_actions(replace(config, num_envs=1), 5, 0)
    env = TaskEnv(config, task)
    obs, reward, terminated, truncated = play_actions(EnvBatch(replace(config, num_envs=1), [task]), actions, 4)
    np.testing.assert_array_equal(env.reset(seed=4)[0], obs[0, 0])
    for t in range(5):
        o, *rest, info = env.step(actions[t, 0])
        np.testing.assert_array_equal(o, obs[t + 1, 0])
        assert rest == [reward[t, 0], terminated[t, 0], truncated[t, 0]] and [type(x) for x in rest] == [float, bool, bool] and info == {}


def test_do_nothing_and_oracle():
    "The published protocol at T = 100: exact expectations -38.26 and -0.506."
    goals = stream(0, 'goals').uniform(-.5, .5, (5000, 2))
    env = EnvBatch(EnvConfig(num_envs=5000, time_limit=100), [{'goal': g} for g in goals], freeze=True)
    for player, exact in (('nothing', -38.26), ('oracle', -.506)):
        env.reset()
        total = sum(env.step(getattr(env.family, player)(env.state, env.tasks))[1] for _ in range(100))
        assert abs(total.mean() - exact) < 3 * total.std() / 5000**.5 + .005


# Gymnasium's conventions, on every family: what its own tests of vector environments ask for.

EVERY = [pytest.param(name, marks=pytest.mark.skipif('Cheetah' in name and not importlib.util.find_spec('mujoco'), reason='needs MuJoCo')) for name in FAMILIES if name.startswith('Meta')]
every = pytest.mark.parametrize('name', EVERY)
every_mode = pytest.mark.parametrize('mode', list(AutoresetMode))


def some_actions(env, T, seed=0):
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(T)]


def same_task(a, b): return a.keys() == b.keys() and all(np.array_equal(np.float32(a[k]), np.float32(b[k])) for k in a)


@every
@every_mode
def test_each_autoreset_mode_is_that_of_gymnasiums_loop(name, mode):
    "Numbers and info, over several episodes, with a partial reset on the way."
    config = EnvConfig(name, 3, 4)
    ours = EnvBatch(config, autoreset_mode=mode)
    theirs = SyncVectorEnv([lambda task=task: TaskEnv(config, task) for task in ours.get_tasks()], autoreset_mode=mode)
    assert ours.autoreset_mode == ours.metadata['autoreset_mode'] == theirs.metadata['autoreset_mode'] == mode
    np.testing.assert_allclose(ours.reset(seed=5)[0], theirs.reset(seed=5)[0], 1e-5, 1e-5)
    for t, action in enumerate(some_actions(ours, 11)):
        (*got, info), (*wanted, said) = (env.step(action) for env in (ours, theirs))
        for x, y in zip(got, wanted, strict=True): np.testing.assert_allclose(x, y, 1e-5, 1e-5)
        over = got[2] | got[3]
        assert info.keys() == said.keys() and bool(info) == (mode == AutoresetMode.SAME_STEP and over.any())
        if info:
            assert info['final_info'] == said['final_info'] == {}
            for key in ('_final_obs', '_final_info'): np.testing.assert_array_equal(info[key], said[key])
            np.testing.assert_allclose(info['final_obs'][over], np.stack(said['final_obs'][over]), 1e-5, 1e-5)
        masks = [over] if mode == AutoresetMode.DISABLED and over.any() else [np.array([True, False, True])] if t == 5 else []
        for mask in masks: np.testing.assert_allclose(*[env.reset(options={'reset_mask': mask})[0] for env in (ours, theirs)], 1e-5, 1e-5)
    ours.close()


@every
def test_what_is_over_is_not_stepped_unless_it_freezes(name):
    config = EnvConfig(name, 2, 3)
    strict, frozen, single = EnvBatch(config), EnvBatch(config, freeze=True), TaskEnv(config)
    actions = some_actions(strict, 5)
    play_actions(strict, actions[:3]), play_actions(frozen, actions[:3]), single.reset()
    for action in actions[:3]: *_, terminated, truncated, _ = single.step(action[0])
    assert terminated or truncated
    for env, action in ((strict, actions[3]), (single, actions[3][0])):
        for kind in (ResetNeeded, RuntimeError, gym.error.ResetNeeded):
            with pytest.raises(kind, match=r'environments \[0.* are over; reset them'): env.step(action)
    _, reward, *ends, _ = frozen.step(actions[3])
    assert not reward.any() and np.logical_or(*ends).all()
    strict.reset(options={'reset_mask': np.array([True, False])})
    with pytest.raises(ResetNeeded, match=r'environments \[1\] are over'): strict.step(actions[3])
    for env in (strict, frozen, single): env.close()


@pytest.mark.parametrize('mode', [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_freezing_is_for_disabled_autoreset(mode):
    with pytest.raises(ValueError, match='freeze=True: with autoreset_mode=.* nothing stays over'): EnvBatch(EnvConfig(), autoreset_mode=mode, freeze=True)


def test_make_vec_starts_again_in_the_same_step():
    env = gym.make_vec('MetaCartPole-v0', 2, time_limit=3)
    env.reset(seed=0)
    steps = [env.step(np.array([0, 1])) for _ in range(5)]
    assert [step[1].tolist() for step in steps] == [[1, 1]] * 5 and [step[3].all() for step in steps] == [False, False, True, False, False]
    assert gym.make_vec('MetaCartPole-v0', 2, autoreset_mode='NextStep').autoreset_mode == AutoresetMode.NEXT_STEP


@every
def test_seeds(name):
    "s means s + i, a list is taken as it is; without a seed, the environment's own seeds say how to do it again."
    env = EnvBatch(EnvConfig(name, 3, 5, seed=4))
    actions = some_actions(env, 5)
    for seed, seeds in ((7, (7, 8, 9)), ([4, 2**40, 1], (4, 2**40, 1))):
        first, second = (play_actions(env, actions, s) for s in (seed, list(seeds)))
        assert env.np_random_seed == seeds == env.get_attr('np_random_seed') and all(type(s) is int for s in env.np_random_seed)
        assert_same(first, second)
    fresh, again = EnvBatch(env.config), EnvBatch(env.config)
    unseeded = play_actions(fresh, actions)
    assert_same(unseeded, play_actions(again, actions, list(fresh.np_random_seed)))
    assert_same(unseeded, play_actions(EnvBatch(env.config), actions))
    env.reset(seed=[None, 3, None], options={'reset_mask': np.array([False, True, False])})
    assert env.np_random_seed == (4, 3, 1)
    single = gym.make(name, seed=1)
    single.reset(seed=5)
    assert single.np_random_seed == 5


@every
def test_call_get_attr_and_set_attr(name):
    env = gym.make_vec(name, 3, time_limit=5)
    env.reset(seed=1)
    assert env.get_attr('action_space') == (env.single_action_space,) * 3 and env.get_attr('elapsed_steps') == (0, 0, 0)
    assert env.call('sample_tasks', 1)[0][0].keys() == env.get_attr('task')[0].keys() and env.get_attr('spec') == (env.spec,) * 3
    for a, b in zip(env.get_attr('task'), env.get_tasks(), strict=True): assert same_task(a, b)
    for a, b in zip(env.call('get_task'), env.get_attr('get_task'), strict=True): assert same_task(a, b)
    new = env.sample_tasks(3, step=9)
    for values, wanted in ((new, new), (new[1], [new[1]] * 3)):
        env.set_attr('task', values)
        for a, b in zip(env.get_attr('task'), wanted, strict=True): assert same_task(a, b)
    env.call('set_task', new[0])
    assert all(same_task(task, new[0]) for task in env.get_tasks())
    with pytest.raises(RuntimeError, match='have a new task'): env.step(env.action_space.sample())
    env.reset()
    with pytest.raises(ValueError, match='2 tasks for 3 environments'): env.set_attr('task', new[:2])
    for get in (env.get_attr, env.call):
        with pytest.raises(AttributeError, match='nowhere'): get('nowhere')
    env.close()


def test_unknown_attributes_are_refused_with_those_that_there_are():
    env = EnvBatch(EnvConfig(num_envs=2))
    assert env.get_attr('state') == (None, None)
    with pytest.raises(AttributeError, match="'speed' is unknown; an environment of EnvBatch has action_space, .*state, task"): env.call('speed')
    with pytest.raises(AttributeError, match="'state' cannot be set; .* only 'task' can"): env.set_attr('state', 0)
    with pytest.raises(AttributeError, match="'__init__' is unknown"): env.call('__init__')
    env.reset()
    env.get_attr('state')[0][:] = 9  # a copy
    assert not env.state.any() and set(BatchMember.names()) >= {'task', 'state', 'render', 'spec', 'np_random_seed', 'elapsed_steps'}


@every
def test_what_is_closed_stays_closed(name):
    env, single = EnvBatch(EnvConfig(name, 2)), TaskEnv(EnvConfig(name))
    env.reset()
    action = env.action_space.sample()
    env.close(), env.close(), single.close()
    assert env.closed
    for call in (env.reset, lambda: env.step(action), env.render, lambda: env.call('task'), lambda: env.get_attr('task'), lambda: env.set_attr('task', []), single.reset):
        for kind in (RuntimeError, gym.error.ClosedEnvironmentError):
            with pytest.raises(kind, match='is closed; make a new one'): call()


@every
def test_a_spec_is_text_and_makes_the_same_again(name):
    single, vector, loop = gym.make(name, time_limit=7, seed=3), gym.make_vec(name, 2, time_limit=7, seed=3), gym.make_vec(name, 2, vectorization_mode='sync', time_limit=7)
    for env in (single, vector, loop):
        spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
        assert spec.id == name and spec.kwargs['env_name'] == name and spec.kwargs['time_limit'] == 7
        twin = gym.make(spec) if env is single else gym.make_vec(spec)
        assert type(twin.unwrapped) is type(env.unwrapped) and twin.action_space == env.action_space
        if env is not loop: assert_same([env.reset()[0]], [twin.reset()[0]])
        env.close(), twin.close()
    json.loads(gym.spec(name).to_json())


@every
def test_an_unknown_option_is_an_error_of_both_kinds(name):
    "So that tools which try arguments out take it for a no, with the text that they look for."
    makers = [lambda **o: gym.make(name, **o), lambda **o: gym.make_vec(name, 2, **o), lambda **o: EnvConfig(name, options=o)]
    for make in makers:
        for kind in (TypeError, ValueError, UnknownOption):
            with pytest.raises(kind, match=f"unexpected keyword argument 'frameskip'; options of '{name}' are "): make(frameskip=4)
    for make in makers[:2]:
        make(render_mode=None).close()
        for kind in (TypeError, ValueError):
            with warnings.catch_warnings(), pytest.raises(kind, match="render_mode='ansi'"):
                warnings.simplefilter('ignore')
                make(render_mode='ansi')
    if not EnvConfig(name).family.render_fps:
        for make in makers[:2]:
            with pytest.raises(UnknownOption, match="render_mode='rgb_array': .* draws no pictures"): make(render_mode='rgb_array')


WRONG_OPTIONS = {int: ['x', 2.5, True, None, [2]], float: ['x', True, None, [1.]], bool: ['x', 1, 0., None], str: [1, 2.5, True]}


@pytest.mark.parametrize('name', [*FAMILIES])
def test_an_option_of_the_wrong_type_is_refused_in_one_line(name):
    "Every option of every family, before the family sees it, and from all who make environments."
    for option in inspect.signature(family_class(name)).parameters.values():
        for value in WRONG_OPTIONS[option.annotation]:
            for make in (lambda **o: EnvConfig(name, options=o), lambda **o: gym.make(name, **o), lambda **o: gym.make_vec(name, 2, **o)):
                with pytest.raises(ValueError) as caught: make(**{option.name: value})
                assert str(caught.value) == f'{option.name}={value!r} is not of type {option.annotation.__name__}, as this option of {name!r} must be'


def test_what_an_option_may_be_when_its_declaration_is_wider():
    @register_family('EnvsTestWide-v0')
    class Wide(PointNavigation):
        def __init__(self, size: float | None = 1., sizes: tuple = (), seen: int = None, free=0, **more): super().__init__()

    def make(**options): return EnvConfig('EnvsTestWide-v0', options=options).family
    for fine in (dict(size=2), dict(size=None), dict(size=.5), dict(sizes=[1]), dict(seen=None), dict(seen=3), dict(free='x'), dict(other='x')): make(**fine)
    for wrong, message in ((dict(size='x'), "size='x' is not of type float or NoneType, as"), (dict(seen=.5), 'seen=0.5 is not of type int, as')):
        with pytest.raises(ValueError, match=message): make(**wrong)
    unregister_family('EnvsTestWide-v0')


def test_an_error_from_inside_a_family_is_not_taken_for_an_option():
    @register_family('EnvsTestInside-v0')
    class Inside(PointNavigation):
        def __init__(self, size=2): self.size = len(size)

    with pytest.raises(TypeError, match='has no len') as caught: EnvConfig('EnvsTestInside-v0')
    assert not isinstance(caught.value, UnknownOption)
    unregister_family('EnvsTestInside-v0')


def test_numpy_numbers_in_a_config_become_pythons():
    config = EnvConfig('MetaBandit-v0', np.int64(2), np.int32(30), np.uint8(1), {'arms': np.int64(3), 'dependent': np.bool_(False)}, np.int16(2))
    assert config == EnvConfig('MetaBandit-v0', 2, 30, 1, {'arms': 3, 'dependent': False}, 2) and json.loads(json.dumps(asdict(config))) == asdict(config)
    assert type(EnvConfig(options={'rotation': np.float64(1)}).options['rotation']) is float
    for options in ({'rotation': np.ones(2)}, {'rotation': object()}, {'rotation': [np.ones(2)]}):
        with pytest.raises(ValueError, match=r"options\['rotation'\].* is of type .*; a config holds numbers"): EnvConfig(options=options)
    for name in ('num_envs', 'time_limit', 'episodes_per_trial', 'seed'):
        with pytest.raises(ValueError, match=f'{name}=True is not'): EnvConfig(**{name: True})


# Who makes an environment without a seed gets another one each time; the seed of `reset` decides all, the task too.

MAKERS = [lambda name, **o: gym.make(name, **o), lambda name, **o: gym.make_vec(name, 3, **o), lambda name, **o: gym.make_vec(name, 3, vectorization_mode='sync', **o)]
KINDS = pytest.mark.parametrize('make', MAKERS, ids=['single', 'vector', 'sync'])


def tasks_of(env): return env.get_attr('task') if isinstance(env.unwrapped, VectorEnv) else (env.unwrapped.get_task(),)


def goals_of(env): return [tuple(task['goal'].tolist()) for task in tasks_of(env)]


@KINDS
def test_without_a_seed_each_copy_has_another_task_and_start(make):
    envs = [make('MetaGymToy-v0') for _ in range(3)]
    for env in envs: env.reset()
    goals = [goal for env in envs for goal in goals_of(env)]
    assert len(set(goals)) == len(goals) and all(checksum_split({'goal': goal}) == 'train' for goal in goals)
    starts = [make('EnvsTestWalk-v0').reset()[0] for _ in range(3)]
    assert len({x.tobytes() for x in starts}) == 3
    for env in envs: before = goals_of(env), env.reset(), goals_of(env); assert before[0] == before[2]  # a reset alone keeps the task


@KINDS
def test_the_seed_of_reset_decides_task_and_start(make):
    one, two = make('EnvsTestWalk-v0'), make('EnvsTestWalk-v0')
    for seed in (3, 11, 3):
        assert_same([one.reset(seed=seed)[0]], [two.reset(seed=seed)[0]])
        assert goals_of(one) == goals_of(two) == [tuple(sample_tasks(EnvConfig('EnvsTestWalk-v0', seed=seed + i), 1)[0]['goal'].tolist()) for i in range(len(goals_of(one)))]
    one.reset(seed=4)
    assert goals_of(one) != goals_of(two)


@KINDS
def test_with_a_seed_made_is_made_again(make):
    one, two = (make('EnvsTestWalk-v0', seed=3) for _ in range(2))
    assert_same([one.reset()[0]], [two.reset()[0]])
    before = goals_of(one)
    one.reset(seed=9)
    assert goals_of(one) == goals_of(two) == before  # the seed of make decides the task


@KINDS
@pytest.mark.parametrize('seed', [None, 3])
def test_a_new_task_for_each_episode(make, seed):
    env = make('MetaGymToy-v0', time_limit=2, new_task_on_reset=True, seed=seed)
    seen = []
    for s in (5, None, None, 5, None):
        env.reset(seed=s)
        seen.append(goals_of(env))
    assert seen[0] == seen[3] and seen[1] == seen[4] and len({goal for goals in seen[:3] for goal in goals}) == 3 * len(seen[0])
    assert seen[1][0] == tuple(sample_tasks(EnvConfig(seed=5), 2)[1]['goal'].tolist())  # the second training task of that seed


@every
@every_mode
def test_a_new_task_after_each_end(name, mode):
    "Also by autoreset, with the rewards of that task: as if each environment were alone, and reset by hand."
    batch = gym.make_vec(name, 2, time_limit=3, new_task_on_reset=True, autoreset_mode=mode)
    loop = gym.make_vec(name, 2, vectorization_mode='sync', vector_kwargs={'autoreset_mode': mode}, time_limit=3, new_task_on_reset=True)
    first = batch.reset(seed=2)[0]
    np.testing.assert_allclose(first, loop.reset(seed=2)[0], 1e-5, 1e-5)
    before = batch.get_tasks()
    for action in some_actions(batch, 8):
        (*got, _), (*wanted, _) = batch.step(action), loop.step(action)
        for x, y in zip(got, wanted, strict=True): np.testing.assert_allclose(x, y, 1e-5, 1e-5)
        over = got[2] | got[3]
        if mode == AutoresetMode.DISABLED and over.any():
            for env in (batch, loop): env.reset(options={'reset_mask': over.copy()})
        for a, b in zip(batch.get_tasks(), loop.get_attr('task'), strict=True): assert same_task(a, b)
    if name != 'MetaHalfCheetahDir-v0': assert not same_task(before[0], batch.get_tasks()[0])  # that one has two tasks in all
    batch.close(), loop.close()


def test_a_task_that_was_set_stays():
    task = {'goal': np.float32([.1, .2])}
    env = gym.make('MetaGymToy-v0')
    env.reset(seed=0)
    env.unwrapped.set_task(task)
    for seed in (None, 1, None): env.reset(seed=seed); assert same_task(env.unwrapped.get_task(), task)
    env = gym.make('MetaGymToy-v0', new_task_on_reset=True)  # for one episode
    env.reset(seed=0, options={'task': task})
    assert same_task(env.unwrapped.get_task(), task)
    env.reset()
    assert same_task(env.unwrapped.get_task(), sample_tasks(EnvConfig(seed=0), 2)[1])
    with pytest.raises(ValueError, match='tasks are given, so no environment draws its own'): EnvBatch(EnvConfig(num_envs=1), [task], new_task_on_reset=True)


def test_a_batch_of_a_config_stays_reproducible():
    one, two = (EnvBatch(EnvConfig('EnvsTestWalk-v0', 3)) for _ in range(2))
    assert_same([one.reset()[0], *[t['goal'] for t in one.get_tasks()]], [two.reset()[0], *[t['goal'] for t in two.get_tasks()]])


def run_python(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_registers_and_imports_nothing_heavy():
    assert run_python("import ssm_metarl, sys, gymnasium as gym; print('MetaCartPole-v0' in gym.registry, 'torch' in sys.modules, 'ssm_metarl.control' in sys.modules)") == ['True', 'False', 'False']
    assert run_python("import gymnasium as gym, sys; env = gym.make('ssm_metarl:MetaCartPole-v0'); env.reset(); print('torch' in sys.modules)") == ['False']
    assert run_python("import gymnasium as gym; print(gym.make_vec('ssm_metarl:MetaBandit-v0', 2).num_envs)") == ['2']


# Pictures.

DRAWN = ['MetaGymToy-v0', 'MetaCartPole-v0', 'MetaPendulum-v0']


@pytest.mark.parametrize('name', DRAWN)
def test_pictures(name):
    env = gym.make_vec(name, 3, render_mode='rgb_array', time_limit=20)
    single = gym.make(name, render_mode='rgb_array')
    assert env.metadata['render_modes'] == ['rgb_array'] and env.metadata['render_fps'] > 0 and env.render_mode == single.render_mode == 'rgb_array'
    with pytest.raises(ResetNeeded, match='nothing to show yet'): env.render()
    env.reset(seed=1), single.reset(seed=1)
    for action in some_actions(env, 4):
        before = env.state
        frames = env.render()
        assert len(frames) == 3 and all(f.dtype == np.uint8 and f.shape == frames[0].shape and f.shape[2] == 3 for f in frames)
        assert env.state is before and f'{frames[0].shape}' == f'{single.render().shape}'
        np.testing.assert_array_equal(frames[0], single.render())
        assert_same(frames, env.call('render'))
        assert not np.array_equal(frames[0], frames[1])  # another task or start, to be seen
        env.step(action), single.step(action[0])
    quiet = EnvBatch(EnvConfig(name, 2))
    quiet.reset()
    with pytest.warns(UserWarning, match='no render mode'): assert quiet.render() is None


class Defect(VectorEnv):
    "A sound batch with one defect, by name."
    def __init__(self, n, kind):
        mode = AutoresetMode.SAME_STEP if kind == 'final' else AutoresetMode.DISABLED
        self.env, self.kind = EnvBatch(EnvConfig('EnvsTestWalk-v0', n, 5), autoreset_mode=mode, freeze=kind in ('none', 'endless')), kind
        for name in ('num_envs', 'observation_space', 'single_observation_space', 'action_space', 'single_action_space', 'metadata'): setattr(self, name, getattr(self.env, name))
        self.obs, self.final = np.zeros((n, 2), np.float32), None

    def reset(self, *, seed=None, options=None):
        if self.kind == 'all': options = None
        if self.kind == 'none' and options: return self._out(self.obs), {}
        if self.kind == 'unseeded': seed = None
        if self.kind == 'seedless' and seed is not None: seed = 0
        obs, info = self.env.reset(seed=seed, options=options)
        if self.kind == 'list' and isinstance(seed, list): obs = obs + 1
        return self._out(obs), info

    def step(self, actions):
        obs, reward, terminated, truncated, info = self.env.step(actions)
        if self.kind == 'rows': reward = reward - reward.mean()
        if self.kind == 'reward': reward = reward[:, None]
        if self.kind == 'nan': reward = reward * np.nan
        if self.kind == 'dtype': obs = obs.astype(float)
        if self.kind == 'flags': terminated = terminated.astype(int)
        if self.kind == 'endless': terminated, truncated = np.zeros_like(terminated), np.zeros_like(truncated)
        if self.kind == 'final' and info:
            if self.final is None: self.final = info['final_obs']
            self.final[:] = info['final_obs']
            info = info | {'final_obs': self.final}
        return self._out(obs), reward, terminated, truncated, info

    def _out(self, obs):
        if self.kind == 'shared':  # what a caller writes into the last array moves the environments
            obs = obs + (0 if self.final is None else self.obs - self.final)
            self.obs, self.final = obs, obs.copy()
            return obs
        if self.kind == 'none': self.obs = obs
        if self.kind != 'reused': return obs
        self.obs += obs - self.obs  # the same array each time
        return self.obs


@pytest.mark.parametrize('kind, message', [
    ('all', 'when only another one is reset'), ('none', 'a reset starts no new episode'), ('unseeded', 'when the same seed is used again'), ('seedless', 'the seed is not used'),
    ('list', 'when seeds are given as a list'), ('rows', 'when there are 1 environments instead of 3'), ('reward', 'rewards are array'), ('nan', r'rewards of environments \[0, 1, 2\] are not finite'),
    ('dtype', 'observations of shape .* and dtype float64 are not in'), ('flags', 'terminated are array'), ('endless', 'no episode ended in 60 steps'), ('reused', 'overwritten later'), ('final', 'overwritten later'), ('shared', 'when the returned arrays are overwritten')])
def test_the_checker_finds_each_defect(kind, message):
    with pytest.raises(ValueError, match=message): check_vector_env(lambda n: Defect(n, kind))


def test_the_checker_accepts_what_is_sound_and_closes_it():
    made = []
    check_vector_env(lambda n: made.append(Defect(n, None)) or made[-1])
    assert len(made) > 3 and all(env.closed for env in made)


def test_what_the_checker_cannot_judge():
    with pytest.raises(ValueError, match='steps=3 is too few'): check_vector_env(lambda n: Defect(n, None), steps=3)
    blackjack = lambda n: gym.make_vec('Blackjack-v1', num_envs=n, vectorization_mode='sync', vector_kwargs={'autoreset_mode': AutoresetMode.SAME_STEP})
    with pytest.raises(ValueError, match='must be single arrays'): check_vector_env(blackjack)
    def nameless(n):
        env = Defect(n, None)
        env.metadata = {}
        return env
    with pytest.raises(ValueError, match="metadata has no 'autoreset_mode'"): check_vector_env(nameless)


# Mistakes.

@pytest.mark.parametrize('change, message', [
    (dict(env_name='MetaGym'), "env_name='MetaGym' is not one of 'MetaGymToy-v0'"), (dict(num_envs=0), 'num_envs=0 is not a positive integer'),
    (dict(time_limit=-1), 'time_limit=-1 is not a positive integer'), (dict(num_envs=2.), 'num_envs=2.0 is not a positive integer'), (dict(seed=-1), 'seed=-1 is not an integer >= 0')])
def test_config_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message): EnvConfig(**change)


@pytest.mark.parametrize('name, actions, message', [
    ('MetaGymToy-v0', np.zeros((2, 2)), r'shape \(2, 2\); expected \(3, 2\)'), ('MetaGymToy-v0', [[0, 0], [0, np.inf], [np.nan, 0]], r'environments \[1, 2\] are not finite'),
    ('EnvsTestLever-v0', [1, 2, 0], r'environments \[2\] are not integers from 1 to 2'), ('EnvsTestLever-v0', [1., 2., np.nan], r'environments \[0, 1, 2\] are not integers')])
def test_actions_are_checked_before_anything_changes(name, actions, message):
    env = EnvBatch(EnvConfig(name, 3))
    env.reset()
    before = env.state
    with pytest.raises(ValueError, match=message): env.step(actions)
    assert env.state is before and not env.t.any()


@pytest.mark.parametrize('tasks, message', [
    ([{'goal': [0, 0]}], '1 tasks for 2 environments'), ([{'goal': [0, 0]}, {}], 'task 1 is {}; a task of'), ([{'goal': [0, 0, 0]}] * 2, 'task 0 is'),
    ([{'goal': [0, 0]}, {'goal': [0, np.inf]}], 'task 1 is'), ([[0, 0], [0, 0]], r"task 0 is \[0, 0\]; .* shapes {'goal': \(2,\)}")])
def test_bad_tasks_leave_the_old_ones(tasks, message):
    env = EnvBatch(EnvConfig(num_envs=2))
    env.reset()
    before = env.get_tasks()
    with pytest.raises(ValueError, match=message): env.set_tasks(tasks)
    assert_same([t['goal'] for t in env.get_tasks()], [t['goal'] for t in before])
    env.step(np.zeros((2, 2)))  # the episode goes on


def test_calls_in_the_wrong_order():
    env, actions = EnvBatch(EnvConfig(num_envs=2)), np.zeros((2, 2))
    with pytest.raises(RuntimeError, match='call reset'): env.step(actions)
    with pytest.raises(ValueError, match=r'environments \[1\] have no episode yet'): env.reset(options={'reset_mask': [True, False]})
    for mask in ([True], [1, 1], np.ones((2, 1), bool)):
        with pytest.raises(ValueError, match='reset_mask is'): env.reset(options={'reset_mask': mask})
    with pytest.raises(ValueError, match="'mask' is unknown"): env.reset(options={'mask': np.ones(2, bool)})
    for seed in (-1, [1, 2, 3], [0, -5], 1.5, 2**64, [1.5, 2]):
        with pytest.raises(ValueError, match='does not fit 2 environments'): env.reset(seed=seed)
    env.reset()
    env.set_tasks(env.sample_tasks(2))
    with pytest.raises(RuntimeError, match='also after set_tasks'): env.step(actions)
    env.close()
    env.close()
    for call in (lambda: env.step(actions), env.reset):
        with pytest.raises(RuntimeError, match='closed'): call()


def test_a_config_can_be_sent_to_another_process():
    config = EnvConfig(num_envs=3, seed=5)
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_largest_count_is_that_of_all_configs():
    from ssm_metarl.files import COUNT_LIMIT
    assert EnvConfig(time_limit=COUNT_LIMIT - 1).time_limit == COUNT_LIMIT - 1
    with pytest.raises(ValueError, match='is not a positive integer'): EnvConfig(time_limit=COUNT_LIMIT)
