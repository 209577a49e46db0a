"What notebook 01 promises of distributions, settings, networks and units."
import math

import numpy as np
import pytest
import torch
from fastcore.test import test_close as close
from fastcore.test import test_eq as eq
from fastcore.test import test_fail as fails
from gymnasium import spaces
from torch import distributions

from ssm_metarl.policy import (PolicyConfig, SSMMetaPolicy, action_log_prob, choose_action, encode, entropy, fixed_heads, heads,
                               kl_divergence)

torch.set_num_threads(1)
logits, n = torch.tensor([1., 0., -1.]), 20_000
standard, wide = (dict(mean=torch.zeros(2), log_std=torch.full((2,), x)) for x in (0., math.log(2)))
shifted = dict(mean=torch.tensor([1., 0.]), log_std=torch.zeros(2))
plane = spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Box(-.1, .1, (2,), np.float32)


def random_outputs(discrete, seed):
    g = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(5, 7, 3, generator=g, dtype=torch.float64) for _ in range(2))
    return dict(logits=3 * first) if discrete else dict(mean=first, log_std=second / 2)


def reference(outputs):
    if 'logits' in outputs: return distributions.Categorical(logits=outputs['logits'])
    normal = distributions.Normal(outputs['mean'], outputs['log_std'].exp())
    return distributions.Independent(normal, 1)


def test_log_probability():
    sure = torch.tensor([200., 0.], requires_grad=True)
    for discrete in (True, False):
        p = random_outputs(discrete, seed=0)
        action = torch.randint(3, (5, 7)) if discrete else torch.randn(5, 7, 3, dtype=torch.float64)
        close(action_log_prob(p, action), reference(p).log_prob(action), 1e-12)
    close(action_log_prob(standard, torch.zeros(2)).item(), 2 * -0.9189, 1e-3)
    close(action_log_prob(standard, torch.tensor([1., 0.])).item(), 2 * -0.9189 - 0.5, 1e-3)
    close(action_log_prob(dict(logits=logits), torch.tensor(0)).exp().item(), 0.665, 1e-3)
    action_log_prob(dict(logits=sure), torch.tensor(1)).backward()
    eq(sure.grad.tolist(), [-1., 1.])


def test_entropy_also_with_forbidden_actions():
    close(entropy(dict(logits=torch.zeros(4))).item(), math.log(4))
    close((entropy(wide) - entropy(standard)).item(), 2 * math.log(2))
    for discrete in (True, False):
        p = random_outputs(discrete, seed=1)
        close(entropy(p), reference(p).entropy(), 1e-12)
    masked = torch.tensor([0., 1., -math.inf], requires_grad=True)
    close(entropy(dict(logits=masked)).item(), entropy(dict(logits=masked[:2])).item())
    entropy(dict(logits=masked)).backward()
    close(masked.grad, torch.tensor([.1966, -.1966, 0.]), 1e-4)


def test_divergence_also_with_forbidden_actions():
    close(kl_divergence(standard, shifted).item(), 0.5)
    for discrete in (True, False):
        p, q = random_outputs(discrete, seed=2), random_outputs(discrete, seed=3)
        judge = distributions.kl_divergence(reference(p), reference(q))
        close(kl_divergence(p, q), judge, 1e-12)
        close(kl_divergence(p, p), torch.zeros(5, 7), 1e-12)
        assert not torch.allclose(kl_divergence(p, q), kl_divergence(q, p))
    masked, other = (dict(logits=torch.tensor([x, 1., -math.inf])) for x in (0., 2.))
    without_it = (dict(logits=d['logits'][:2]) for d in (masked, other))
    close(kl_divergence(masked, other), kl_divergence(*without_it))
    eq(kl_divergence(dict(logits=torch.zeros(3)), masked).item(), math.inf)


def test_chosen_actions_follow_their_distribution():
    noise = torch.from_numpy(np.random.default_rng(0).gumbel(size=(n, 3)))
    probs = logits.softmax(-1)
    error = (probs * (1 - probs) / n).sqrt()
    chosen = choose_action(dict(logits=logits), noise)
    close(torch.bincount(chosen, minlength=3) / n, probs, 4 * error.max().item())
    eps = torch.from_numpy(np.random.default_rng(0).standard_normal((n, 2)))
    a = choose_action(wide, eps)
    close(a.mean(0), torch.zeros(2), 4 * 2 / n**.5)
    close(a.std(0), torch.full((2,), 2.), 4 * 2 / (2 * n)**.5)
    eq(choose_action(dict(logits=logits)), torch.tensor(0))
    eq(choose_action(shifted), shifted['mean'])


def test_settings_that_are_refused():
    eq(PolicyConfig().hidden_dim, 64)
    fails(lambda: PolicyConfig(hidden_dim=0), contains='hidden_dim=0 is not a positive int')
    fails(lambda: PolicyConfig(init_log_std=math.nan), contains='not both finite')
    fails(lambda: PolicyConfig(init='hipo'), contains="'hipo' is not one of")
    fails(lambda: PolicyConfig(core='lstm'),
              contains="core='lstm' is not one of 'ssm', 'stack', 'h3', 'gru', 'none'")
    fails(lambda: PolicyConfig(min_log_std=0.), contains='above init_log_std')
    assert type(PolicyConfig(hidden_dim=np.int64(8)).hidden_dim) is int


def test_encoder():
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(s, generator=g) for s in ((3, 4, 5, 2), (3, 8, 2), (3, 8)))
    loop = torch.stack([x[m] @ W[m].T + b[m] for m in range(3)])
    params = {'encoder.weight': W, 'encoder.bias': b}
    close(encode(params, x), loop.relu(), 1e-5)
    fails(lambda: encode(params, torch.zeros(6, 5, 2)),
              contains='parameters of 3 tasks for observations of 6')


@pytest.mark.parametrize('stacked', ['', 'norm', 'mixer', 'action', 'value', 'log_std', 'none'])
def test_fast_heads_with_some_or_all_layers_stacked(stacked, seed=0):  # layers whose names begin so have a task dimension
    g, shapes = torch.Generator().manual_seed(seed), {
        'norm.weight': (8,), 'norm.bias': (8,), 'mixer.weight': (8, 8), 'mixer.bias': (8,),
        'action.weight': (2, 8), 'action.bias': (2,), 'value.weight': (1, 8), 'value.bias': (1,),
        'log_std': (2,)}
    def normal(*s): return torch.randn(s, generator=g, dtype=torch.float64)
    params = {k: normal(*[3] * k.startswith(stacked), *s) for k, s in shapes.items()}
    u, y = normal(3, 5, 8), normal(3, 5, 8)
    ours, judge = fixed_heads(params, -2.5)(u + y), heads(params, u, y, -2.5)
    for k in judge: close(ours[k], judge[k], 1e-12)


def test_shapes_seeds_histories_and_refused_spaces():
    policy = SSMMetaPolicy(*plane, PolicyConfig(hidden_dim=16, state_dim=8))
    out = policy(torch.zeros(5, 7, 2))
    eq({k: tuple(v.shape) for k, v in out.items()}, dict(
        mean=(5, 7, 2), log_std=(5, 7, 2), value=(5, 7), features=(5, 7, 16), state=(5, 4)))
    close(out['log_std'], torch.full((5, 7, 2), -.5))
    eq(policy(torch.zeros(5, 2))['mean'].shape, (5, 2))  # a single step
    single = policy(torch.ones(5, 2), out['state'], torch.ones(5, dtype=torch.bool))
    close(single['mean'], policy(torch.ones(5, 1, 2))['mean'][:, 0])
    assert torch.equal(policy.extract_features({'obs': torch.zeros(5, 7, 2)}), out['features'])

    chooser = SSMMetaPolicy(plane[0], spaces.Discrete(3), PolicyConfig(16, 8, history=True))
    eq(chooser.input_dim, 2 + 3 + 2)
    logits_of = chooser(torch.zeros(5, 7, 7))
    eq(logits_of['logits'].shape, (5, 7, 3))
    assert 'log_std' not in logits_of and 'log_std' not in chooser.get_params()

    random_state = torch.get_rng_state()
    twin, other = (SSMMetaPolicy(*plane, policy.config, seed=seed) for seed in (0, 1))
    eq(torch.get_rng_state(), random_state)
    for k, v in policy.get_params().items(): eq(v, twin.get_params()[k])
    assert not torch.equal(policy.action.weight, other.action.weight)

    fails(lambda: policy(torch.zeros(5, 7, 3)), contains='expected [B, T, 2]')
    fails(lambda: SSMMetaPolicy(spaces.Discrete(4), plane[1]), contains='not a one-dimensional Box')
    for space in (spaces.MultiBinary(3), spaces.Box(0, 1, (2, 2))):
        fails(lambda: SSMMetaPolicy(plane[0], space),
                  contains='neither a one-dimensional Box nor Discrete')


def test_units_of_the_environment():
    policy, chooser = SSMMetaPolicy(*plane, PolicyConfig(16, 8)), SSMMetaPolicy(plane[0], spaces.Discrete(3), PolicyConfig(16, 8, history=True))
    def acts_in(low, high, dtype=np.float32):
        return SSMMetaPolicy(plane[0], spaces.Box(low, high, (1,), dtype), policy.config)

    close(policy.to_env(np.array([1., -.5])), np.array([.1, -.05]), 1e-6)
    close(acts_in(0, 4).to_env(np.array([[-1.], [0.], [1.]])), np.array([[0.], [2.], [4.]]))
    close(acts_in(-np.inf, np.inf).to_env(np.array([7.])), np.array([7.]))
    eq(acts_in(0, 4).to_env(np.array([[-1.5], [3.]])), np.array([[0.], [4.]]))  # clipped
    one_bound = acts_in(2, np.inf).to_env(np.array([-1., 0., 7.])[:, None])
    eq(one_bound, np.array([2., 2., 9.])[:, None])
    whole = acts_in(-100, 100, np.int8)
    rounded = whole.to_env(np.array([-1., .004, .006, 1.])[:, None])[:, 0]
    eq(rounded, np.array([-100, 0, 1, 100], np.int8))
    fails(lambda: whole.to_env(np.array([np.nan])), contains='an action is nan')
    eq(chooser.to_env(np.array([2, 0])), np.array([2, 0]))
    from_one = SSMMetaPolicy(plane[0], spaces.Discrete(3, start=1))
    eq(from_one.to_env(np.array([2, 0])), np.array([3, 1]))


def test_gradients_of_each_task_and_what_a_reset_changes():
    policy = SSMMetaPolicy(*plane, PolicyConfig(16, 8)).double()
    g = torch.Generator().manual_seed(0)
    def normal(*s): return torch.randn(s, generator=g, dtype=torch.float64)
    stacked = {k: v + .1 * normal(3, *v.shape) for k, v in policy.get_params().items()}
    obs = normal(3, 4, 9, 2)
    def loss(params, obs): return (policy.functional(params, obs)['mean']**2).mean((-1, -2, -3))
    def gradients(params, obs):
        return torch.autograd.grad(loss(params, obs).sum(), list(params.values()), allow_unused=True)
    stacked = {k: v.requires_grad_() for k, v in stacked.items()}
    together = gradients(stacked, obs)
    for m in range(3):  # tasks share no parameters: the gradient of the sum holds that of each task
        alone = gradients({k: v[m].detach().requires_grad_() for k, v in stacked.items()}, obs[m])
        for a, b in zip(together, alone):
            if a is not None: close(a[m], b, 1e-10)
    cut = policy.functional(stacked, obs, reset=torch.arange(9).expand(3, 4, 9) == 4)
    assert not torch.allclose(cut['mean'], policy.functional(stacked, obs)['mean'])


def test_the_value_shapes_no_features_and_the_width_has_a_floor():
    policy = SSMMetaPolicy(*plane, PolicyConfig(16, 8))
    ((policy(torch.ones(2, 5, 2))['value'] - 100)**2).sum().backward()
    grads = {k: v.grad for k, v in policy.named_parameters() if v.grad is not None}
    eq({k for k, g in grads.items() if g.abs().sum() > 0}, {'value.weight', 'value.bias'})

    with torch.no_grad(): policy.log_std.copy_(torch.tensor([-9., -1.]))
    out = policy(torch.ones(2, 5, 2))
    eq(out['log_std'][0, 0].tolist(), [-2.5, -1.])
    policy.zero_grad()
    out['log_std'].sum().backward()
    eq(policy.log_std.grad.tolist(), [0., 10.])
