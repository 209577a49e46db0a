"Surprises that broke a promise of the adapter once: each is a test now."
import numpy as np
import pytest
import torch
from torch import nn

from ssm_metarl.adapter import AdaptationConfig, SSMHook, Tent, create_adapter
from ssm_metarl.ssm import write_npz

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
    write_npz(tmp_path / 'a.npz', dict(format=a.format, format_version=1), {'x': np.array('text')})
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
    with torch.inference_mode(), pytest.raises(RuntimeError, match='Inference tensors cannot be saved'): a.adapt(square, torch.ones(4, 3))
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
    with pytest.raises(RuntimeError), a.using({'weight': torch.zeros(1, 2, 3), 'bias': torch.zeros(1, 7)}): pass
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
