"Other people's tools make our environments by name, and learn in them: Stable-Baselines3, TorchRL, Gymnasium's checker and recorders, a loop in the manner of CleanRL."
import importlib.util
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import HumanRendering, RecordVideo
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordVideo as RecordVideos

import ssm_metarl
from ssm_metarl.batch import EnvBatch, UnknownOption
from ssm_metarl.envs import FAMILIES, EnvConfig

every = pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.skipif('Cheetah' in name and not importlib.util.find_spec('mujoco'), reason='needs MuJoCo')) for name in FAMILIES if name.startswith('Meta')])
drawn = pytest.mark.parametrize('name', ['MetaGymToy-v0', 'MetaCartPole-v0', 'MetaPendulum-v0'])
undrawn = pytest.mark.parametrize('name', ['MetaBandit-v0', 'MetaTabularMDP-v0'])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_returns(env, episodes=100):
    "Of somebody who acts at random, on tasks 0, 1, ..."
    env.action_space.seed(0)
    returns = []
    for seed in range(episodes):
        env.reset(seed=seed)
        total, over = 0., False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, over = total + reward, terminated or truncated
        returns.append(total)
    return np.array(returns)


# Gymnasium

@every
def test_gymnasiums_checker_finds_nothing(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for meant in ('.*observation space (min|max)imum value is -?infinity', '.*symmetric and normalized space'): warnings.filterwarnings('ignore', meant)
        check_env(gym.make(name, time_limit=20).unwrapped, skip_render_check='Cheetah' in name)  # MuJoCo needs a graphics driver for pictures


def videos(folder): return sorted(path.name for path in Path(folder).glob('*.mp4') if path.stat().st_size > 0)


@drawn
def test_one_environment_is_recorded(name, tmp_path):
    pytest.importorskip('moviepy')
    env = RecordVideo(gym.make(name, render_mode='rgb_array', time_limit=6), str(tmp_path / name), episode_trigger=lambda episode: True)
    for seed in (0, 1):
        env.reset(seed=seed)
        over = False
        while not over: *_, terminated, truncated, _ = env.step(env.action_space.sample()); over = terminated or truncated
    env.close()
    assert videos(tmp_path / name) == ['rl-video-episode-0.mp4', 'rl-video-episode-1.mp4']


@drawn
@pytest.mark.parametrize('mode', list(AutoresetMode))
@pytest.mark.filterwarnings("ignore:.*autoreset mode is same-step")
def test_a_batch_is_recorded(name, mode, tmp_path):
    pytest.importorskip('moviepy')
    env = RecordVideos(gym.make_vec(name, 4, render_mode='rgb_array', time_limit=3, autoreset_mode=mode), str(tmp_path / name), episode_trigger=lambda episode: True)
    obs, _ = env.reset(seed=0)
    for _ in range(8):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if mode == AutoresetMode.DISABLED and (over := terminated | truncated).any(): env.reset(options={'reset_mask': over})
    env.close()
    assert len(videos(tmp_path / name)) >= 3


@drawn
def test_on_the_screen(name, monkeypatch):
    pytest.importorskip('pygame')
    monkeypatch.setenv('SDL_VIDEODRIVER', 'dummy')
    with pytest.warns(UserWarning, match='HumanRendering wrapper is being applied'): env = gym.make(name, render_mode='human')
    assert isinstance(env, HumanRendering) and env.render_mode == 'human'
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()
    frames = gym.make(name, render_mode='rgb_array_list')
    frames.reset(), frames.step(frames.action_space.sample())
    assert len(frames.render()) == 2


@undrawn
@pytest.mark.parametrize('mode', ['rgb_array', 'human', 'rgb_array_list'])
@pytest.mark.filterwarnings('ignore:.*HumanRendering wrapper')
def test_what_draws_no_pictures_says_so(name, mode):
    with pytest.raises(UnknownOption, match="render_mode='rgb_array': .* draws no pictures; leave it None"): gym.make(name, render_mode=mode)
    with pytest.raises(UnknownOption, match=f"render_mode='{mode}': .* draws no pictures; leave it None"): gym.make_vec(name, 2, render_mode=mode)
    with pytest.raises(ValueError, match='Render mode is None'): RecordVideos(gym.make_vec(name, 2), 'nowhere')


@pytest.mark.parametrize('name, theirs', [('MetaCartPole-v0', 'CartPole-v1'), ('MetaPendulum-v0', 'Pendulum-v1')])
def test_pictures_are_those_of_gymnasium(name, theirs):
    "The same state, drawn by both: a difference of less than one grey level in 255, on average."
    pytest.importorskip('pygame')
    ours, peer = gym.make(name, render_mode='rgb_array'), gym.make(theirs, render_mode='rgb_array')
    for seed in range(5):
        ours.reset(seed=seed, options={'task': ours.unwrapped.batch.family.default_task()})
        peer.reset(seed=seed)
        peer.unwrapped.state, peer.unwrapped.last_u = ours.unwrapped.state.astype(float), None
        a, b = ours.render().astype(float), peer.render().astype(float)
        assert a.shape == b.shape and abs(a - b).mean() < 1 < (255 - b).mean()
    ours.close(), peer.close()


# A loop in the manner of CleanRL: it counts episodes and returns by itself.

@every
def test_a_loop_over_a_vector_of_environments(name):
    env = RecordEpisodeStatistics(gym.make_vec(name, 3, time_limit=5))
    env.action_space.seed(0)
    obs, _ = env.reset(seed=1)
    returns, lengths, running, steps = [], [], np.zeros(3), np.zeros(3, int)
    for _ in range(23):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        running, steps, over = running + reward, steps + 1, terminated | truncated
        for i in np.flatnonzero(over):
            returns, lengths = returns + [running[i]], lengths + [steps[i]]
            assert info['final_obs'][i] in env.single_observation_space and info['episode']['l'][i] == steps[i]
            np.testing.assert_allclose(info['episode']['r'][i], running[i], 1e-4, 1e-5)
        running[over], steps[over] = 0, 0
    assert len(lengths) == 12 and set(lengths) == {5}  # no episode in which nothing happens
    if name == 'MetaCartPole-v0': assert returns == [5] * 12
    env.close()


# Stable-Baselines3

@every
def test_stable_baselines_makes_every_family_by_name(name):
    PPO = pytest.importorskip('stable_baselines3').PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv
    env = make_vec_env(name, 3, seed=2, env_kwargs={'time_limit': 8}, vec_env_cls=DummyVecEnv)
    again = make_vec_env(name, 3, seed=2, env_kwargs={'time_limit': 8})
    for e in (env, again): e.reset()    # the seed takes effect here; before, each environment's task is from entropy
    tasks, tasks_again = ([str(task) for task in e.env_method('get_task')] for e in (env, again))
    assert tasks == tasks_again and len(set(tasks)) == (2 if name == 'MetaHalfCheetahDir-v0' else 3)
    model = PPO('MlpPolicy', name, n_steps=16, batch_size=16, n_epochs=1, seed=0, device='cpu').learn(16)
    assert model.num_timesteps == 16
    env.close(), again.close()


def last_returns(model, n=20): return np.mean([episode['r'] for episode in model.ep_info_buffer][-n:])


def test_ppo_learns_by_name():
    "One cart-pole (the seed of PPO decides which), 200 steps at most: at least three times as long as at random."
    PPO = pytest.importorskip('stable_baselines3').PPO
    random = random_returns(gym.make('MetaCartPole-v0')).mean()
    model = PPO('MlpPolicy', 'MetaCartPole-v0', n_steps=256, batch_size=64, gae_lambda=.8, gamma=.98, learning_rate=1e-3, seed=0, device='cpu').learn(8000)
    assert last_returns(model) > 3 * random > 60


def test_recurrent_ppo_learns_by_name():
    "Eight copies of one cart-pole: at least twice as long as at random."
    RecurrentPPO = pytest.importorskip('sb3_contrib').RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env
    random = random_returns(gym.make('MetaCartPole-v0')).mean()
    env = make_vec_env('MetaCartPole-v0', 8, env_kwargs={'seed': 0})
    model = RecurrentPPO('MlpLstmPolicy', env, n_steps=64, batch_size=256, n_epochs=8, gae_lambda=.9, gamma=.98, learning_rate=3e-3, seed=0, device='cpu',
                         policy_kwargs=dict(lstm_hidden_size=32, net_arch=[32])).learn(8000)
    assert last_returns(model) > 2 * random > 40


# TorchRL

@every
@pytest.mark.filterwarnings('ignore')
def test_torchrl_accepts_every_family_by_name(name):
    pytest.importorskip('torchrl')
    from torchrl.envs import GymEnv
    from torchrl.envs.utils import check_env_specs
    check_env_specs(GymEnv(name))
    check_env_specs(GymEnv(name, frame_skip=2))


@every
@pytest.mark.parametrize('mode', [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
@pytest.mark.filterwarnings('ignore')
def test_torchrl_accepts_a_batch(name, mode):
    pytest.importorskip('torchrl')
    from torchrl.envs import GymWrapper
    from torchrl.envs.utils import check_env_specs
    env = GymWrapper(EnvBatch(EnvConfig(name, 3, 5), autoreset_mode=mode))
    check_env_specs(env)
    steps = env.rollout(12, break_when_any_done=False)['next']
    assert env.batch_size == (3,) and steps['done'].sum() == 3 * (12 // 5)
    if name == 'MetaCartPole-v0': assert (steps['reward'] == 1).all()


@pytest.mark.filterwarnings('ignore')
def test_torchrl_sees_pictures():
    pytest.importorskip('torchrl')
    from torchrl.envs import GymEnv
    from torchrl.envs.utils import check_env_specs
    env = GymEnv('MetaCartPole-v0', from_pixels=True, pixels_only=False)
    check_env_specs(env)
    assert env.reset()['pixels'].shape == (400, 600, 3)


def test_the_package_is_enough(): assert ssm_metarl.__version__ and set(FAMILIES) <= set(gym.registry)
