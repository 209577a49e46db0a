"Properties of the H3 layer that hold for any size, reset, state and number of tasks: a loop over single numbers is the reference; and what all memories promise."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacrev, jvp, vmap

from ssm_metarl.cores import CORES, GRU, H3, Core, CoreNetwork, TwoLayers, core_config, keyed_mean_task
from ssm_metarl.memory import SelectiveSSM, SSMStack, SSMStackConfig
from ssm_metarl.files import LayerConfig
from ssm_metarl.ssm import SSM, SSMConfig

torch.set_num_threads(1)
settings.register_profile('cores', max_examples=20, deadline=None, derandomize=True)
settings.load_profile('cores')
seeds, sizes = st.integers(0, 2**20), st.integers(1, 4)


def random(seed, *shape): return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def chance(seed, p, *shape): return torch.from_numpy(np.random.default_rng([seed, 7]).random(shape) < p)


def make(D, N, H, seed):
    layer = H3(LayerConfig(D, N, H), seed).double()
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()): p.add_(.3 * random([seed, i], *p.shape))
    return layer


def reference(p, x, state, reset):  # one sequence [T, D]: table and last input, entry by entry
    (N, D), T = p['K'].shape, len(x)
    h, before = state[:N * N].reshape(N, N).copy(), state[N * N:].copy()
    A_bar, y = np.exp(-np.exp(p['log_decay'])).reshape(N, N), []
    for t in range(T):
        if reset[t]: h, before = np.zeros((N, N)), np.zeros(D)
        key, value, query = p['K'] @ before + p['b_K'], p['V'] @ x[t] + p['b_V'], p['Q'] @ x[t] + p['b_Q']
        for i in range(N):
            for j in range(N): h[i, j] = A_bar[i, j] * h[i, j] + key[i] * value[j]
        found = [sum(query[i] * h[i, j] for i in range(N)) for j in range(N)]
        y.append(p['C'] @ np.array(found) + p['D'] @ x[t])
        before = x[t]
    return np.array(y).reshape(T, len(p['C'])), np.concatenate([h.flatten(), before])


@given(seeds, sizes, sizes, sizes, st.integers(1, 3), st.integers(0, 6), st.booleans())
def test_it_is_what_its_equations_say(seed, D, N, H, B, T, given_state):
    layer, x, reset = make(D, N, H, seed), random(seed, B, T, D), chance(seed, .3, B, T)
    state = random([seed, 1], B, N * N + D) if given_state else layer.initial_state(B)
    y, last = layer(x, state if given_state else None, reset)
    p = {k: v.detach().numpy() for k, v in layer.named_parameters()}
    for b in range(B):
        expected, end = reference(p, x[b].numpy(), state[b].numpy(), reset[b].numpy())
        np.testing.assert_allclose(y[b].detach(), expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(last[b].detach(), end, rtol=1e-9, atol=1e-9)


@given(seeds, sizes, sizes, st.integers(1, 6), st.integers(0, 6))
def test_step_sequence_and_pieces_agree(seed, D, N, T, cut):
    layer, x, reset, cut = make(D, N, 3, seed), random(seed, 2, T, D), chance(seed, .3, 2, T), min(cut, T)
    start = random([seed, 1], 2, N * N + D)
    whole, last = layer(x, start, reset)
    step, state = layer.stepper(), start
    for t in range(T):
        y, state = step(x[:, t], state, reset[:, t])
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)
    first, middle = layer(x[:, :cut], start, reset[:, :cut])
    second, end = layer(x[:, cut:], middle, reset[:, cut:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


@given(seeds, st.integers(1, 5), st.sampled_from([torch.inf, torch.nan]))
def test_a_reset_cuts_the_past(seed, k, poison):
    layer, x = make(3, 2, 3, seed), random(seed, 2, 6, 3)
    reset, bad = torch.arange(6).expand(2, 6) == k, x.clone()
    bad[:, :k] = poison
    assert torch.equal(layer(bad, reset=reset)[0][:, k:], layer(x, reset=reset)[0][:, k:])


@given(seeds, st.integers(1, 3), st.integers(1, 2), st.integers(1, 5))
def test_tasks_in_one_pass_equal_one_after_the_other_through_a_gradient_step(seed, M, K, T):
    layers = [make(3, 2, 2, seed + m) for m in range(M)]
    alone = [{k: v.detach() for k, v in layer.named_parameters()} for layer in layers]
    stacked, x, reset = {k: torch.stack([p[k] for p in alone]) for k in alone[0]}, random(seed, M, K, T, 3), chance(seed, .3, M, K, T)
    def loss(p, x, reset): return layers[0].functional(p, x, reset=reset)[0].square().mean()
    def after_step(p, x, reset):
        slope = grad(loss)(p, x, reset)
        return loss({k: v - .1 * slope[k] for k, v in p.items()}, x, reset)
    y = layers[0].functional(stacked, x, reset=reset)[0]
    together = vmap(grad(after_step))(stacked, x, reset)
    for m in range(M):
        torch.testing.assert_close(y[m], layers[0].functional(alone[m], x[m], reset=reset[m])[0])
        for k, single in grad(after_step)(alone[m], x[m], reset[m]).items(): torch.testing.assert_close(together[k][m], single)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_precision_follows_the_input(dtype):
    layer = H3(SSMConfig(3, 2, 4)).to(dtype)
    y, state = layer(torch.zeros(2, 5, 3, dtype=dtype))
    assert y.dtype == state.dtype == layer.initial_state(2).dtype == dtype


# --- what every memory promises

def sel(seed=0): return SelectiveSSM(SSMConfig(4, 6, 4), seed)


def deep(seed=0): return SSMStack(SSMStackConfig(4, 4, 5, 2, 6), seed)


MEMORIES = {name: lambda seed=0, name=name: CORES[name](core_config(name, 4, 6), seed) for name in CORES} | {'selective': sel, 'a stack of its own': deep}
every_memory = pytest.mark.parametrize('make', MEMORIES.values(), ids=MEMORIES.keys())


def excited(layer):
    "Also the parameters that start at zero."
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()): p.add_(.1 * random(i, *p.shape).to(p.dtype))
    return layer


@every_memory
def test_one_step_is_a_batch_of_steps(make):
    layer, x, reset = excited(make()).double(), random(0, 3, 4), torch.tensor([False, True, False])
    state = layer(random(1, 3, 5, 4))[1]
    y, last = layer(x, state, reset)
    for a, b in zip((y, last), layer.stepper()(x, state, reset)): assert torch.equal(a, b)
    torch.testing.assert_close(y, layer(x[:, None], state, reset[:, None])[0][:, 0])
    assert torch.equal(layer(x)[0], layer.stepper()(x, layer.initial_state(3))[0])


@every_memory
def test_no_steps_leave_the_state(make):
    layer = make()
    state = layer(torch.ones(2, 5, 4))[1]
    y, last = layer(torch.ones(2, 0, 4), state)
    assert y.shape == (2, 0, 4) and torch.equal(last, state) and layer(torch.ones(2, 0, 4))[1].shape == state.shape


@every_memory
def test_what_does_not_fit_is_refused(make):
    layer = make()
    x, state, flags = torch.zeros(2, 5, 4), layer.initial_state(2), torch.zeros(2, 5, dtype=torch.bool)
    for call in (lambda: layer(x[..., :3]), lambda: layer(x[:, 0, :3]), lambda: layer(x[0, 0]), lambda: layer(x[None]), lambda: layer(x, layer.initial_state(3)), lambda: layer(x, state[..., :-1]),
                 lambda: layer(x, reset=flags.float()), lambda: layer(x, reset=flags[:1]), lambda: layer(x, reset=flags[0]), lambda: layer.stepper()(x[:, 0], state, flags[0]),
                 lambda: layer.functional(dict(layer.named_parameters()), x[0, 0])):
        with pytest.raises(ValueError) as info: call()
        assert '\n' not in str(info.value)


@every_memory
def test_features_and_files(make, tmp_path):
    layer, x = excited(make(3)), torch.ones(2, 5, 4)
    features = layer.extract_features(x)
    assert features.shape[:2] == (2, 5) and not features.is_complex()
    assert torch.equal(layer.extract_features(x, layer.initial_state(2)), features)
    layer.save(tmp_path / 'a.npz')
    again = type(layer).load(tmp_path / 'a.npz')
    assert again.config == layer.config and torch.equal(again(x)[0], layer(x)[0])


@every_memory
def test_the_default_device_holds_all_parameters_and_does_not_change_them(make):
    "As `meta` shows it; the numbers themselves come from the CPU, whatever the device."
    with torch.device('meta'): layer = make()
    assert {p.device.type for p in layer.parameters()} == {'meta'}
    layer.init_parameters(1)  # needs no generator of the other device
    assert layer.initial_state(2).device.type == 'meta'
    here = make(1)
    here.init_parameters(0)
    for a, b in zip(here.parameters(), make(0).parameters()): assert torch.equal(a, b)
    before = torch.random.get_rng_state()
    make()
    assert torch.equal(torch.random.get_rng_state(), before)


@every_memory
def test_forward_mode_and_hessian(make):
    "jvp against the gradient of a gradient, which is linear in a dummy; hessian against jacrev twice; as functions of input and parameters."
    layer = excited(make()).double()
    params, x, reset = {k: v.detach() for k, v in layer.named_parameters()}, random(0, 2, 3, 4), torch.tensor([[False, False, True], [True, False, False]])
    f = lambda p, x: layer.functional(p, x, reset=reset)[0]
    rates = {k: random(i, *v.shape) for i, (k, v) in enumerate(params.items())}, random(9, *x.shape)
    h = 1e-6
    shifted = lambda s: f({k: v + s * h * rates[0][k] for k, v in params.items()}, x + s * h * rates[1])
    torch.testing.assert_close(jvp(f, (params, x), rates)[1], (shifted(1) - shifted(-1)) / (2 * h), rtol=1e-6, atol=1e-6)
    energy = lambda x: f(params, x).pow(3).sum()
    torch.testing.assert_close(hessian(energy)(x), jacrev(jacrev(energy))(x))


@every_memory
def test_bfloat16_weights(make):
    "Within what bfloat16 does to weights and results; by steps the same as whole."
    wide, x = make(1), random(0, 2, 60, 4).bfloat16()
    low = make(1).bfloat16()
    y, last = low(x)
    wide.load_state_dict(low.state_dict())
    expected = wide(x.float())[0]
    assert y.dtype == torch.bfloat16 and last.dtype == low.initial_state(2).dtype
    assert (y.float() - expected).abs().max() < .05 * expected.abs().max()
    step, state = low.stepper(), low.initial_state(2)
    for t in range(60): out, state = step(x[:, t], state)
    torch.testing.assert_close(out, y[:, -1], rtol=.05, atol=.05)


@every_memory
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_torch_compile_without_a_break(make, backend):
    layer, x, reset = excited(make()), random(0, 2, 5, 4).float(), torch.tensor([[False, False, True, False, False], [True, False, False, False, False]])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for cut in (None, reset):
        y, expected = compiled(x, None, cut)[0], layer(x, None, cut)[0]
        torch.testing.assert_close(y, expected)
        for a, b in zip(*(torch.autograd.grad(out.square().sum(), layer.parameters()) for out in (y, expected))): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(x[:, 0])[0], layer(x[:, 0])[0])


def test_torch_compile_as_users_call_it():
    layer, x = SSM(SSMConfig(4, 6, 4)), random(0, 2, 5, 4).float()
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True)(x)[0]
    torch.testing.assert_close(y, layer(x)[0])
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), layer.parameters()) for out in (y, layer(x)[0]))): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('core', ['gru', 'h3'])
def test_an_odd_state_needs_no_pairs(core):
    assert CORES[core](core_config(core, 4, 7))(torch.zeros(2, 3, 4))[0].shape == (2, 3, 4)
    for odd in ('ssm', 'stack', 'none'):
        with pytest.raises(ValueError, match='state_dim=7 is odd, but complex states come in conjugate pairs'): core_config(odd, 4, 7)
        assert core_config(odd, 4, 7, init='real').state_dim == 7


@pytest.mark.parametrize('layer, allowed', [(GRU, ()), (H3, ()), (TwoLayers, ('init',))])
@pytest.mark.parametrize('name, value', [('init', 'legs'), ('dt_min', .01), ('discretisation', 'bilinear'), ('feedthrough', 'diagonal')])
def test_settings_that_a_core_ignores_are_refused(layer, allowed, name, value):
    config = SSMConfig(**dict(input_dim=4, state_dim=6, init='legs' if name == 'dt_min' else 'lru') | {name: value})
    if name in allowed: assert layer(config).config.init == value
    else:
        with pytest.raises(ValueError, match='has no effect on'): layer(config)


@given(seeds, st.integers(1, 4), st.integers(1, 8))
def test_means_under_keys(seed, keys, T):
    x, target, weight, reset = keyed_mean_task(np.random.default_rng(seed), 2, T, keys)
    key = x[..., :keys].argmax(-1)
    for b in range(2):
        seen = {k: [] for k in range(keys)}
        for t in range(T):
            if t: seen[key[b, t - 1].item()].append(x[b, t, keys].item())
            values = seen[key[b, t].item()]
            np.testing.assert_allclose(target[b, t, 0], np.mean(values) if values else 0, atol=1e-5)
    assert (x[:, 0, keys] == 0).all() and weight.shape == reset.shape == (2, T) and not reset.any()


@pytest.mark.parametrize('kind', CORES.values(), ids=CORES.keys())
def test_a_network_around_a_core_hands_on_state_and_reset(kind):
    model, x = CoreNetwork(kind(SSMConfig(8, 4, 8), 1), 3, 8, 2), random(0, 2, 6, 3).float()
    y, _ = model(x)
    assert y.shape == (2, 6, 2)
    first, state = model(x[:, :3])
    torch.testing.assert_close(torch.cat([first, model(x[:, 3:], state)[0]], 1), y)
    reset = torch.arange(6).expand(2, 6) == 3
    torch.testing.assert_close(model(x, reset=reset)[0][:, 3:], model(x[:, 3:])[0])
    before = torch.random.get_rng_state()
    again = CoreNetwork(kind(SSMConfig(8, 4, 8), 1), 3, 8, 2)
    assert torch.equal(again(x)[0], y) and torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize('kind', [GRU, H3])
def test_parameters_of_a_seed_stay_what_they_were(kind):
    "Sums measured before the two layers got a common base: files and seeds of old runs must give the same layer."
    expected = {GRU: 35.645736, H3: 116.416838}[kind]
    layer = kind(LayerConfig(3, 4, 5), seed=1)
    assert sum(p.abs().sum().item() for p in layer.parameters()) == pytest.approx(expected, rel=1e-5)
    assert [name for name, _ in layer.named_parameters()] == {GRU: ['W', 'U', 'b_W', 'b_U', 'C', 'D'], H3: ['K', 'V', 'Q', 'b_K', 'b_V', 'b_Q', 'log_decay', 'C', 'D']}[kind]


def test_a_core_without_methods_says_so():
    for method in ('shapes', 'init_parameters', 'states', 'readout', 'stepper'): assert method in vars(GRU) and method in vars(H3)
    with pytest.raises(NotImplementedError): Core(LayerConfig(3))


@given(seeds, sizes, sizes)
def test_the_gru_is_that_of_pytorch(seed, D, N):
    ours, theirs, x = excited(GRU(LayerConfig(D, N, 3), seed)).double(), torch.nn.GRU(D, N, batch_first=True).double(), random(seed, 2, 6, D)
    with torch.no_grad():
        for name, p in (('weight_ih_l0', ours.W), ('weight_hh_l0', ours.U), ('bias_ih_l0', ours.b_W), ('bias_hh_l0', ours.b_U)): getattr(theirs, name).copy_(p)
    h, last = theirs(x)
    y, state = ours(x)
    torch.testing.assert_close(y, h @ ours.C.T + x @ ours.D.T)
    torch.testing.assert_close(state, last[0])
