"The bound on the divergence, and what strategies promise on modules and on stacks."
import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import nn

from ssm_metarl.adapter import AdaptationConfig, AdaptationStrategy, bind_strategy, create_adapter
from ssm_metarl.learner import shorter
from ssm_metarl.strategies import EATA, SAR, T3A, TTT, KLAnchor, Norm, Tent, batch_statistics

torch.set_num_threads(1)
settings.register_profile('strategies', max_examples=25, deadline=None, derandomize=True)
settings.load_profile('strategies')
seeds, flags = st.integers(0, 2**20), st.booleans()
M, N, D, A, H = 3, 6, 4, 3, 5  # tasks, samples, inputs, actions or classes, hidden units


def random(seed, *shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Policy(nn.Module):
    "Logits, or a Gaussian."
    def __init__(self, gaussian=False, norm=nn.LayerNorm):
        super().__init__()
        self.gaussian, self.encoder, self.norm, self.head = gaussian, nn.Linear(D, H), norm(H), nn.Linear(H, A)
        self.log_std = nn.Parameter(torch.zeros(A))

    def forward(self, x, mask=None):
        z = self.norm(self.encoder(x)).tanh()
        y = self.head(z)
        return dict(mean=y, log_std=self.log_std.expand_as(y), features=z) if self.gaussian else dict(logits=y, features=z)


def make(seed=0, **kw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(**kw).float()


def functional(model, params):  # M policies at once, [M, N, D] -> outputs [M, N, ...]
    names = [k for k, _ in model.named_parameters()]
    call = lambda p, x: torch.func.functional_call(model, p, (x,))
    return lambda b: torch.func.vmap(call)({k: params()[k] for k in names}, b['x'])


def world(seed, stacked, gaussian, config, strategy='none'):
    "An adapter and the function of its outputs."
    model = make(seed, gaussian=gaussian)
    if not stacked:
        adapter = create_adapter(model, config, strategy)
        return adapter, lambda b: model(b['x'])
    rows = {k: v.detach().unsqueeze(0) + .1 * random(seed + i, M, *v.shape).float() for i, (k, v) in enumerate(model.named_parameters())}
    adapter = create_adapter(rows, config, strategy, stacked=True)
    return adapter, functional(model, lambda: adapter.params)


def divergence(p, q, mask):
    "KL(p || q) by NumPy and SciPy, mean over the samples that count, one number for each task."
    p, q = ({k: v.detach().double().numpy() for k, v in x.items()} for x in (p, q))
    if 'logits' in p:
        log_p, log_q = special.log_softmax(p['logits'], -1), special.log_softmax(q['logits'], -1)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    else:
        s, t = np.exp(p['log_std']), np.exp(q['log_std'])
        kl = (np.log(t / s) + (s**2 + (p['mean'] - q['mean'])**2) / (2 * t**2) - .5).sum(-1)
    return np.atleast_1d((kl * mask).sum(-1) / np.maximum(mask.sum(-1), 1))


@settings(max_examples=60)
@given(seeds, flags, flags, flags, st.floats(-4, 1), st.floats(-5, 0), st.sampled_from(['adam', 'sgd', 'rmsprop']), st.sampled_from([None, .05]), flags)
def test_after_every_accepted_step_the_divergence_is_bounded(seed, stacked, gaussian, masked, lr, bound, optimizer, max_step, averaged):
    config = AdaptationConfig(lr=10.**lr, optimizer=optimizer, max_kl=10.**bound, trust_radius=10., max_step=max_step, max_grad_norm=None, include='*', mode='continual', ema_decay=.9 if averaged else None, ema_anchor=averaged)
    adapter, forward = world(seed, stacked, gaussian, config)
    shape = (M, N) if stacked else (N,)
    for t in range(5):
        x, mask = random(seed + t, *shape, D).float(), torch.rand(shape, generator=torch.Generator().manual_seed(seed + t)) < .7 if masked else torch.ones(shape, dtype=torch.bool)
        batch = dict(x=x, mask=mask)
        wild = random(seed - t, *shape, A).float()
        loss = lambda out, b: adapter.task_mean((out['mean' if gaussian else 'logits'] * wild).sum(-1) * 10.**(t - 2), b)
        before = {k: v.detach().clone() for k, v in adapter.params.items()}
        with torch.no_grad(), adapter.using(): source = {k: v.clone() for k, v in forward(batch).items()}
        info = adapter.adapt(loss, batch, forward)
        with torch.no_grad(): kl = divergence(source, forward(batch), mask.numpy())
        steps, shortened, reported = (np.atleast_1d(np.asarray(info[k])) for k in ('steps', 'shortened', 'kl'))
        assert (kl[steps == 1] <= 10.**bound * (1 + 1e-6)).all()
        np.testing.assert_allclose(reported, kl, rtol=1e-5, atol=1e-9)
        assert (shortened <= steps).all() and (steps + np.atleast_1d(np.asarray(info['skipped'])) == 1).all()
        for k, v in adapter.params.items():
            v = v.detach()
            if not stacked and steps[0] == 0: assert torch.equal(v, before[k])
            if max_step is not None: assert (v - before[k]).abs().max() <= max_step
            if stacked: assert torch.equal(v[torch.from_numpy(steps == 0)], before[k][torch.from_numpy(steps == 0)])


def test_a_bound_that_is_not_reached_changes_nothing():
    x = random(1, N, D).float()
    free, bounded = (create_adapter(make(), AdaptationConfig(max_kl=b, include='*', mode='continual'), 'tent') for b in (None, 1e3))
    for _ in range(3): a, b = free.adapt(batch=x), bounded.adapt(batch=x)
    assert a.items() <= b.items() and b.keys() - a.keys() == {'kl'} and not bounded.counters['shortened'].any()
    for k, v in free.params.items(): assert torch.equal(v, bounded.params[k])


def test_a_step_without_room_is_refused_and_a_long_one_shortened():
    model, x = make(), random(1, N, D).float()
    adapter = create_adapter(model, AdaptationConfig(lr=1., optimizer='sgd', max_kl=1e-3, max_grad_norm=None, trust_radius=None, include='*', mode='continual'))
    uphill = lambda out, b: -10 * out['logits'].log_softmax(-1)[:, 0].mean()
    info = adapter.adapt(uphill, x)
    assert info['shortened'] == 1 and info['steps'] == 1 and 1e-4 < info['kl'] <= 1e-3
    with torch.no_grad(): model.head.bias += torch.tensor([1., 0., 0.])  # beyond the bound, by another hand
    before = {k: v.clone() for k, v in model.state_dict().items()}
    info = adapter.adapt(uphill, x)
    assert info['skipped'] == 1 and info['kl'] > 1e-3
    for k, v in model.state_dict().items(): assert torch.equal(v, before[k])
    back = adapter.adapt(lambda out, b: 10 * model.head.bias[0], x, lambda b: model(b))  # a step that leads back may pass
    assert back['steps'] + back['skipped'] == 1


def test_the_secant_finds_the_part_of_a_step_on_a_parabola():
    before, after = torch.tensor([0., 1., .25], dtype=torch.float64), torch.tensor([4., 9., math.inf], dtype=torch.float64)
    torch.testing.assert_close(shorter(before, after, 1.), torch.tensor([.45, .001, .001], dtype=torch.float64))
    assert shorter(torch.zeros(1), torch.tensor([math.nan]), 1.).item() == .5


def test_the_bound_needs_predictions():
    adapter = create_adapter({'w': torch.ones(2, 3)}, AdaptationConfig(max_kl=.1), stacked=True)
    with pytest.raises(ValueError, match='write an fwd_fn'): adapter.adapt(lambda *_: adapter.params['w'].square().sum(1))
    for wrong in (0, -1., math.nan, 'x'):
        with pytest.raises(ValueError, match='max_kl=.* is not a positive number'): AdaptationConfig(max_kl=wrong)


def test_statistics_of_batch_norm_do_not_see_the_forward_passes_of_the_bound():
    seen = []
    for bound in (None, .05):
        model = make(norm=nn.BatchNorm1d).train()
        adapter = create_adapter(model, AdaptationConfig(max_kl=bound, include='*', mode='continual'))
        adapter.adapt(lambda out, b: out['logits'].square().mean(), random(2, N, D).float())
        seen.append(model.norm.running_mean.clone())
    assert torch.equal(*seen)


# --- strategies: a stack is its tasks one by one; a nan harms nobody else; saved, given back, reset

BATCHED = {'tent': Tent, 'eata': EATA, 'sar': SAR, 'kl_anchor': KLAnchor}


@pytest.mark.parametrize('name', BATCHED)
@given(seeds, flags)
def test_a_stack_is_its_tasks_one_by_one(name, seed, poison):
    config = AdaptationConfig(lr=.01, include='*', mode='continual', reset_every=3, max_kl=.5)
    whole, forward = world(seed, True, False, config, name)
    alone = []
    for m in range(M):
        one = create_adapter({k: v[m:m + 1].clone() for k, v in whole.params.items()}, config, name, stacked=True)
        alone.append((one, functional(make(seed), lambda one=one: one.params)))
    for t in range(5):
        x = 3 * random(seed + t, M, N, D).float()
        if poison and t == 2: x[1] = math.nan
        info = whole.adapt(batch=dict(x=x), fwd_fn=forward)
        for m, (one, f) in enumerate(alone):
            report = one.adapt(batch=dict(x=x[m:m + 1]), fwd_fn=f)
            for k, v in report.items(): torch.testing.assert_close(info[k][m:m + 1], v, equal_nan=True, rtol=1e-4, atol=1e-6)
            for k, v in one.params.items():
                assert v.isfinite().all()
                torch.testing.assert_close(whole.params[k][m:m + 1], v, rtol=1e-3, atol=1e-4)


def ready(name, **settings):
    "A module's adapter with a strategy that has seen source data, and its batches."
    model = make(norm=nn.BatchNorm1d).eval()
    adapter = create_adapter(model, AdaptationConfig(lr=.01, mode='continual', **settings), name)
    g = torch.Generator().manual_seed(0)
    if name == 'ttt':
        draw = lambda seed: dict(obs=random(seed, N, 2, D).float(), actions=torch.randint(A, (N, 2), generator=g))
        forward = lambda b: {k: v.unflatten(0, (N, 2)) for k, v in model(b['obs'].flatten(0, 1)).items()}
    else: draw, forward = lambda seed: 2 * random(seed, N, D).float(), None
    adapter.strategy.fit_source([draw(100 + i) for i in range(3)], forward)
    return adapter, draw, forward


ALL = ['norm', 'tent', 't3a', 'eata', 'sar', 'ttt', 'kl_anchor']


@pytest.mark.parametrize('name', ALL)
def test_saved_and_loaded_is_uninterrupted(name, tmp_path):
    (a, draw, fa), (b, _, fb) = ready(name), ready(name)
    batches = [draw(i) for i in range(6)]
    for x in batches[:3]: a.adapt(batch=x, fwd_fn=fa)
    a.save(tmp_path / 'a.npz'), b.load(tmp_path / 'a.npz')
    for x in batches[3:]: assert a.adapt(batch=x, fwd_fn=fa) == b.adapt(batch=x, fwd_fn=fb)
    for k, v in a.state_dict().items(): assert torch.equal(v.nan_to_num() if v.is_floating_point() else v, b.state_dict()[k].nan_to_num() if v.is_floating_point() else v), k
    p, q = a.predict(batches[0], fa), b.predict(batches[0], fb)
    for k in p: assert torch.equal(p[k], q[k])


@pytest.mark.parametrize('name', ALL)
def test_episodes_and_resets_forget_and_leave_the_model_as_it_was(name):
    adapter, draw, forward = ready(name)
    episodic = create_adapter(adapter.target, AdaptationConfig(lr=.01), name)
    episodic.strategy.source = adapter.strategy.source
    before, flags_ = {k: v.clone() for k, v in adapter.target.state_dict().items()}, [m.training for m in adapter.target.modules()]
    x = draw(1)
    first = adapter.predict(x, forward)
    memory = dict(episodic.strategy.memory)
    with episodic.context(adapter.target):
        for i in range(4): episodic.adapt(batch=draw(i), fwd_fn=forward)
    assert episodic.strategy.memory.keys() == memory.keys() and all(torch.equal(v, memory[k]) for k, v in episodic.strategy.memory.items())
    for i in range(4): adapter.adapt(batch=draw(i), fwd_fn=forward)
    adapter.reset()
    again = adapter.predict(x, forward)
    for k in first: assert torch.equal(first[k], again[k]), k
    for k, v in adapter.target.state_dict().items(): assert torch.equal(v, before[k])
    assert flags_ == [m.training for m in adapter.target.modules()] and not any(m._forward_pre_hooks for m in adapter.target.modules())


@pytest.mark.parametrize('name', ALL)
def test_before_the_gate_opens_predictions_are_those_of_home(name):
    adapter, draw, forward = ready(name, shift_gate=True)
    adapter.calibrate(random(0, 20, 4, N, 2), false_alarms=.1)
    x = draw(1)
    home = (forward or adapter.target)(x)
    assert adapter.adapt(batch=x, fwd_fn=forward)['steps'] == 0
    for k, v in adapter.predict(x, forward).items(): assert torch.equal(v, home[k])


def test_fitting_source_data_changes_no_weight_and_survives_a_reset():
    for name, key in (('eata', 'fisher'), ('ttt', 'head')):
        adapter, draw, forward = ready(name)
        before = {k: v.clone() for k, v in adapter.target.state_dict().items()}
        adapter.strategy.fit_source([draw(7)], forward)
        for k, v in adapter.target.state_dict().items(): assert torch.equal(v, before[k])
        adapter.reset()
        assert key in adapter.strategy.source


def test_the_fisher_matrix_is_the_mean_square_of_gradients():
    "torch-ttt 5: its function for it was never run."
    adapter, draw, _ = ready('eata', include='*')
    batches, expected = [draw(i) for i in range(3)], 0.
    for x in batches:
        model = copy.deepcopy(adapter.target)
        with batch_statistics(model): z = model(x)['logits']
        nn.functional.cross_entropy(z, z.argmax(-1)).backward()
        expected = expected + model.head.weight.grad**2 / 3
    adapter.strategy.fit_source(batches)
    torch.testing.assert_close(adapter.strategy.source['fisher']['head.weight'][0], expected)


def test_sar_steps_along_the_gradient_at_the_top_of_the_hill():
    model, x = make(), random(3, 40, D).float()
    with torch.no_grad(): model.head.weight.mul_(6)
    sar = create_adapter(copy.deepcopy(model), AdaptationConfig(lr=.1, optimizer='sgd', max_grad_norm=None, trust_radius=None, include='*', mode='continual'), SAR(margin=.9, collapse=0.))
    names = [k for k, _ in model.named_parameters() if k != 'log_std']
    def loss(m, chosen):
        h = torch.distributions.Categorical(logits=m(x)['logits']).entropy()
        chosen = chosen & (h < .9 * math.log(A))
        return h[chosen].mean(), chosen
    first, chosen = loss(model, torch.ones(40, dtype=torch.bool))
    tensors = [dict(model.named_parameters())[k] for k in names]
    g = torch.autograd.grad(first, tensors)
    norm, there = torch.sqrt(sum((v**2).sum() for v in g)), copy.deepcopy(model)
    with torch.no_grad():
        for k, v in zip(names, g): there.get_parameter(k).add_(.05 * v / norm)
    second, _ = loss(there, chosen)
    up = torch.autograd.grad(second, [there.get_parameter(k) for k in names])
    assert sar.adapt(batch=x)['loss'] == pytest.approx(second.item(), rel=1e-5)
    for k, v in zip(names, up): torch.testing.assert_close(sar.target.get_parameter(k), model.get_parameter(k) - .1 * v, rtol=1e-4, atol=1e-5)


@given(seeds, st.integers(1, 4))
def test_t3a_is_its_loop(seed, per_class):
    "Against a loop over classes and examples, as one would write it down."
    model, x = make(seed).eval(), random(seed, 12, D).float()
    t3a = create_adapter(model, AdaptationConfig(mode='continual'), T3A(per_class))
    for part in x.split(4): t3a.adapt(batch=part)
    with torch.no_grad(): out = model(x)
    entropy = lambda z: torch.distributions.Categorical(logits=z).entropy()
    centres = []
    with torch.no_grad():
        for k in range(A):
            row = model.head.weight[k]
            mine = [(entropy(model.head(row)).item(), row)] + [(entropy(z).item(), f) for z, f in zip(out['logits'], out['features']) if z.argmax() == k]
            best = sorted(mine, key=lambda pair: pair[0])[:per_class]
            centre = sum(f / f.norm() for _, f in best) / len(best)
            centres.append(centre / centre.norm())
    torch.testing.assert_close(t3a.predict(x)['logits'], out['features'] @ torch.stack(centres).T, rtol=1e-4, atol=1e-5)


def test_a_model_without_norm_layers_gets_all_weights_and_a_warning():
    "Official C: models without batch norm are refused."
    for name in ('tent', 'eata', 'sar', 'kl_anchor'):
        with pytest.warns(UserWarning, match='no parameters in .* to adapt'): adapter = create_adapter(nn.Linear(D, A), strategy=name)
        assert adapter.weights.selected == ['weight', 'bias'] and adapter.adapt(batch=9 * random(0, N, D).float())['drift'] >= 0
    stack = {'a': torch.ones(M, 2)}
    with pytest.warns(UserWarning, match=r'no parameters in \*norm\*'): assert create_adapter(stack, strategy='tent', stacked=True).weights.selected == ['a']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert create_adapter(nn.Linear(D, A), AdaptationConfig(include='*'), 'tent').weights.selected == ['weight', 'bias']
        assert create_adapter(make(), strategy='tent').weights.selected == ['norm.weight', 'norm.bias']
        assert create_adapter({'norm.weight': torch.ones(M, 2), 'head': torch.ones(M, 2)}, strategy='tent', stacked=True).weights.selected == ['norm.weight']


def test_hooks_run_in_the_documented_order():
    said = []
    class Says(AdaptationStrategy):
        def configure(self, adapter): said.append('configure')
        def learn(self, batch, forward): said.append('learn')
        def post_loss(self, loss, outputs, batch): return said.append('post_loss') or loss + outputs['logits'].square().mean()
        def step(self, gradient): return said.append('step') or super().step(gradient)
        def after_step(self, report): said.append('after_step')
        def predict(self, batch, forward): return said.append('predict') or forward(batch)
        def forget(self, who): said.append('forget')
    adapter = create_adapter(make(), AdaptationConfig(steps=2, mode='continual', reset_every=1), Says())
    x = random(0, N, D).float()
    adapter.adapt(batch=x), adapter.predict(x), adapter.adapt(batch=x)
    once = ['learn', *['step', 'post_loss', 'after_step'] * 2]
    assert said == ['configure', *once, 'predict', 'forget', *once]
    with pytest.raises(ValueError, match='serves another adapter'): bind_strategy(adapter.strategy, object())


def test_resets_are_per_task_and_leave_the_counters():
    adapter, forward = world(0, True, False, AdaptationConfig(include='*', mode='continual'), 'tent')
    start = {k: v.clone() for k, v in adapter.params.items()}
    x = dict(x=random(1, M, N, D).float())
    for _ in range(3): adapter.adapt(batch=x, fwd_fn=forward)
    moved = {k: v.clone() for k, v in adapter.params.items()}
    adapter.restart([True, False, True])
    for k, v in adapter.params.items():
        assert torch.equal(v[::2], start[k][::2]) and torch.equal(v[1], moved[k][1])
    assert adapter.counters['restarted'].tolist() == [1, 0, 1] and adapter.age.tolist() == [0, 3, 0] and adapter.counters['steps'].tolist() == [3] * 3
    assert adapter.learner.optimizer['head.weight']['clock'].tolist() == [0, 3, 0]


def test_norm_predicts_with_the_statistics_of_the_batch():
    model, x = make(norm=nn.BatchNorm1d).eval(), 3 + random(0, N, D).float()
    adapter = create_adapter(model, strategy=Norm())
    assert adapter.adapt(batch=x)['steps'] == 0
    trained = copy.deepcopy(model).train()
    torch.testing.assert_close(adapter.predict(x)['logits'], trained(x)['logits'].detach())
    assert not model.training and not adapter.predict(x)['logits'].requires_grad


def test_ttt_needs_what_it_needs():
    with pytest.raises(ValueError, match="kind='x' is not one of"): TTT('x')
