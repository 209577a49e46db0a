"Properties of `envs` that hold for any number of environments, seed, task and order of events."
import copy
import json
import pickle
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssm_metarl.env_checks import check_family, check_vector_env, play_on
from ssm_metarl.envs import (FAMILIES, SPLITS, EnvBatch, EnvConfig, Family, Luck, PointNavigation, TaskDistribution, TaskEnv, checksum_split, play_actions, register_family,
                             sample_tasks, splitmix64, stack_tasks, stream, uniform_numbers, unregister_family, unstack_tasks)

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
            assert all(x is None for x in info['final_obs'][~over])
            assert_same([*info['final_obs'][over], info['_final_obs']], [*last[over], over])
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
        if self.kind == 'none': self.obs = obs
        if self.kind != 'reused': return obs
        self.obs += obs - self.obs  # the same array each time
        return self.obs


@pytest.mark.parametrize('kind, message', [
    ('all', 'when only another one is reset'), ('none', 'a reset starts no new episode'), ('unseeded', 'when the same seed is used again'), ('seedless', 'the seed is not used'),
    ('list', 'when seeds are given as a list'), ('rows', 'when there are 1 environments instead of 3'), ('reward', 'rewards are array'), ('nan', r'rewards of environments \[0, 1, 2\] are not finite'),
    ('dtype', 'observations of shape .* and dtype float64 are not in'), ('flags', 'terminated are array'), ('endless', 'no episode ended in 60 steps'), ('reused', 'overwritten'), ('final', 'overwritten')])
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
