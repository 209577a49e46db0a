"The adapter with other people's models, batches, numbers, threads and devices: what was silent, or a traceback without words."
import copy
import math
import threading
import warnings
from collections import OrderedDict, namedtuple
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from ssm_metarl.monitors import (FeatureMonitor, distance_from, predictions, softmax_entropy, task_mean, uncertainty)
from ssm_metarl.guards import flatten, keeps_promise
from ssm_metarl.adapter import AdaptationConfig, Adapter, MetaRLHook, SSMHook, create_adapter

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
images, ids = torch.randn(8, 3, 6, 6, generator=g), torch.randint(11, (4, 7), generator=g)
attention = torch.ones(4, 7, dtype=torch.long)
attention[1:, 4:] = 0


class Convolutional(nn.Module):
    "As torchvision's and timm's: batch norm, pooling, one linear layer, a plain tensor of logits."
    def __init__(self, classes=5):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, classes)

    def forward(self, x): return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


class ModelOutput(OrderedDict):
    "As Hugging Face's: a mapping with attributes."
    def __getattr__(self, name):
        try: return self[name]
        except KeyError: raise AttributeError(name) from None


class Transformer(nn.Module):
    "As Hugging Face's: a batch of names, embedding and head tied."
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None, labels=None): return ModelOutput(logits=self.head(self.norm(self.embed(input_ids))))


def make(cls, *args):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(*args)


def square(outputs, batch): return outputs.square().mean()


def values(model): return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, before): return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- outputs and batches

@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: torch.compile(m, backend='eager'), nn.DataParallel, nn.Module.bfloat16], ids=['plain', 'compiled', 'parallel', 'bfloat16'])
def test_a_plain_tensor_of_logits(wrap):
    m = wrap(make(Convolutional))
    x, before, adapter = images.to(next(m.parameters()).dtype), values(m), create_adapter(m, strategy='tent')
    hook = SSMHook(adapter).attach(m)
    with adapter.context(m):
        out = m(x).detach()
        seen = adapter.observe(out, x, hook.features(x))
        assert seen['entropy'] == pytest.approx(softmax_entropy(out.float()).mean().item()) and seen['mutual_information'] is None
        assert adapter.observe([out, out + 1])['mutual_information'] == pytest.approx(0, abs=1e-2)
        assert adapter.adapt(batch=x)['steps'] == 1 and hook.features(x).shape == (8, 6)
        with adapter.using(): anchor = m(x)
        assert adapter.observe(m(x), anchor=anchor)['kl_to_source'] > 0
    assert same(m, before)
    assert adapter.adapt(lambda o, x: F.cross_entropy(o, torch.zeros(8).long()), x)['steps'] == 1


def test_a_named_tuple():
    Out = namedtuple('Out', ['logits', 'auxiliary'])  # as torchvision's GoogLeNet in training
    logits = make(Convolutional)(images)
    assert create_adapter(make(Convolutional)).observe(Out(logits, logits))['entropy'] == pytest.approx(softmax_entropy(logits).mean().item())


@pytest.mark.parametrize('outputs', [(torch.zeros(4, 3), torch.zeros(4, 3)), (torch.zeros(4, 3), (torch.zeros(1, 4), torch.zeros(1, 4))), torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, 3).long(),
                                     torch.zeros(4, 3, 6, 6), dict(out=torch.zeros(4, 3)), ModelOutput(last_hidden_state=torch.zeros(4, 3)), None], ids=str)
def test_outputs_that_could_mean_anything_name_the_way_out(outputs):
    "A tuple of tensors is no ensemble, a column no class, a map of pixels no row of logits."
    adapter = create_adapter(nn.Linear(3, 2), strategy='tent')
    for use in (adapter.observe, predictions, lambda o: adapter.adapt(batch=torch.ones(4, 3), fwd_fn=lambda _: o)):
        with pytest.raises(ValueError, match="^outputs is .* write an fwd_fn that returns one$"): use(outputs)
    if outputs is not None:
        with pytest.raises(ValueError, match='write an fwd_fn'): adapter.observe(dict(logits=torch.zeros(4, 3)), anchor=outputs)


@pytest.mark.parametrize('batch', [dict(image=images, label=1), [images, torch.zeros(8)], None, 'x'])
def test_a_batch_that_the_model_does_not_take(batch):
    with pytest.raises((TypeError, AttributeError)) as error: create_adapter(make(Convolutional)).adapt(square, batch)
    assert 'give fwd_fn, a function batch -> outputs' in error.value.__notes__[0]


def test_members_that_cannot_be_compared():
    for members in ([], [torch.zeros(4, 3), torch.zeros(4, 2)], [torch.zeros(4, 3), dict(mean=torch.zeros(4, 3), log_std=torch.zeros(4, 3))]):
        with pytest.raises(ValueError, match='^members are .* all of one kind and shape$'): create_adapter(nn.Linear(3, 2)).observe(members)


def test_outputs_of_another_number_of_tasks():
    adapter = create_adapter({'w': torch.ones(2, 3)}, stacked=True)
    adapter.observe(dict(logits=torch.zeros(2, 4, 3)))
    with pytest.raises(ValueError, match='those of 3 tasks, and those before of 2'): adapter.observe(dict(logits=torch.zeros(3, 4, 3)))


@pytest.mark.parametrize('kind', [dict, ModelOutput, lambda **kw: type('Attributes', (), kw)()], ids=['dict', 'ModelOutput', 'attributes'])
@pytest.mark.parametrize('dtype', [torch.long, torch.float, torch.bool])
def test_an_attention_mask_counts(kind, dtype):
    m, batch = make(Transformer), kind(input_ids=ids, attention_mask=attention.to(dtype))
    adapter, fwd = create_adapter(m, AdaptationConfig(lr=.01), 'tent'), lambda b: m(b['input_ids'] if hasattr(b, 'keys') else b.input_ids)
    out, real = fwd(batch), attention.bool()
    expected = softmax_entropy(out['logits'])[real].mean().item()
    assert adapter.observe(out, batch, out['logits'])['entropy'] == pytest.approx(expected)
    assert adapter.monitors.features.moments.samples.item() == pytest.approx(real.sum().item())
    assert adapter.adapt(batch=batch, fwd_fn=fwd)['loss'] == pytest.approx(expected)
    if hasattr(batch, 'keys'): assert adapter.adapt(batch=batch)['loss'] < expected  # the model takes the names
    hook, reward = MetaRLHook(adapter), torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    if hasattr(batch, 'keys'):
        rl = dict(batch) | dict(actions=ids, advantages=reward)
        assert hook.policy_loss(out, rl).item() == pytest.approx(-reward[real].mean().item(), rel=1e-5)
        assert hook.kl_to_anchor(out, out, rl) == 0


def test_masks_that_do_not_fit():
    x = torch.arange(4.)
    assert task_mean(x, dict(attention_mask=attention), False).item() == 1.5  # one prediction for each sequence
    assert task_mean(torch.ones(4, 7), dict(mask=attention.bool(), attention_mask=torch.zeros(4, 7)), False).item() == 1  # your own mask goes first
    with pytest.raises(ValueError, match='attention_mask has negative numbers'): task_mean(torch.ones(4, 7), dict(attention_mask=(attention - 1.) * 1e4), False)


# --- features

class Body(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.linear, self.out = nn.Linear(3, 4), out

    def forward(self, x): return self.out(self.linear(x))


class WithBody(nn.Module):
    def __init__(self, out, get):
        super().__init__()
        self.body, self.head, self.get = Body(out), nn.Linear(4, 2), get

    def forward(self, x): return self.head(input=self.get(self.body(x)))


@pytest.mark.parametrize('out, get', [(lambda h: h, lambda o: o), (lambda h: ModelOutput(last_hidden_state=h), lambda o: o['last_hidden_state']), (lambda h: [h, h], lambda o: o[0]),
                                      (lambda h: (h, None), lambda o: o[0])], ids=['tensor', 'ModelOutput', 'list', 'tuple'])
def test_features_of_a_named_body_and_of_a_layer_called_by_keyword(out, get):
    m, x = make(WithBody, out, get), torch.ones(5, 3)
    adapter = create_adapter(m)
    for module in ('body', None): assert torch.equal(SSMHook(adapter).attach(m, module).features(x), m.body.linear(x))


def test_a_hook_breaks_no_forward_pass_and_says_what_it_saw():
    m, x = make(WithBody, lambda h: {'nothing known': h}, lambda o: o['nothing known']), torch.ones(5, 3)
    hook = SSMHook(create_adapter(m)).attach(m, 'body')
    m(x)
    with pytest.raises(ValueError, match=r"what the hook listens to gave a mapping with \['nothing known'\]: name a module"): hook.features(x)
    with pytest.raises(ValueError, match="there is no module 'bodi'; there are body, body.linear, head"): hook.attach(m, 'bodi')
    lstm = nn.LSTM(3, 4, batch_first=True)
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(2, 5, 3), [5, 3], batch_first=True)
    for state, batch in ((False, packed), (True, torch.ones(2, 5, 3))):
        with pytest.raises(ValueError, match='what the hook listens to gave a tuple'): SSMHook(create_adapter(lstm)).attach(lstm, lstm, state).features(batch)
    assert SSMHook(create_adapter(lstm)).attach(lstm, lstm).features(torch.ones(2, 5, 3)).shape == (2, 5, 4)


def test_an_empty_module_is_a_module():
    m = nn.Sequential(nn.Linear(3, 4), nn.Sequential(), nn.ReLU(), nn.Linear(4, 2))  # bool(nn.Sequential()) is False
    assert torch.equal(SSMHook(create_adapter(m)).attach(m, '1').features(torch.ones(2, 3)), m[0](torch.ones(2, 3)))


def test_features_that_are_none():
    adapter, out = create_adapter(nn.Linear(3, 2)), torch.zeros(4, 2)
    for odd in (np.zeros((4, 3)), [1.], torch.tensor(1.), torch.zeros(4, 3, dtype=torch.complex64)):
        with pytest.raises(ValueError, match='^features are a.* give a tensor'): adapter.observe(out, feats=odd)
        with pytest.raises(ValueError, match='^features are a.* give a tensor'): adapter.calibrate(odd)
    adapter.calibrate(torch.randn(50, 3))
    with pytest.raises(ValueError, match='have 4 numbers each, and 3 before'): adapter.observe(out, feats=torch.zeros(4, 4))
    adapter.observe(out, feats=torch.zeros(4, 3))
    for mask in (torch.ones(50), torch.ones(7, dtype=torch.bool), [True] * 50):
        with pytest.raises(ValueError, match=r'^mask is .* give a bool tensor \[50\]'): adapter.calibrate(torch.randn(50, 3), mask)
    for rate in ('x', True, 0, 1j):
        with pytest.raises(ValueError, match='not between 0 and 1'): adapter.calibrate(torch.randn(20, 3, 4, 3), false_alarms=rate)


# --- losses

@pytest.mark.parametrize('loss', [lambda o, b: (o + 1j).square().mean(), lambda o, b: o.to(torch.complex128).sum()])
def test_complex_losses(loss):
    m = make(Convolutional)
    adapter, before = create_adapter(m), values(m.eval())
    with pytest.raises(ValueError, match=r'^the loss is torch.complex\d+, which has no downhill; take its abs\(\), or its real part$'): adapter.adapt(loss, images)
    assert same(m, before)


def test_arguments_in_the_wrong_order():
    for wrong in (images, 3.):
        with pytest.raises(ValueError, match='^loss_fn is a .*; give a function'): create_adapter(make(Convolutional)).adapt(wrong, square)


def test_losses_of_reinforcement_learning_say_what_is_missing():
    hook, out = MetaRLHook(create_adapter(nn.Linear(3, 2))), torch.zeros(4, 2)
    batch = dict(actions=torch.zeros(4), advantages=torch.ones(4))
    assert hook.policy_loss(out, batch) == -1
    for wrong, words in ((dict(actions=torch.zeros(4)), "'advantages' is missing; there are"), (dict(advantages=torch.ones(4)), "'actions' is missing"),
                         (batch | dict(advantages=torch.ones(4, 5)), r"'advantages' is a tensor torch.float32 \[4, 5\], but the predictions are \[4\]"), (batch | dict(mask=torch.ones(4)), 'give a bool tensor'),
                         (batch | dict(mask=torch.ones(3, dtype=torch.bool)), r"'mask' is a tensor torch.bool \[3\], but")):
        with pytest.raises(ValueError, match=words): hook.policy_loss(out, wrong)
    with pytest.raises(ValueError, match="a mapping with 'value'"): hook.value_loss(out, dict(returns=torch.ones(4)))
    with pytest.raises(ValueError, match="'returns' is missing"): hook.value_loss(dict(value=torch.zeros(4)), {})
    with pytest.raises(ValueError, match=r"'returns' is a tensor torch.float32 \[4, 4\], but"): hook.value_loss(dict(value=torch.zeros(4)), dict(returns=torch.ones(4, 4)))


# --- numbers in a config

NUMBERS = ['lr', 'steps', 'entropy_weight', 'min_log_std', 'max_grad_norm', 'max_step', 'trust_radius', 'ema_decay', 'monitor_decay']


@pytest.mark.parametrize('value', [True, False, 'x', '1e-3', math.nan, math.inf, 1j, [1], {}, 10**400, np.array(1.), np.ones(2), torch.tensor(1.), torch.ones(2), np.float64('nan'), np.bool_(True), np.str_('x'), np.complex64(1)], ids=lambda v: f'{v!r:.20}')
@pytest.mark.parametrize('name', NUMBERS)
def test_what_is_no_number(name, value):
    if name == 'steps' and type(value) is int: return  # an integer, if a large one
    with pytest.raises(ValueError, match=f'^{name}') as error: AdaptationConfig(**{name: value})
    assert '\n' not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize('name', ['lr', 'entropy_weight', 'min_log_std'])
def test_what_no_float32_can_hold(name):
    with pytest.raises(ValueError, match=f'^{name}=1e.308 is not a'): AdaptationConfig(**{name: 1e308})
    for strategy in ('none', 'tent'): assert np.isfinite(create_adapter(nn.Linear(3, 2), AdaptationConfig(**{name: 1e30}), strategy).adapt(square, torch.ones(4, 3))['drift'])


@pytest.mark.parametrize('name', ['max_grad_norm', 'max_step', 'trust_radius'])
def test_limits_as_large_as_a_float(name):
    assert create_adapter(nn.Linear(3, 2), AdaptationConfig(**{name: 1e307})).adapt(square, torch.ones(4, 3))['steps'] == 1


@pytest.mark.parametrize('name', [k for k in NUMBERS if k != 'steps'])
def test_numbers_of_numpy_become_pythons(name):
    for kind in (np.float32, np.float64, np.float16): assert type(getattr(AdaptationConfig(**{name: kind(.5)}), name)) is float


def test_integers_and_flags_of_numpy_become_pythons(tmp_path):
    config = AdaptationConfig(steps=np.int64(2), lr=np.float32(.5), trust_radius=np.int32(1), shift_gate=np.bool_(False))
    assert (type(config.steps), type(config.trust_radius), type(config.shift_gate)) == (int, int, bool)
    a, b = (create_adapter(nn.Linear(3, 2), config) for _ in range(2))
    assert a.adapt(square, torch.ones(4, 3))['steps'] == 2
    a.save(tmp_path / 'a.npz'), b.load(tmp_path / 'a.npz')


@pytest.mark.parametrize('name', ['radius_relative', 'radius_per_tensor', 'ema_anchor', 'trainable_only', 'shift_gate'])
def test_what_is_no_flag(name):
    for value in (None, 'no', 3, [1], {}):
        with pytest.raises(ValueError, match=f'^{name}=.* is neither True nor False$'): AdaptationConfig(**{name: value})


@pytest.mark.parametrize('name', ['include', 'exclude', 'modules'])
def test_what_is_no_pattern(name):
    for value in (None, 3, [1], ('*', 3), True):
        with pytest.raises(ValueError, match=f'^{name}=.* is not a pattern'): AdaptationConfig(**{name: value})
    assert getattr(AdaptationConfig(**{name: ['a', 'b']}), name) == ('a', 'b')


def test_an_optimiser_that_fails_on_the_weights():
    with pytest.raises(ValueError, match='^the optimiser fails in a trial step on these parameters .* is its learning rate too large') as error:
        create_adapter(nn.Linear(3, 2), AdaptationConfig(optimizer=lambda p: torch.optim.Adam(p, lr=1e39)))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('use', ['scale', 'returns', 'tolerance'])
@pytest.mark.parametrize('value', ['x', 1j, {}, [1, 2, 3], torch.tensor(1j), math.nan])
def test_numbers_given_to_an_adapter(use, value):
    adapter = create_adapter({'w': torch.ones(2, 3)}, stacked=True)
    pull = lambda *_: adapter.params['w'].square().sum(1)
    adapter.observe_return([1., 2.])
    if use == 'returns' and value is math.nan: return  # nan is a return that is not known
    with pytest.raises(ValueError, match=use):
        if use == 'scale': adapter.adapt(pull, scale=value)
        elif use == 'returns': adapter.observe_return(value)
        else: adapter.restore_best(value)


def test_what_is_no_config_strategy_or_stack():
    m = nn.Linear(3, 2)
    for config in (dict(lr=1), 'tent', 1e-3):
        with pytest.raises(TypeError, match='^config is a .*; give an AdaptationConfig'): create_adapter(m, config)
    with pytest.raises(TypeError, match='^config is a NoneType'): Adapter(m, None)
    for strategy in (['tent'], None, {}):
        with pytest.raises(ValueError, match="is not one of 'none'"): create_adapter(m, strategy=strategy)
    with pytest.raises(TypeError, match="'w' is a ndarray; give a dict of tensors"): create_adapter({'w': np.ones((2, 3))}, stacked=True)


# --- models that cannot be adapted, or are changed after the adapter was made

def test_models_without_numbers_of_their_own():
    with torch.inference_mode(): made = make(Convolutional)
    shared = make(Convolutional)
    shared.fc.bias = nn.Parameter(torch.zeros(1).expand(5))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PyTorch would rather not be asked for it
        traced = torch.jit.trace(make(Convolutional).eval(), images)
    for m, words in ((make(Convolutional).to('meta'), 'on the meta device'), (nn.LazyLinear(3), 'has no shape yet; call the model once'), (make(Convolutional).half(), 'conv.weight is torch.float16'),
                     (made, 'made in inference mode'), (shared, 'fc.bias uses the same memory several times'), (traced, 'is a ScriptModule'), (nn.Sequential(traced), '0 is a ScriptModule')):
        with pytest.raises(ValueError, match=words): create_adapter(m)
    nothing = make(Convolutional).half()
    nothing.fc.float()
    assert create_adapter(nothing, AdaptationConfig(include='fc.*')).weights.selected == ['fc.weight', 'fc.bias']  # what is left alone may be anything


def replace(m, what):
    if what == 'wider': m.fc = nn.Linear(6, 7)
    elif what == 'transposed': m.fc.weight.data = m.fc.weight.data.t().contiguous()
    elif what == 'gone': m.fc = nn.Identity()
    elif what == 'pruned': prune.l1_unstructured(m.fc, 'weight', .5)
    elif what == 'half': m.half()
    elif what == 'meta': m.to('meta')


USES = dict(adapt=lambda a: a.adapt(square, images), context=lambda a: ExitStack().enter_context(a.context()), using=lambda a: ExitStack().enter_context(a.using()),
            returns=lambda a: a.observe_return(1.), reset=lambda a: a.reset(), drift=lambda a: a.drift())


@pytest.mark.parametrize('use', USES)
@pytest.mark.parametrize('what', ['wider', 'transposed', 'gone', 'pruned', 'half', 'meta'])
def test_a_module_replaced_after_the_adapter_was_made(what, use):
    m = make(Convolutional)
    adapter = create_adapter(m)
    replace(m, what)
    with pytest.raises(ValueError, match=r'is (gone|(a tensor )?torch.float\d+)') as error: USES[use](adapter)
    assert '\n' not in str(error.value)


def test_what_is_not_selected_may_be_replaced():
    m = make(Convolutional)
    adapter = create_adapter(m, AdaptationConfig(include='conv.*'))
    m.fc = nn.Linear(6, 9)
    with adapter.context(): assert adapter.adapt(square, images)['steps'] == 1
    with pytest.raises(ValueError, match=r'fc.weight is a tensor torch.float32 \[9, 6\] on cpu, and numbers \[5, 6\] were to be given back'): adapter.reset()


@pytest.mark.parametrize('mode', ['episodic', 'continual'])
def test_a_module_replaced_inside_a_context_comes_back(mode):
    m = make(Convolutional)
    adapter, fc, before = create_adapter(m, AdaptationConfig(mode=mode)), m.fc, values(m)
    with adapter.context(): m.fc, m.extra = nn.Linear(6, 7), nn.Linear(1, 1)
    assert m.fc is fc and not hasattr(m, 'extra') and same(m, before)


def test_a_buffer_of_another_size_is_given_back():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(3, 4)
            self.register_buffer('h', torch.zeros(1, 4))
        def forward(self, x):
            h = self.cell(x, self.h.expand(len(x), 4) if len(self.h) != len(x) else self.h)
            self.h = h.detach()
            return h
    m = Stateful()
    adapter, x = create_adapter(m, AdaptationConfig(mode='continual')), torch.ones(5, 3)
    m(x), adapter.reset()
    assert m.h.shape == (1, 4) and not m.h.any()
    assert adapter.adapt(square, x * torch.nan)['skipped'] == 1 and m.h.shape == (1, 4)


# --- frozen later

@pytest.mark.parametrize('settings', [{}, dict(radius_per_tensor=True), dict(max_step=1e-3), dict(ema_decay=.9, ema_anchor=True)], ids=str)
@pytest.mark.parametrize('optimizer', ['adamw', 'sgd'])
def test_a_parameter_frozen_later_is_not_moved(optimizer, settings):
    m = make(Convolutional)
    adapter = create_adapter(m, AdaptationConfig(lr=.1, optimizer=optimizer, trust_radius=.01, mode='continual', exclude='bn.*', **settings))
    for _ in range(3): adapter.adapt(square, images)  # to the edge of the ball, so that each further step is projected
    m.fc.requires_grad_(False)
    frozen, free = values(m.fc), values(m.conv)
    infos = [adapter.adapt(lambda o, b: -square(o, b), images) for _ in range(5)]
    assert all(i['steps'] == 1 for i in infos) and same(m.fc, frozen) and not same(m.conv, free)
    assert not m.fc.weight.requires_grad and m.conv.weight.requires_grad
    rows, learner = flatten(adapter.weights.rows()), adapter.learner
    assert keeps_promise(rows, rows, learner.centre, learner.radius, sizes=learner.sizes)


def test_everything_frozen_later():
    m = make(Convolutional)
    adapter, before = create_adapter(m), values(m.eval())
    m.requires_grad_(False)
    with pytest.raises(ValueError, match='all parameters that were selected have been frozen since then'): adapter.adapt(square, images)
    assert same(m, before) and not m.fc.weight.requires_grad
    assert create_adapter(m, AdaptationConfig(trainable_only=False)).adapt(square, images)['steps'] == 1


# --- contexts and threads

@pytest.mark.parametrize('stacked', [False, True])
def test_gradients_set_inside_are_given_back(stacked):
    m = make(Convolutional)
    adapter = create_adapter({k: v.unsqueeze(0) for k, v in m.named_parameters()}, stacked=True) if stacked else create_adapter(m)
    first, *others = adapter.params.values()
    first.requires_grad_(True).grad = grad = torch.ones_like(first)
    flags = [p.requires_grad for p in adapter.params.values()]
    with adapter.context():
        sum(p.requires_grad_(True).square().sum() for p in adapter.params.values()).backward()
        assert not first.grad.eq(1).all() and others[0].grad is not None
    assert first.grad is grad and grad.eq(1).all() and all(p.grad is None for p in others) and [p.requires_grad for p in adapter.params.values()] == flags
    with adapter.context(): m.zero_grad(), [setattr(p, 'grad', None) for p in adapter.params.values()]
    assert first.grad is grad


def test_gradients_stay_in_continual_mode():
    m = make(Convolutional)
    with create_adapter(m, AdaptationConfig(mode='continual')).context(): m(images).sum().backward()
    assert m.fc.weight.grad is not None


@pytest.mark.parametrize('kinds', [('context', 'context'), ('using', 'context'), ('context', 'using'), ('using', 'using'), ('context', 'context', 'context')])
@pytest.mark.parametrize('adapters', [1, 2])
def test_contexts_left_in_the_wrong_order_raise_and_lose_nothing(adapters, kinds):
    m = make(Convolutional)
    several, before, flags = [create_adapter(m, AdaptationConfig(lr=.1), 'tent') for _ in range(adapters)], values(m), [x.training for x in m.modules()]
    contexts = []
    for i, kind in enumerate(kinds):
        adapter = several[i % adapters]
        contexts.append(getattr(adapter, kind)())
        contexts[-1].__enter__()
        if kind == 'context': adapter.adapt(batch=images), m.eval()
    for c in contexts[:-1]:
        with pytest.raises(RuntimeError, match='opened later is still open, and has to be left first'): c.__exit__(None, None, None)
        assert kinds[-1] == 'using' or not same(m, before)
    contexts[-1].__exit__(None, None, None)
    assert same(m, before) and [x.training for x in m.modules()] == flags and not any(x._forward_pre_hooks for x in m.modules())
    assert all(a._depth == 0 and a.adapt(batch=images)['steps'] == 1 for a in several)


def test_contexts_of_different_models_may_overlap():
    a, b = (create_adapter(make(Convolutional)) for _ in range(2))
    first, second = a.context(), b.context()
    first.__enter__(), second.__enter__(), first.__exit__(None, None, None), second.__exit__(None, None, None)


def test_an_adapter_of_a_part_is_an_adapter_of_the_model():
    m = make(Convolutional)
    whole, part, before = create_adapter(m, AdaptationConfig(lr=.1)), create_adapter(m.fc), values(m.eval())
    outer, inner = whole.context(), part.context()
    outer.__enter__(), whole.adapt(square, images), inner.__enter__()
    with pytest.raises(RuntimeError, match='left first'): outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert same(m, before)


def in_thread(f):
    "What f gives, or the error that it raises, in another thread."
    box = []
    def run():
        try: box.append(f())
        except Exception as error: box.append(error)
    thread = threading.Thread(target=run)
    thread.start(), thread.join()
    return box[0]


@pytest.mark.parametrize('use', ['adapt', 'context', 'using', 'reset', 'returns', 'observe'])
@pytest.mark.parametrize('adapters', [1, 2])
def test_two_threads(adapters, use):
    m = make(Convolutional)
    ours, *_ = several = [create_adapter(m, AdaptationConfig(mode='continual')) for _ in range(adapters)]
    theirs, uses = several[-1], USES | dict(observe=lambda a: a.observe(torch.zeros(4, 3)))
    def enter(): uses[use](theirs)
    with ours.context():
        error = in_thread(enter)
        assert isinstance(error, RuntimeError) and 'another thread is adapting this model' in str(error)
        assert ours.adapt(square, images)['steps'] == 1
    assert not isinstance(in_thread(enter), Exception)
    assert in_thread(lambda: ours.adapt(square, images)['steps']) == 1


def test_threads_with_a_lock_or_a_copy_each():
    m, lock = make(Convolutional), threading.Lock()
    shared = create_adapter(m, AdaptationConfig(mode='continual'))
    def turns():
        for _ in range(5):
            with lock: shared.adapt(square, images)
    def own():
        adapter = create_adapter(copy.deepcopy(m), AdaptationConfig(mode='continual'))
        for _ in range(5): adapter.adapt(square, images)
    threads = [threading.Thread(target=f) for f in (turns, own) * 3]
    for t in threads: t.start()
    for t in threads: t.join()
    assert shared.counters['steps'] == 15


# --- another default device

def every(x): return x.all().item() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize('stacked', [False, True])
def test_with_another_default_device(stacked, tmp_path):
    "'meta' stands for any device that is not the model's: whatever is made there by mistake has no numbers."
    m, features = make(Convolutional), torch.randn(40, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    theta = {k: v.detach().expand(2, *v.shape) for k, v in m.named_parameters()}
    with torch.device('meta'):
        adapter = create_adapter(theta if stacked else m, AdaptationConfig(shift_gate=True, ema_decay=.9, mode='continual'), 'none', stacked)
        pull = (lambda *_: adapter.params['fc.weight'].square().sum((1, 2))) if stacked else square
        adapter.calibrate(features, false_alarms=.1)
        assert every(adapter.adapt(pull, images)['gated'] == 1)
        adapter.observe(torch.ones((2, 4, 3) if stacked else (4, 3), device='cpu'), feats=100 + (features[:2, 0] if stacked else features[0, 0]))
        for scale in (None, .5): assert every(adapter.adapt(pull, images, scale=scale)['steps'] == 1)
        adapter.observe_return([1., 2.] if stacked else 1.), adapter.observe_return([0., 3.] if stacked else 0.)
        assert every(adapter.restore_best() == (torch.tensor([True, False], device='cpu') if stacked else True))
        adapter.load_state_dict(adapter.state_dict()), adapter.save(tmp_path / 'a.npz'), adapter.load(tmp_path / 'a.npz'), adapter.reset()
        assert every(adapter.drift() == 0)


# --- numbers at the edge

MASKED = torch.tensor([[0., 1., -math.inf], [2., 0., -math.inf]])


def test_what_is_ruled_out_adds_nothing_to_the_mean_prediction():
    "p log p is 0 at p = 0, and so is its gradient."
    logits = MASKED.clone().requires_grad_()
    p = MASKED.softmax(-1).mean(0)[:2]
    mean = uncertainty([dict(logits=logits), dict(logits=logits.flip(0))])['entropy']
    assert torch.allclose(mean, -(p * p.log()).sum().expand(2), atol=1e-6)
    mean.sum().backward()
    assert logits.grad.isfinite().all()


def test_masked_actions_in_all_that_an_adapter_computes():
    "Entropy and divergence themselves are in `policy`."
    logits = MASKED.clone().requires_grad_()
    adapter = create_adapter(nn.Linear(3, 2), strategy='tent')
    report = adapter.observe(logits, anchor=MASKED.flip(0)) | adapter.observe([logits, MASKED.flip(0)])
    assert all(v is None or math.isfinite(v) for v in report.values()), report
    hook = MetaRLHook(adapter)
    loss = adapter.strategy.own_loss(logits, None) + hook.kl_to_anchor(logits, MASKED.flip(0)) + hook.policy_loss(logits, dict(actions=torch.tensor([0, 1]), advantages=torch.ones(2)))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad[:, 2].eq(0).all()


def test_one_action():
    assert uncertainty([dict(logits=torch.zeros(4, 1))])['entropy_normalised'].tolist() == [0.] * 4


@pytest.mark.parametrize('log_std', [-80., 80.])
def test_the_entropy_of_a_very_wide_or_narrow_gaussian(log_std):
    "The variance leaves float32; the entropy need not."
    out = dict(mean=torch.zeros(4, 2), log_std=torch.full((4, 2), log_std))
    assert create_adapter(nn.Linear(3, 2)).observe(out)['entropy'] == pytest.approx(2 * (log_std + .5 * math.log(2 * math.pi * math.e)))


def test_predictions_of_nan_are_reported_as_such():
    out = torch.zeros(4, 3)
    flips = distance_from(dict(logits=torch.where(torch.arange(4).unsqueeze(1) == 1, torch.nan, out)), dict(logits=out))['label_flips']
    assert flips.isnan().tolist() == [False, True, False, False]
    adapter = create_adapter(nn.Linear(3, 2), strategy='tent')
    report = adapter.observe(out * torch.nan, anchor=out)
    assert all(math.isnan(v) for v in report.values() if v is not None)
    assert adapter.adapt(batch=torch.full((4, 3), torch.nan))['skipped'] == 1


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match='1 finite samples that count; source statistics need two'): FeatureMonitor(.9).calibrate(torch.ones(1, 3))
    adapter = create_adapter(nn.Linear(3, 2))
    adapter.calibrate(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    assert all(v is None or math.isfinite(v) for v in adapter.observe(torch.zeros(1, 3), feats=torch.zeros(1, 3)).values())


def test_values_with_a_last_dimension_of_one():
    hook, value = MetaRLHook(create_adapter(nn.Linear(3, 2))), torch.zeros(4, 7, 1)
    assert hook.value_loss(dict(value=value), dict(returns=torch.ones(4, 7, 1))) == 1
    with pytest.raises(ValueError, match='give one number for each'): hook.value_loss(dict(value=value), dict(returns=torch.ones(4, 7)))


def test_weights_tied_after_the_adapter_was_made():
    m = nn.ModuleDict(dict(embed=nn.Embedding(5, 3), head=nn.Linear(3, 5, bias=False)))
    adapter = create_adapter(m, AdaptationConfig(include='head.weight', trust_radius=None))
    m['head'].weight = m['embed'].weight
    assert adapter.adapt(square, torch.ones(2, 3), lambda x: m['head'](x))['steps'] == 1
