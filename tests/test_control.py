"Properties of `control` that hold for any task, state and batch: symmetries of mechanics, Gymnasium's own environments, independence of rows and sensors."
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import product

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssm_metarl.control import CartPole, Pendulum
from ssm_metarl.env_checks import check_family
from ssm_metarl.batch import EnvBatch, TaskEnv, play_actions, stream
from ssm_metarl.envs import SPLITS, EnvConfig, sample_tasks

few = settings(max_examples=20, deadline=None, derandomize=True)

NAMES = ['MetaCartPole-v0', 'MetaPendulum-v0']
SENSORS = [{}, {'sensor_bias': .3}, {'sensor_noise': .2}, {'sensor_bias': .3, 'sensor_noise': .2}]
names, sensors, seeds = st.sampled_from(NAMES), st.sampled_from(SENSORS), st.integers(0, 2**31)
MOTOR = {'MetaCartPole-v0': 'force', 'MetaPendulum-v0': 'gain'}


def random_actions(name, shape, seed):
    rng = stream(seed, 'test')
    return rng.integers(0, 2, shape) if name == 'MetaCartPole-v0' else rng.uniform(-2.5, 2.5, (*shape, 1)).astype(np.float32)


def random_states(name, N, seed):
    return stream(seed, 'state').uniform(-1, 1, (N, 4 if name == 'MetaCartPole-v0' else 2)) * ([2, 2, .2, 2] if name == 'MetaCartPole-v0' else [3, 6])


def exact(name):
    "The family, computing in double precision."
    family = EnvConfig(name).family
    family.dt = {'MetaCartPole-v0': .02, 'MetaPendulum-v0': .05}[name]
    return family


def exact_tasks(name, N, seed, **change):
    tasks = sample_tasks(EnvConfig(name, seed=seed), N)
    return {k: np.array([task[k] for task in tasks], float) * change.get(k, 1) for k in tasks[0]}


def step(family, state, action, tasks): return family.step(state, action, family.prepare(tasks), None)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True): np.testing.assert_array_equal(x, y, strict=True)


# Mechanics

@few
@given(names, seeds)
def test_the_mirror_image_of_a_motion_is_a_motion(name, seed):
    "States and actions with their signs turned lead to states with their signs turned, for the same reward."
    state, action, tasks, family = random_states(name, 50, seed), random_actions(name, (50,), seed), exact_tasks(name, 50, seed), exact(name)
    after, reward, over = step(family, state, action, tasks)
    mirrored = step(family, -state, 1 - action if name == 'MetaCartPole-v0' else -action, tasks)
    np.testing.assert_allclose(mirrored[0], -after, 1e-9, 1e-9)
    np.testing.assert_allclose(mirrored[1], reward)
    np.testing.assert_array_equal(mirrored[2], over)


@few
@given(names, seeds)
def test_a_reversed_motor_does_the_opposite(name, seed):
    state, action, family = random_states(name, 50, seed), random_actions(name, (50,), seed), exact(name)
    one = step(family, state, action, exact_tasks(name, 50, seed))
    other = step(family, state, 1 - action if name == 'MetaCartPole-v0' else -action, exact_tasks(name, 50, seed, **{MOTOR[name]: -1}))
    for x, y in zip(one, other): np.testing.assert_allclose(x, y, 1e-9, 1e-9)


@few
@given(names, seeds, st.floats(.1, 10))
def test_units_of_mass_do_not_matter(name, seed, unit):
    "Masses, forces and friction all contain one unit of mass; a motion has none."
    state, action, family = random_states(name, 50, seed), random_actions(name, (50,), seed), exact(name)
    scaled = dict.fromkeys(('cart_mass', 'pole_mass', 'mass', 'force', 'gain', 'friction'), unit)
    for x, y in zip(step(family, state, action, exact_tasks(name, 50, seed)), step(family, state, action, exact_tasks(name, 50, seed, **scaled))): np.testing.assert_allclose(x, y, 1e-9, 1e-9)


@few
@given(seeds, st.floats(.1, 10))
def test_units_of_length_do_not_matter(seed, unit):
    "Of the cart-pole: x, v, the length, gravity and the force."
    state, action, family = random_states('MetaCartPole-v0', 50, seed), random_actions('MetaCartPole-v0', (50,), seed), exact('MetaCartPole-v0')
    scale = np.array([unit, unit, 1, 1])
    one, *_ = step(family, state, action, exact_tasks('MetaCartPole-v0', 50, seed))
    other, *_ = step(family, state * scale, action, exact_tasks('MetaCartPole-v0', 50, seed, length=unit, gravity=unit, force=unit))
    np.testing.assert_allclose(other, one * scale, 1e-9, 1e-9)


# Gymnasium

def as_gymnasium(name, task):
    if name == 'MetaCartPole-v0':
        env = gym.make('CartPole-v1').unwrapped
        env.gravity, env.masscart, env.masspole, env.length, env.force_mag = (float(task[k]) for k in ('gravity', 'cart_mass', 'pole_mass', 'length', 'force'))
        env.total_mass, env.polemass_length = env.masscart + env.masspole, env.masspole * env.length
    else:
        env = gym.make('Pendulum-v1').unwrapped
        env.g, env.m, env.l = float(task['gravity']), float(task['mass']) / float(task['gain']), float(task['length'])
    env.reset()
    return env


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('usual', [True, False])
def test_lock_step_with_gymnasium(name, usual):
    "Through the batch, each step from Gymnasium's state, random episodes: 1e-5."
    config = EnvConfig(name, num_envs=20, time_limit=500)
    default = config.family.default_task()
    tasks = [default if usual else task | {'friction': np.float32(0)} for task in sample_tasks(config, 20)]
    ours, theirs = EnvBatch(config, tasks, freeze=True), [as_gymnasium(name, task) for task in tasks]
    ours.reset()
    for env, state in zip(theirs, ours.state): env.state = state.astype(float)
    alive = np.ones(20, bool)
    for action in random_actions(name, (200, 20), 0):
        obs, reward, terminated, *_ = ours.step(action)
        for i in np.flatnonzero(alive):
            seen, paid, over, *_ = theirs[i].step(action[i])
            np.testing.assert_allclose(obs[i], seen, 1e-5, 1e-5)
            np.testing.assert_allclose(reward[i], paid, 1e-5, 1e-5)
            assert terminated[i] == over
            alive[i] = not over
        state = np.array([env.state for env in theirs])
        if name == 'MetaPendulum-v0': state[:, 0] = np.remainder(state[:, 0] + np.pi, 2 * np.pi) - np.pi
        ours.state = np.where(alive[:, None], state, ours.state).astype(np.float32)
        if not alive.any(): break


def test_whole_cartpole_episodes_with_gymnasium():
    "Without coming together again: rounding grows, up to 1e-4, and the ends are the same."
    N, config = 200, EnvConfig('MetaCartPole-v0', num_envs=200, time_limit=500)
    task, actions = config.family.default_task(), random_actions('MetaCartPole-v0', (200, 200), 1)
    ours = EnvBatch(config, [task] * N)
    ours.reset()
    starts = np.array(ours.state)
    obs, _, terminated, _ = play_actions(EnvBatch(config, [task] * N, freeze=True), actions)
    env = as_gymnasium('MetaCartPole-v0', task)
    for i in range(N):
        env.reset()
        env.state = starts[i].astype(float)
        for t, action in enumerate(actions[:, i]):
            seen, _, over, *_ = env.step(action)
            np.testing.assert_allclose(obs[t + 1, i], seen, 1e-4, 1e-4)
            assert terminated[t, i] == over
            if over: break


def test_friction_slows_down():
    "Per step: of a free pendulum at the bottom by 3c/(ml^2) dt, of a free cart below an upright pole by c/(M - 3/4 m) dt, and more friction does more."
    base = {k: np.full(3, v, float) for k, v in Pendulum().default_task().items()} | {'friction': np.array([0, .1, .2])}
    after, *_ = step(exact('MetaPendulum-v0'), np.tile([np.pi, 1.], (3, 1)), np.zeros((3, 1)), base)
    np.testing.assert_allclose(after[:, 1], 1 - .05 * 3 * base['friction'], 1e-6)
    base = {k: np.full(3, v, float) for k, v in CartPole().default_task().items()} | {'friction': np.array([0, .1, .2]), 'force': np.zeros(3)}
    after, *_ = step(exact('MetaCartPole-v0'), np.tile([0, 1., 0, 0], (3, 1)), np.zeros(3, int), base)
    np.testing.assert_allclose(after[:, 1], 1 - .02 * base['friction'] / (1.1 - .75 * .1), 1e-6)


# The batch

@few
@given(names, sensors, st.integers(1, 40), seeds, st.data())
def test_rows_do_not_depend_on_the_batch(name, options, N, seed, data):
    "Bit for bit, whatever the size of the batch."
    rows = data.draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True))
    config = EnvConfig(name, N, time_limit=15, options=options)
    tasks, actions, keys = sample_tasks(config, N), random_actions(name, (20, N), seed), [seed + 7 * i for i in range(N)]
    together = play_actions(EnvBatch(config, tasks, freeze=True), actions, keys)
    some = play_actions(EnvBatch(replace(config, num_envs=len(rows)), [tasks[i] for i in rows], freeze=True), actions[:, rows], [keys[i] for i in rows])
    assert_same([x[:, rows] for x in together], some)


@few
@given(names, sensors, st.integers(1, 6), seeds)
def test_gymnasiums_loop_over_single_environments_is_the_same(name, options, N, seed):
    config = EnvConfig(name, N, time_limit=12, options=options)
    tasks = sample_tasks(config, N)
    ours, theirs = EnvBatch(config, tasks, AutoresetMode.SAME_STEP), SyncVectorEnv([lambda task=task: TaskEnv(config, task) for task in tasks], autoreset_mode=AutoresetMode.SAME_STEP)
    assert_same([ours.reset(seed=seed)[0]], [theirs.reset(seed=seed)[0]])
    for action in random_actions(name, (30, N), seed):
        for x, y in zip(ours.step(action)[:4], theirs.step(action)[:4]): np.testing.assert_array_equal(x, y)


@few
@given(names, st.sampled_from(SENSORS[1:]), seeds)
def test_sensors_change_what_is_seen_and_nothing_else(name, options, seed):
    config = EnvConfig(name, 5, time_limit=30)
    poor, actions = replace(config, options=options), random_actions(name, (30, 5), seed)
    tasks = sample_tasks(poor, 5)
    clear = play_actions(EnvBatch(config, [{k: v for k, v in task.items() if k != 'bias'} for task in tasks], freeze=True), actions, seed)
    blurred = play_actions(EnvBatch(poor, tasks, freeze=True), actions, seed)
    assert_same(clear[1:], blurred[1:])
    assert (clear[0] != blurred[0]).mean() > .9


@pytest.mark.parametrize('mode', list(AutoresetMode))
@pytest.mark.parametrize('name', NAMES)
def test_each_variable_stays_in_one_piece_of_memory(name, mode):
    "Otherwise all is right, and slow."
    env = EnvBatch(EnvConfig(name, 30, time_limit=10), autoreset_mode=mode, freeze=mode == AutoresetMode.DISABLED)
    env.reset()
    for action in random_actions(name, (25, 30), 0):
        assert env.state.T.flags.c_contiguous and env.state.dtype == np.float32
        env.step(action)


@pytest.mark.parametrize('options', SENSORS)
@pytest.mark.parametrize('name', NAMES)
def test_gymnasium_knows_it(name, options):
    assert type(gym.make_vec(name, num_envs=3, **options)) is EnvBatch
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for intended in ('.*observation space (min|max)imum value is -?infinity', '.*symmetric and normalized space'): warnings.filterwarnings('ignore', intended)
        check_env(gym.make(name, **options).unwrapped)


@pytest.mark.parametrize('name', NAMES)
def test_check_family(name): check_family(name, num_envs=10, steps=50)


def test_the_module_is_found_by_the_name_of_the_family():
    code = "from ssm_metarl.envs import EnvConfig; print(*(type(EnvConfig(n).family).__name__ for n in ('MetaCartPole-v0', 'MetaPendulum-v0')))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() == ['CartPole', 'Pendulum']


# Tasks

@few
@given(names, sensors, st.booleans(), st.integers(0, 10**6))
def test_splits(name, options, reversible, seed):
    config = EnvConfig(name, seed=seed, options=options | {'reversible': reversible})
    for split in SPLITS: assert {config.tasks.split_of(task) for task in sample_tasks(config, 5, split)} == {split}
    for split in config.family.ood_splits: assert {config.tasks.split_of(task) for task in sample_tasks(config, 5, split)} == {'out of distribution'}
    assert config.family.in_distribution(config.family.default_task())
    EnvBatch(replace(config, num_envs=1), [config.family.default_task()])  # it is a task, with all fields


@pytest.mark.parametrize('name', NAMES)
def test_half_of_the_motors_are_reversed_if_any_may_be(name):
    config, motor = EnvConfig(name), MOTOR[name]
    for split in ('train', 'held_out', *config.family.ood_splits):
        share = np.mean([task[motor] < 0 for task in sample_tasks(config, 400, split)])
        assert abs(share - .5) < 4 * .5 / 400**.5
    assert all(task[motor] > 0 for task in sample_tasks(EnvConfig(name, options={'reversible': False}), 100))


@pytest.mark.parametrize('bad', [{'sensor_bias': -1}, {'sensor_bias': 1e308}, {'sensor_noise': float('nan')}, {'sensor_noise': 1e39}])
@pytest.mark.parametrize('name', NAMES)
def test_impossible_sensors(name, bad):
    with pytest.raises(ValueError, match=f'{next(iter(bad))}=.* is not a number from 0 to 1000'): EnvConfig(name, options=bad)
    with pytest.raises(ValueError, match="'wind'.*reversible, sensor_bias, sensor_noise"): EnvConfig(name, options={'wind': 1})
    with pytest.raises(ValueError, match="reversible='False' is not of type bool"): EnvConfig(name, options={'reversible': 'False'})


@pytest.mark.parametrize('name, options', [(name, options) for name in NAMES for options in SENSORS])
def test_starts_and_errors_have_their_distributions(name, options):
    "Starts are even: within 0.05 of zero; or any angle and velocities up to 1. A bias is even up to 0.3, and the same in all steps; noise has a standard deviation of 0.2."
    env = EnvBatch(EnvConfig(name, 2000, options=options))
    bounds = {'MetaCartPole-v0': [.05] * 4, 'MetaPendulum-v0': [np.pi, 1]}[name]
    obs, _ = env.reset()
    for k, bound in enumerate(bounds):
        assert stats.kstest(env.state[:, k], 'uniform', (-bound, 2 * bound)).pvalue > 1e-4
        assert .99 * bound < np.abs(env.state[:, k]).max() <= bound
    for _ in range(2):
        error = obs - env.family.look(env.state.T).T - env.tasks.get('bias', 0)
        if 'sensor_noise' in options: assert all(stats.kstest(column, 'norm', (0, .2)).pvalue > 1e-4 for column in error.T)
        else: assert np.abs(error).max() < 1e-6
        obs, *_ = env.step(env.family.nothing(env.state, env.tasks))
    if 'sensor_bias' in options:
        for column in env.tasks['bias'].T: assert stats.kstest(column, 'uniform', (-.3, .6)).pvalue > 1e-4


@few
@given(names, st.data())
def test_impossible_physics(name, data):
    "No machine has it: the batch says which of its tasks."
    family, field = EnvConfig(name).family, data.draw(st.sampled_from(list(CartPole.physics if name == 'MetaCartPole-v0' else Pendulum.physics)))
    values = [3e38, 2000.] + [-1., -1e-6] * (field != MOTOR[name]) + [0., 5e-4] * (field not in ('force', 'friction'))
    bad, low = family.default_task() | {field: data.draw(st.sampled_from(values))}, 0 if field in ('force', 'friction') else .001
    with pytest.raises(ValueError, match=rf'tasks \[1\] break a rule of their family: .*{field} is from {low} to 1000'): EnvBatch(EnvConfig(name, 3), [family.default_task(), bad, family.default_task()])


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', NAMES)
def test_the_most_extreme_machines_stay_finite(name):
    family = EnvConfig(name).family
    sizes = [(0 if field == 'friction' else .001, 1000) for field in family.physics] + [(1, -1)]
    tasks = [{field: np.float32(x * (sense if field == family.motor else 1)) for field, x in zip(family.physics, corner)} for *corner, sense in product(*sizes)]
    env, actions = EnvBatch(EnvConfig(name, len(tasks), 50), tasks, AutoresetMode.SAME_STEP), random_actions(name, (100, len(tasks)), 0)
    env.reset()
    for t, action in enumerate(actions):
        obs, reward, *_ = env.step(action if t % 2 else env.family.oracle(env.state, env.tasks))
        assert np.isfinite(obs).all() and np.isfinite(reward).all()


@pytest.mark.parametrize('dtype', ['u1', 'i1', 'i8', 'f2', 'f8'])
def test_torques_of_any_kind_of_number(dtype):
    torques = np.array([[0], [1], [100]])
    first, second = (EnvBatch(EnvConfig('MetaPendulum-v0', 3)) for _ in range(2))
    for env in (first, second): env.reset()
    assert_same(first.step(torques.astype(dtype))[:2], second.step(torques.astype('f4'))[:2])


# Players

def returns(name, player, tasks, T, **options):
    env, total = EnvBatch(EnvConfig(name, len(tasks), T, options=options), tasks, freeze=True), 0
    env.reset()
    for action in random_actions(name, (T, len(tasks)), 0): total = total + env.step(action if player == 'random' else getattr(env.family, player)(env.state, env.tasks))[1]
    return total


@pytest.mark.parametrize('options', [SENSORS[0], SENSORS[3]])
def test_the_oracle_balances_every_pole(options):
    config = EnvConfig('MetaCartPole-v0', options=options)
    for split in ('train', 'held_out', 'long-pole', 'strong-gravity', 'sticky-track'):
        tasks = sample_tasks(config, 200, split)
        assert returns('MetaCartPole-v0', 'oracle', tasks, 300, **options).min() == 300
        assert returns('MetaCartPole-v0', 'nothing', tasks, 300, **options).max() < 100


def test_the_oracle_swings_up_every_pendulum():
    "In 200 steps those of the distribution; where the limit of 8 rad/s takes energy away, nine tenths."
    for split, share in {'train': 1, 'held_out': 1, 'long-rod': 1, 'strong-gravity': .9, 'sticky-hinge': .9}.items():
        tasks = sample_tasks(EnvConfig('MetaPendulum-v0'), 300, split)
        oracle, nothing, random = (returns('MetaPendulum-v0', player, tasks, 200) for player in ('oracle', 'nothing', 'random'))
        assert oracle.mean() > max(nothing.mean(), random.mean()) + 900
        env = EnvBatch(EnvConfig('MetaPendulum-v0', 300, 200), tasks)
        env.reset()
        for _ in range(200): env.step(env.family.oracle(env.state, env.tasks))
        assert np.mean(np.abs(env.state[:, 0]) < .1) >= share


def energies(dt, friction, seconds=4, N=50):
    "Energies of free pendulums [T, N], and what friction took [N], from starts from which the limit of 8 rad/s is not met."
    family, rng = exact('MetaPendulum-v0'), stream(0, 'energy')
    family.dt = dt
    tasks = family.prepare(exact_tasks('MetaPendulum-v0', N, 0) | {'friction': np.full(N, friction)})
    state, energy, taken = np.stack([rng.uniform(1.5, 2.5, N), np.zeros(N)], 1), [], 0
    for _ in range(round(seconds / dt)):
        energy.append(state[:, 1]**2 / 2 + tasks['pull'] * (np.cos(state[:, 0]) - 1))
        taken = taken + dt * tasks['drag'] * state[:, 1]**2
        state = family.step(state, np.zeros((N, 1)), tasks, None)[0]
        assert np.abs(state[:, 1]).max() < 8
    return np.array(energy), taken


def test_energy_of_a_free_pendulum():
    "It stays, up to an error of first order in the time step; friction takes what it should."
    drift = {}
    for dt in (.05, .005, .0005):
        energy, _ = energies(dt, 0.)
        drift[dt] = np.abs(energy - energy[0]).max()
    for dt in (.05, .005): assert 8 < drift[dt] / drift[dt / 10] < 12
    energy, taken = energies(.0005, .1)
    np.testing.assert_allclose(energy[0] - energy[-1], taken, atol=.03)
    assert taken.min() > 10 * .03


def test_the_pendulum_is_held_with_the_double_eigenvalue():
    "Around the top, by differences of one short step: the trace is -2 lambda, the determinant lambda squared."
    h, family = 1e-4, exact('MetaPendulum-v0')
    family.dt = h
    tasks = family.prepare(exact_tasks('MetaPendulum-v0', 20, 1))
    def slope(state): return (family.step(state, family.oracle(state, tasks), tasks, None)[0] - state) / h
    columns = [(slope(np.tile(h * e, (20, 1))) - slope(np.tile(-h * e, (20, 1)))) / (2 * h) for e in np.eye(2)]
    matrices = np.stack(columns, -1)
    np.testing.assert_allclose(np.trace(matrices, axis1=1, axis2=2), -2 * tasks['pull']**.5, atol=5e-3)
    np.testing.assert_allclose(np.linalg.det(matrices), tasks['pull'], atol=1e-4)


def episode_lengths(env, N, seed, T=150):
    env.action_space.seed(seed)
    start, _ = env.reset(seed=1)
    alive, length = np.ones(N, bool), np.zeros(N)
    for _ in range(T):
        length += alive
        alive &= ~env.step(env.action_space.sample())[2]
    return start, length


def test_episodes_of_random_actions_are_as_long_as_gymnasiums():
    "In distribution. Actions need another seed than starts: with one seed for both, Gymnasium makes them from the same random numbers, and episodes come out longer."
    n, task = 10_000, CartPole().default_task()
    theirs = gym.make_vec('CartPole-v1', n, vectorization_mode='vector_entry_point')
    start, ours = episode_lengths(EnvBatch(EnvConfig('MetaCartPole-v0', n, 500), [task] * n, freeze=True), n, 2)
    for column in start.T: assert stats.kstest(column, 'uniform', (-.05, .1)).pvalue > 1e-4
    (_, right), (_, trapped) = (episode_lengths(theirs, n, seed) for seed in (2, 1))
    assert stats.ks_2samp(ours, right).pvalue > 1e-4 > stats.ks_2samp(trapped, right).pvalue


@pytest.mark.parametrize('name', NAMES)
def test_physics_is_even_over_its_ranges(name):
    config = EnvConfig(name)
    many = sample_tasks(config, 500)
    for field, (_, low, high) in config.family.physics.items():
        assert stats.kstest([abs(task[field]) for task in many], 'uniform', (low, high - low)).pvalue > 1e-4
    for split, changed in config.family.ood_splits.items():
        for field, (low, high) in changed.items(): assert all(low < task[field] <= high for task in sample_tasks(config, 50, split))


@pytest.mark.parametrize('bad', [{'gravity': 9.8}, CartPole().default_task() | {'bias': np.zeros(4)}])
def test_tasks_with_other_fields(bad):
    with pytest.raises(ValueError, match='task 0 is .*; a task of .*CartPole.* is a dict'): EnvBatch(EnvConfig('MetaCartPole-v0', 3), [bad] * 3)


def test_noise_is_independent_in_time_between_sensors_and_environments():
    n, steps = 300, 30
    env = EnvBatch(EnvConfig('MetaCartPole-v0', n, steps, options={'sensor_bias': .1, 'sensor_noise': .03}), freeze=True)
    error = [env.reset()[0] - env.state[:, :4]]
    for _ in range(steps - 1): error.append(env.step(env.family.oracle(env.state, env.tasks))[0] - env.state[:, :4])
    noise = (np.stack(error) - np.array([task['bias'] for task in env.get_tasks()])) / .03  # [T, N, 4]
    for k in range(4): assert stats.kstest(noise[..., k].ravel(), 'norm').pvalue > 1e-4
    for product in (noise[1:] * noise[:-1], noise[..., 1:] * noise[..., :-1], noise[:, 1:] * noise[:, :-1]):
        assert abs(product.mean()) < 4 / product.size**.5
    assert abs(noise.mean()) < 4 / noise.size**.5
