"Surprises that broke a promise of the adapter once: each is a test now."
import json

import numpy as np
import pytest
import torch
from torch import nn

from ssm_metarl.adapter import AdaptationConfig, MetaRLHook, SSMHook, create_adapter
from ssm_metarl.strategies import Tent

torch.set_num_threads(1)
ones = torch.ones(4, 3)


def square(outputs, batch): return outputs.square().mean()


def continual(model, **kw): return create_adapter(model, AdaptationConfig(mode='continual', **kw))


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 4)
        self.register_buffer('h', torch.zeros(1, 4))
    def forward(self, x):
        h = self.cell(x, self.h)
        self.h = h.detach()
        return h


@pytest.mark.parametrize('name', ['adam', 'rmsprop', 'adagrad', 'adadelta', 'nadam'])
def test_overflow_in_the_optimiser_is_refused(name):
    a = continual(nn.Linear(3, 2), optimizer=name, lr=.01, max_grad_norm=None, trust_radius=10.)
    assert a.adapt(lambda o, b: 1e25 * square(o, b), ones)['skipped'] == 1
    assert a.adapt(square, ones)['step_norm'] > 0


@pytest.mark.parametrize('what', ['reset', 'nan', 'continual', 'episodic'])
def test_buffers_assigned_in_forward(what):
    m = Stateful()
    a = create_adapter(m) if what == 'episodic' else continual(m)
    m(ones[:1])
    before = m.h.clone()
    if what == 'reset': a.reset(); assert not m.h.any()
    elif what == 'nan':
        with a.context(): assert a.adapt(square, ones[:1] * torch.nan)['skipped'] == 1 and torch.equal(m.h, before)
    elif what == 'continual':
        with a.context(): a.adapt(square, ones[:1]); inside = m.h.clone()
        assert torch.equal(m.h, inside)
    else:
        with a.context(): m.h.zero_()
        assert torch.equal(m.h, before)


def test_weights_loaded_after_the_adapter_was_made():
    m = nn.Linear(3, 2)
    a = create_adapter(m)
    m.load_state_dict({k: v + 100 for k, v in m.state_dict().items()})
    with pytest.raises(ValueError): a.adapt(square, ones)


@pytest.mark.parametrize('drop', ['counters/steps', 'best_return', 'now/optimizer/weight/clock', 'now/optimizer/weight/exp_avg'])
def test_incomplete_state(drop):
    a, b = (create_adapter(nn.Linear(3, 2)) for _ in range(2))
    a.adapt(square, ones)
    state, before = a.state_dict(), b.target.weight.detach().clone()
    state.pop(drop)
    with pytest.raises(ValueError): b.load_state_dict(state)
    assert torch.equal(b.target.weight, before)


def test_state_of_another_optimiser():
    a = create_adapter(nn.Linear(3, 2), AdaptationConfig(optimizer=lambda p: torch.optim.SGD(p, .1, momentum=.9)))
    a.adapt(square, ones)
    with pytest.raises(ValueError): create_adapter(nn.Linear(3, 2)).load_state_dict(a.state_dict())


def test_state_outside_the_ball():
    a = create_adapter(nn.Linear(3, 2), AdaptationConfig(trust_radius=1., lr=1.))
    a.adapt(square, ones)
    with pytest.raises(ValueError): create_adapter(nn.Linear(3, 2), AdaptationConfig(trust_radius=.01)).load_state_dict(a.state_dict())


def test_foreign_array(tmp_path):
    a = create_adapter(nn.Linear(3, 2))
    np.savez(tmp_path / 'a.npz', header=np.array(json.dumps(dict(format=a.format, format_version=3))), x=np.array('text'))
    with pytest.raises(ValueError): a.load(tmp_path / 'a.npz')


def test_nested_context_restores_flags():
    m = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    a = create_adapter(m)
    with a.context():
        with a.context(): m.eval(), m.requires_grad_(False)
        assert m.training and m[0].weight.requires_grad


def test_half_inside():
    m = nn.Linear(3, 2)
    a, before = create_adapter(m), m.weight.detach().clone()
    with a.context(): m.half()
    assert m.weight.dtype == torch.float32 and torch.equal(m.weight, before)


def test_assigned_weights_of_a_gru():
    m = nn.GRU(3, 4)
    a, before = create_adapter(m), m(ones.unsqueeze(0))[0]
    with a.context(): m.load_state_dict({k: torch.zeros_like(v) for k, v in m.state_dict().items()}, assign=True)
    assert torch.equal(m(ones.unsqueeze(0))[0], before)


def test_reset_in_inference_mode():
    a = create_adapter(nn.Linear(3, 2))
    with torch.inference_mode(): a.reset()
    assert a.adapt(square, ones)['steps'] == 1


def test_batch_made_in_inference_mode():
    a = create_adapter(nn.Linear(3, 2))
    with torch.inference_mode(), pytest.raises(ValueError, match='made in inference mode'): a.adapt(square, torch.ones(4, 3))
    assert a.adapt(square, ones)['steps'] == 1


def test_bfloat16_is_saved(tmp_path):
    a = create_adapter(nn.Linear(3, 2).bfloat16())
    a.save(tmp_path / 'a.npz'), a.load(tmp_path / 'a.npz')


def test_nan_features_leave_the_monitor_alive():
    a, out = create_adapter(nn.Linear(3, 2)), dict(logits=torch.zeros(4, 3))
    a.calibrate(torch.randn(50, 3))
    a.observe(out, feats=torch.full((4, 3), torch.nan))
    assert np.isfinite(a.observe(out, feats=torch.randn(4, 3))['mahalanobis'])


def test_mixed_precision_with_max_step():
    m = nn.ParameterDict(dict(low=nn.Parameter(torch.ones(3).bfloat16()), full=nn.Parameter(torch.ones(3))))
    a = create_adapter(m, AdaptationConfig(optimizer='sgd', lr=.1, max_step=1e-3))
    a.adapt(lambda *_: m['full'].sum() + m['low'].float().sum(), fwd_fn=lambda _: None)
    assert (m['full'] != 1).all()


def test_excluded_by_its_other_name():
    m = nn.ModuleDict(dict(embed=nn.Embedding(5, 3), head=nn.Linear(3, 5)))
    m['head'].weight = m['embed'].weight
    try: selected = create_adapter(m, AdaptationConfig(exclude='head.*')).weights.selected
    except ValueError: return
    assert 'embed.weight' not in selected


def test_using_restores_after_bad_rows():
    m = nn.Linear(3, 2)
    a, before = create_adapter(m), m.weight.detach().clone()
    for rows in ({'weight': torch.zeros(1, 2, 3), 'bias': torch.zeros(1, 7)}, {'weight': torch.zeros(1, 2, 3)}):
        with pytest.raises(ValueError, match='rows are .* they must be'), a.using(rows): pass
        assert torch.equal(m.weight, before)


def test_batch_overwritten_in_place():
    m, y = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3)
    h = SSMHook(create_adapter(m)).attach(m)
    m(y), y.fill_(5.)
    assert torch.equal(h.features(y), m[0](y))


def test_a_strategy_belongs_to_one_adapter():
    s = Tent()
    a = create_adapter(nn.Linear(3, 2), strategy=s)
    with pytest.raises(ValueError): create_adapter(nn.Linear(3, 2), strategy=s)


def test_load_inside_an_episodic_context():
    a, b = (create_adapter(nn.Linear(3, 2)) for _ in range(2))
    with b.context(), pytest.raises(RuntimeError, match='a context is open'): b.load_state_dict(a.state_dict())
    assert b.drift() == 0


def test_loss_is_a_python_number():
    with pytest.raises(ValueError): create_adapter(nn.Linear(3, 2)).adapt(lambda o, b: 1., ones)


def test_batch_norm_called_by_keyword():
    class N(nn.Module):
        def __init__(self): super().__init__(); self.bn = nn.BatchNorm1d(3)
        def forward(self, x): return dict(logits=self.bn(input=x))
    create_adapter(N(), strategy='tent').adapt(batch=torch.randn(4, 3))


def test_empty_stack():
    for tensor in (torch.ones(0, 3), torch.tensor(1.)):
        with pytest.raises(ValueError): create_adapter({'w': tensor}, stacked=True)


def test_a_slash_in_any_name():
    with pytest.raises(ValueError, match="the name 'a/b.weight' contains '/'"): create_adapter(nn.ModuleDict({'a/b': nn.Linear(3, 2), 'c': nn.Linear(3, 2)}), AdaptationConfig(include='c.*'))


@pytest.mark.parametrize('mode', ['episodic', 'continual'])
@pytest.mark.parametrize('what', ['transposed', 'fewer rows', 'resized', 'one more dimension', 'square'])
def test_other_shapes_inside(what, mode):
    m = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    a = create_adapter(m, AdaptationConfig(mode=mode))
    with torch.no_grad():
        m[0].weight.mul_(2)
        before, square = {k: v.clone() for k, v in m.state_dict().items()}, m[2].weight.clone()
    with a.context():
        if what == 'transposed': m[0].weight.data = m[0].weight.data.t()
        elif what == 'fewer rows': m[0].weight.data = m[0].weight.data[:2]
        elif what == 'resized': m[1].running_mean.resize_(9)
        elif what == 'one more dimension': m[1].running_mean.unsqueeze_(0)
        elif what == 'square': m[2].weight.data = m[2].weight.data.t()
        m.eval()
    if what == 'square' and mode == 'continual': before['2.weight'] = square.t()
    assert m.training and all(p.is_contiguous() for p in m.parameters())
    for k, v in m.state_dict().items(): assert torch.equal(v, before[k]), k


def test_one_tensor_that_cannot_be_given_back_leaves_no_other():
    m = nn.ModuleDict(dict(a=nn.Linear(3, 2), b=nn.BatchNorm1d(2), c=nn.Linear(2, 2)))
    a, before = create_adapter(m), {k: v.clone() for k, v in m.state_dict().items()}
    with torch.no_grad(): [v.add_(1) for v in m.state_dict().values()]
    del m['b']
    with pytest.raises(ValueError, match='b.weight is gone'): a.weights.put(before)
    for k, v in m.state_dict().items(): assert torch.equal(v, before[k])


def test_a_module_deleted_inside_comes_back():
    m = nn.ModuleDict(dict(a=nn.Linear(3, 2), b=nn.BatchNorm1d(2), c=nn.Linear(2, 2)))
    a, before = create_adapter(m), {k: v.clone() for k, v in m.state_dict().items()}
    with a.context():
        with torch.no_grad(): [v.add_(1) for v in m.state_dict().values()]
        a.best_return = a.best_return + torch.inf
        del m['b']
        m['c'], m['d'] = nn.Linear(7, 7), nn.Linear(1, 1)
    assert list(m) == ['a', 'b', 'c'] and list(m.state_dict()) == list(before)
    for k, v in m.state_dict().items(): assert torch.equal(v, before[k])
    assert a.best_return == -torch.inf


def test_an_alarm_does_not_outlive_its_episode():
    a, out = create_adapter(nn.Linear(3, 2), AdaptationConfig(shift_gate=True)), dict(logits=torch.zeros(4, 3))
    streams = torch.randn(10, 4, 6, 3, generator=torch.Generator().manual_seed(0))
    a.calibrate(streams, false_alarms=.4), a.observe(out, feats=streams[0, 0])
    before = a.state_dict()
    with a.context():
        a.observe(out, feats=1e3 + ones)
        assert a.adapt(square, ones)['steps'] == 1
    for k, v in a.state_dict().items(): assert k.startswith(('counters', 'digest')) or torch.equal(v, before[k]), k
    with a.context(): assert a.adapt(square, ones)['gated'] == 1
    with a.context(): a.calibrate(streams[..., :2], false_alarms=.4)
    assert len(a.monitors.features.source['mean']) == 2  # a calibration stays
    a.observe(out, feats=streams[0, 0, :, :2])


@pytest.mark.parametrize('what', ['adapt', 'using', 'context', 'elsewhere'])
def test_features_are_those_of_the_weights_of_now(what):
    m = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    a = create_adapter(m, AdaptationConfig(lr=.1, trust_radius=None, mode='episodic' if what == 'context' else 'continual'))
    h, source = SSMHook(a).attach(m), m[0](ones).detach()
    assert torch.equal(h.features(ones), source)
    if what == 'elsewhere':
        with torch.no_grad(): m[0].weight.zero_()
    else:
        with a.context():
            a.adapt(square, ones)
            if what == 'context': m(ones)
            if what == 'using':
                m(ones)
                with a.using(): assert torch.equal(h.features(ones), source)
    assert torch.equal(h.features(ones), m[0](ones)) and torch.equal(m[0](ones), source) == (what == 'context')


def test_asking_for_features_changes_nothing():
    m = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    h, before, generator = SSMHook(create_adapter(m)).attach(m), {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    h.features(ones)
    for k, v in m.state_dict().items(): assert torch.equal(v, before[k]), k
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt])
def test_a_loss_that_raises_leaves_no_trace(error):
    def broken(outputs, batch): raise error
    m = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    a, before = continual(m), {k: v.clone() for k, v in m.state_dict().items()}
    with pytest.raises(error): a.adapt(broken, ones)
    for k, v in m.state_dict().items(): assert torch.equal(v, before[k]), k


def test_no_gradient_reaches_the_anchor():
    anchor, now = (dict(logits=torch.randn(4, 3, requires_grad=True)) for _ in range(2))
    MetaRLHook(create_adapter(nn.Linear(3, 2))).kl_to_anchor(now, anchor).backward()
    assert anchor['logits'].grad is None and now['logits'].grad.any()


@pytest.mark.parametrize('name', ['Muon', 'Adafactor', 'LBFGS', 'SparseAdam'])
def test_optimisers_that_do_not_work_element_by_element(name):
    if not hasattr(torch.optim, name): pytest.skip(f'this PyTorch has no {name}')
    with pytest.raises(ValueError, match='element by element'): create_adapter(nn.Linear(3, 2), AdaptationConfig(optimizer=getattr(torch.optim, name)))


@pytest.mark.parametrize('lr', [1e-8, 1e-3])
def test_an_optimiser_of_rows(lr):
    class Rows(torch.optim.Optimizer):
        def __init__(self, tensors): super().__init__(tensors, {})
        @torch.no_grad()
        def step(self): [p.sub_(lr * p.grad / p.grad.norm()) for p in self.param_groups[0]['params']]
    with pytest.raises(ValueError, match='Rows does not work element by element'): continual(nn.Linear(3, 2), optimizer=Rows)


def test_a_radius_that_is_not_finite():
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match='radius of the trust region is'): create_adapter({'w': torch.full((2, 3), value)}, stacked=True)


def test_nothing_but_empty_tensors_with_max_step():
    m = nn.ParameterDict(dict(none=nn.Parameter(torch.ones(0, 3)), other=nn.Parameter(torch.ones(2))))
    a = create_adapter(m, AdaptationConfig(include='none', max_step=.1, trust_radius=None))
    assert a.adapt(lambda *_: m['none'].sum() + m['other'].sum(), fwd_fn=lambda _: None)['drift'] == 0


def test_sparse_gradients():
    m = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(ValueError, match='the gradient of weight is sparse'): create_adapter(m).adapt(square, torch.tensor([1, 2]))
