"""Which settings a learner uses: for every learner and every field of MetaConfig by experiment, and what is refused because it would do nothing."""
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.inner_loop import gradient_step
from ssm_metarl.meta_learner import LEARNERS, MetaConfig, MetaLearner, register_learner
from ssm_metarl.maml import JointTraining, MetaMAML
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.rl2 import RL2
from ssm_metarl.rollout import collect

CHANGES = dict(inner_steps=3, inner_lr=.03, first_order=True, head='action.bias', surrogate='dice', gamma=.4, gae_lambda=.3, outer='trpo', outer_lr=.01, outer_lr_decay=True, outer_epochs=2, clip=1e-4,
               inner_kl=5., max_kl=.0001, entropy_coef=.3, entropy_fade=.5, max_grad_norm=.01, exploration_term=True, step_size_lr=.5, bootstrap=True)
COST = 'tasks_per_chunk', 'compile'  # the same numbers, sooner or in less memory
LOOP = 'outer_steps', 'tasks_per_batch'  # read by whoever trains
CANNOT = ('reptile', 'outer'), ('meta-sgd', 'outer'), ('reptile', 'exploration_term')  # not ignored: impossible, or done by half
CASES = [('maml', dict()), ('maml', dict(entropy_coef=.1)), ('maml', dict(outer_epochs=1)), ('maml', dict(first_order=True, inner_steps=2)), ('maml', dict(outer='trpo', entropy_coef=.1)),
         ('anil', dict()), ('anil', dict(outer='trpo')), ('meta-sgd', dict(entropy_coef=.1)), ('reptile', dict(inner_steps=2)), ('reptile', dict(inner_steps=2, outer_epochs=1)),
         ('joint', dict()), ('joint', dict(entropy_coef=.1, outer_epochs=1)), ('rl2', dict()), ('rl2', dict(entropy_coef=.1, outer_epochs=1))]


def make(name, T=4, M=2, K=2, checked=True, **kw):
    env = EnvConfig('MetaGymToy-v0', num_envs=K, time_limit=T)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(4, 2, history=True), 0).double()
    cls = LEARNERS[name]
    if not checked: cls = type(cls.__name__, (cls,), dict(check_config=classmethod(lambda cls, config: None)))
    return cls(policy, env, MetaConfig(**dict(tasks_per_batch=M, inner_lr=.3, outer_steps=4) | kw))


def outcome(name, **kw):
    "Two outer steps, and two steps of adaptation on the same trajectories."
    learner = make(name, checked=False, **kw)
    for step in range(2): learner.outer_step(sample_tasks(learner.env, 2, step=step))
    other = make(name, checked=False)
    traj = collect(other.policy, {k: v.detach() for k, v in other.params.items()}, sample_tasks(other.env, 2), other.env)
    adapted = learner.adapt(learner.adapt(learner.params, traj), traj)
    return torch.cat([torch.from_numpy(v).double().flatten() for k, v in learner.state_dict().items()] + [v.flatten() for v in adapted.values()])


@pytest.mark.parametrize('name, kw', CASES, ids=str)
def test_a_field_is_used_or_refused(name, kw):
    "What changes training or adaptation is used; what leaves both as they were, but for rounding, is refused."
    cls, usual = LEARNERS[name], {}
    for f in fields(MetaConfig):
        if f.name in (*COST, *LOOP): continue
        if (name, f.name) in CANNOT:
            with pytest.raises(ValueError, match=f'{cls.__name__} does not use .*{f.name}='): make(name, **kw | {f.name: CHANGES[f.name], 'surrogate': 'logprob'})
            continue
        extra = dict(surrogate='logprob') if f.name == 'exploration_term' else {}
        before = dict(kw) | extra
        if str(extra) not in usual: usual[str(extra)] = outcome(name, **before)
        value = CHANGES[f.name] if CHANGES[f.name] != before.get(f.name, f.default) else f.default
        after = before | {f.name: value}
        try: changed = outcome(name, **after)
        except ValueError as error:  # the combination is refused in words of its own
            assert f.name in str(error)
            continue
        same = changed.shape == usual[str(extra)].shape and (changed - usual[str(extra)]).abs().max() < 1e-12
        used = f.name in cls.used_fields(MetaConfig(**after)) | cls.used_fields(MetaConfig(**before))
        assert used != same, (name, kw, f.name, f'used: {used}, the same: {same}')
        if same and value != f.default:
            with pytest.raises(ValueError, match=f'^{cls.__name__} does not use .*{f.name}=.* with these settings; leave it at .*{f.name}={f.default!r}'): make(name, **after)


@pytest.mark.parametrize('name', LEARNERS)
def test_what_costs_less_changes_nothing_and_what_others_read_is_used(name):
    kw = dict(inner_steps=2) if name == 'reptile' else {}
    used = LEARNERS[name].used_fields(MetaConfig(**kw))
    assert {*LOOP, 'tasks_per_chunk'} <= used and ('compile' in used) == (name not in ('joint', 'rl2'))
    torch.testing.assert_close(outcome(name, tasks_per_chunk=1, **kw), outcome(name, **kw), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('name, kw, message', [
    ('joint', dict(inner_kl=1., head='action.*'), r"^JointTraining does not use head='action.\*', inner_kl=1.0 with these settings; leave it at head='action.\* log_std', inner_kl=0.0$"),
    ('rl2', dict(inner_steps=2), 'RL2 does not use inner_steps=2'), ('joint', dict(first_order=True, max_kl=.1), 'first_order=True, max_kl=0.1'), ('joint', dict(outer='trpo'), "outer='trpo'"),
    ('joint', dict(compile=True), 'compile=True'), ('maml', dict(head='nonsense'), "MetaMAML does not use head='nonsense'"), ('maml', dict(outer='trpo', clip=.1, outer_epochs=5), 'outer_epochs=5, clip=0.1'),
    ('reptile', dict(inner_steps=2, clip=.1, entropy_coef=.1), 'clip=0.1, entropy_coef=0.1'), ('reptile', dict(inner_steps=2, first_order=True), 'first_order=True'), ('maml', dict(entropy_fade=.5), 'entropy_fade=0.5'),
    ('maml', dict(outer='trpo', compile=True, inner_kl=1.), 'inner_kl=1.0, compile=True'), ('meta-sgd', dict(outer='trpo'), "outer='trpo'"), ('maml', dict(outer_epochs=1, clip=.1), 'clip=0.1')])
def test_settings_that_would_be_ignored_are_refused(name, kw, message):
    with pytest.raises(ValueError, match=message) as info: make(name, **kw)
    assert '\n' not in str(info.value)


def test_what_adaptation_uses_afterwards_is_allowed():
    for name in ('joint', 'rl2'): make(name, inner_lr=.1, surrogate='dice', gamma=.9, gae_lambda=.5)


def test_a_learner_of_your_own_may_use_everything():
    class Own(MetaLearner):
        def outer_step(self, tasks): return {}
    every = frozenset(f.name for f in fields(MetaConfig))
    assert Own.used_fields(MetaConfig()) == every
    maml = make('maml')
    Own(maml.policy, maml.env, MetaConfig(head='x', inner_kl=1., max_kl=3.))
    class Heads(MetaMAML):
        @classmethod
        def used_fields(cls, config): return super().used_fields(config) | {'head'}
    Heads(maml.policy, maml.env, MetaConfig(head='x'))
    with pytest.raises(ValueError, match='Heads does not use max_kl'): Heads(maml.policy, maml.env, MetaConfig(head='x', max_kl=1.))


@pytest.mark.parametrize('head, idle', [('action.* acton.*', 'acton.*'), ('log_std mixr', 'mixr'), ('action.* value.*', 'value.*'), ('', 'it')])
def test_every_pattern_of_the_head_names_something(head, idle):
    with pytest.raises(ValueError) as info: make('anil', head=head)
    assert f'head={head!r}: {idle} names no parameter that the inner loop can adapt; there are' in str(info.value)


# Steps in which nothing would be learned.

def test_a_rate_that_has_fallen_to_nothing_is_refused():
    for name, kw in (('maml', {}), ('maml', dict(outer='trpo')), ('joint', {}), ('rl2', {})):
        learner = make(name, outer_lr_decay=True, **kw | dict(outer_steps=1))
        learner.outer_step(sample_tasks(learner.env, 2))
        before = learner.state_dict()
        with pytest.raises(ValueError, match='outer_lr_decay=True lets outer_lr fall to 0 over outer_steps=1, and 1 are done'): learner.outer_step(sample_tasks(learner.env, 2, step=1))
        for k, v in learner.state_dict().items(): np.testing.assert_array_equal(v, before[k])


def test_one_trial_has_nothing_to_compare_it_with():
    with pytest.raises(ValueError, match='a batch of 1 trial has nothing to compare it with, so RL² would learn nothing; take tasks_per_batch or num_envs of 2 or more'): make('rl2', M=1, K=1)
    learner = make('rl2', M=2, K=1)
    with pytest.raises(ValueError, match='a batch of 1 trial'): learner.outer_step(sample_tasks(learner.env, 1))
    learner.outer_step(sample_tasks(learner.env, 2))


def test_a_gradient_step_that_moves_nothing_is_refused():
    w, b = (torch.ones(2, 3, requires_grad=True) for _ in 'wb')
    params, loss = dict(w=w, b=b), (w**2).sum(1)
    assert set(gradient_step(params, loss, .1)) == {'w', 'b'} and gradient_step(params, loss, .1)['b'] is b
    for bad in (loss.detach(), (b * 0).sum(1).detach()):
        with pytest.raises(ValueError, match='the loss depends on none of w, b, so a step would move nothing'): gradient_step(params, bad, .1)
    with pytest.raises(ValueError, match='depends on none of b,'): gradient_step(params, loss, {'b': .1})
    with pytest.raises(ValueError, match='depends on none of w, b'): gradient_step({k: v.detach() for k, v in params.items()}, loss, .1)
    with pytest.raises(ValueError, match='^lr names wigth, bias; the parameters are w, b$'): gradient_step(params, loss, {'w': .1, 'wigth': .1, 'bias': .2})


@pytest.mark.parametrize('name, kw', [('maml', {}), ('maml', dict(outer='trpo')), ('maml', dict(first_order=True, tasks_per_chunk=1)), ('maml', dict(exploration_term=True, surrogate='logprob')), ('anil', {}), ('meta-sgd', {}), ('reptile', dict(inner_steps=2)), ('joint', {})], ids=str)
def test_a_single_sample_teaches_nothing(name, kw):
    "One task, one trajectory, one step: no variance, so no unit in which to judge it. The step happens, and changes no parameter."
    learner = make(name, M=1, K=1, T=1, **kw)
    before = {k: v.detach().clone() for k, v in learner.learned.items()}
    metrics = learner.outer_step(sample_tasks(learner.env, 1))
    assert learner.step == 1 and all(np.isfinite(v) for v in metrics.values())
    for k, v in learner.learned.items(): assert torch.equal(v, before[k]), k


# Validation is as wide as serialisation.

@pytest.mark.parametrize('field, value', [('outer_steps', True), ('tasks_per_chunk', False), ('inner_steps', 2.), ('gamma', True), ('inner_lr', '0.1'), ('inner_lr', True), ('first_order', 1), ('first_order', 'no'), ('compile', None),
                                          ('head', 3), ('outer', 1), ('surrogate', None), ('clip', 1j), ('gamma', None), ('tasks_per_batch', [8]), ('exploration_term', 0)])
def test_a_value_of_another_type_is_refused(field, value):
    kind = {f.name: f.type.__name__ for f in fields(MetaConfig)}[field]
    with pytest.raises(ValueError, match=f'^{field}=.* is not of type {kind}; the default is'): MetaConfig(**{field: value})


def test_numpy_numbers_become_plain_ones():
    config = MetaConfig(outer_steps=np.int64(3), inner_lr=np.float32(.5), first_order=np.bool_(True), head=np.str_('log_std'), gamma=1)
    assert [type(v) for v in (config.outer_steps, config.inner_lr, config.first_order, config.head)] == [int, float, bool, str]
    assert config == MetaConfig(outer_steps=3, inner_lr=.5, first_order=True, head='log_std', gamma=1.)
    with pytest.raises(ValueError, match='outer_steps is an array'): MetaConfig(outer_steps=np.ones(2))


def test_a_number_too_large_for_a_float_is_refused():
    for value in (10**400, -10**400):
        with pytest.raises(ValueError, match='^outer_lr='): MetaConfig(outer_lr=value)


def test_learners_by_name():
    first, second = (type(name, (MetaLearner,), {}) for name in ('First', 'Second'))
    with pytest.raises(TypeError, match='dict is not a subclass of MetaLearner, as a learner must be'): register_learner('mine')(dict)
    assert register_learner('mine')(first) is first
    try:
        with pytest.raises(ValueError, match="learner 'mine' is registered already, by .*First; choose a name other than 'maml'"): register_learner('mine')(second)
    finally: LEARNERS.remove('mine')
    assert 'mine' not in LEARNERS
