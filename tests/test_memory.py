"Properties of stacks and selective layers that hold for any shape, reset, state and file."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from ssm_metarl.memory import SelectiveSSM, SSMStack, SSMStackConfig, delay_task, first_symbol_task, selective_copy_task, train_memory
from ssm_metarl.ssm import SSM, SSMConfig

torch.set_num_threads(1)
settings.register_profile('memory', max_examples=15, deadline=None, derandomize=True)
settings.load_profile('memory')
seeds, flags = st.integers(0, 2**20), st.booleans()


def random(seed, *shape): return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def chance(seed, p, *shape): return torch.from_numpy(np.random.default_rng([seed, 7]).random(shape) < p)


def excite(module, seed):
    "Gates away from 0, so that the dynamics do depend on the input."
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            if name.endswith('gate'): p.copy_(random([seed, i], *p.shape))
    return module


def make(selective, layers, seed): return excite(SSMStack(SSMStackConfig(3, 2, 4, layers, 6, selective=selective), seed).double(), seed)


@given(seeds, flags, st.integers(1, 3), st.integers(1, 2), st.integers(1, 7), st.integers(0, 6), flags)
def test_step_sequence_and_pieces_agree(seed, selective, layers, B, T, cut, given_state):
    stack, x, reset = make(selective, layers, seed), random(seed, B, T, 3), chance(seed, .3, B, T)
    start = torch.view_as_complex(random([seed, 1], B, layers, 3, 2)) if given_state else stack.initial_state(B)
    whole, last = stack(x, start, reset)
    step, state, cut = stack.stepper(), start, min(cut, T)
    for t in range(T):
        y, state = step(x[:, t], state, reset[:, t])
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)
    first, middle = stack(x[:, :cut], start, reset[:, :cut])
    second, end = stack(x[:, cut:], middle, reset[:, cut:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


@given(seeds, flags, st.integers(1, 5), st.sampled_from([torch.inf, torch.nan]))
def test_a_reset_cuts_the_past(seed, selective, k, poison):
    stack, x = make(selective, 2, seed), random(seed, 2, 6, 3)
    reset, bad = torch.arange(6).expand(2, 6) == k, x.clone()
    bad[:, :k] = poison
    late = lambda params, x: stack.functional(params, x, None, reset)[0][:, k:]
    params = {n: p.detach() for n, p in stack.named_parameters()}
    assert torch.equal(late(params, bad), late(params, x))


@given(seeds, flags)
def test_stacked_tasks_are_tasks_one_by_one(seed, selective):
    alone = [{n: p.detach() for n, p in make(selective, 2, seed + m).named_parameters()} for m in range(3)]
    stack, stacked = make(selective, 2, seed), {n: torch.stack([p[n] for p in alone]) for n in alone[0]}
    x, reset = random(seed, 3, 2, 5, 3), chance(seed, .3, 3, 2, 5)
    together = stack.functional(stacked, x, None, reset)
    mapped = vmap(lambda p, x, r: stack.functional(p, x, None, r))(stacked, x, reset)
    slope = lambda p, x, r: grad(lambda p: stack.functional(p, x, None, r)[0].square().sum())(p)
    slopes = vmap(slope)(stacked, x, reset)
    for m in range(3):
        for a, b, c in zip(together, mapped, stack.functional(alone[m], x[m], None, reset[m])): torch.testing.assert_close(a[m], c), torch.testing.assert_close(b[m], c)
        for n, g in slope(alone[m], x[m], reset[m]).items(): torch.testing.assert_close(slopes[n][m], g)


@pytest.mark.parametrize('init', ['lru', 'real', 's4d-lin'])
def test_a_closed_gate_is_the_plain_layer(init):
    plain, selective = (kind(SSMConfig(3, 8, 2, init), seed=4).double() for kind in (SSM, SelectiveSSM))
    x, reset = random(0, 2, 300, 3), chance(0, .05, 2, 300)
    torch.testing.assert_close(selective(x, reset=reset)[0], plain(x, reset=reset)[0])


@pytest.mark.parametrize('selective', [False, True])
def test_files(selective, tmp_path):
    stack, x = make(selective, 2, 1), random(0, 2, 5, 3)
    stack.save(tmp_path / 'a.npz')
    again = SSMStack.load(tmp_path / 'a.npz')
    assert again.config == stack.config and torch.equal(again(x)[0], stack(x)[0])
    with pytest.raises(ValueError, match="holds 'ssm_metarl.SSMStack'"): SSM.load(tmp_path / 'a.npz')
    layer = excite(SelectiveSSM(SSMConfig(3, 8, 2)), 0)
    layer.save(tmp_path / 'b.npz')
    assert torch.equal(SelectiveSSM.load(tmp_path / 'b.npz')(x.float())[0], layer(x.float())[0])


@pytest.mark.parametrize('name, value', [('input_dim', 0), ('width', -1), ('layers', 1.5), ('layers', True), ('state_dim', 7), ('init', 'hipo'), ('selective', 1)])
def test_nonsense_is_refused(name, value):
    with pytest.raises(ValueError, match=f'{name}={value!r}'): SSMStackConfig(**dict(input_dim=1, output_dim=1) | {name: value})


@pytest.mark.parametrize('kw', [{}, dict(init='real'), dict(discretisation='bilinear', feedthrough='diagonal', output_dim=3)])
def test_a_selective_layer_starts_plain_and_steps_like_a_sequence(kw):
    config = SSMConfig(**dict(input_dim=3, state_dim=8, output_dim=2) | kw)
    x, reset = random(0, 4, 12, 3), chance(0, .1, 4, 12)
    plain, selective = SSM(config).double(), SelectiveSSM(config).double()
    torch.testing.assert_close(selective(x, reset=reset)[0], plain(x, reset=reset)[0])
    whole, last = excite(selective, 1)(x, reset=reset)
    assert not torch.allclose(whole, plain(x, reset=reset)[0])
    step, state = selective.stepper(), selective.initial_state(4)
    for t in range(12):
        y, state = step(x[:, t], state, reset[:, t])
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)


def test_step_sizes_are_what_the_formula_says():
    "One real mode with eigenvalue lam and B: h = exp(lam dt) h + (exp(lam dt) - 1) / lam B u, dt = dt0 softplus(G u + log(e - 1))."
    layer, u = excite(SelectiveSSM(SSMConfig(2, 1, 1, 'real')), 3).double(), random(4, 1, 7, 2)
    lam, dt0, B, G = layer.A.item(), layer.dt.item(), layer.B[0].detach(), layer.gate[0].detach()
    h, states = 0., []
    for u_t in u[0]:
        dt = dt0 * np.log1p((np.e - 1) * np.exp((G @ u_t).item()))
        h = np.exp(lam * dt) * h + np.expm1(lam * dt) / lam * (B @ u_t).item()
        states.append(h)
    np.testing.assert_allclose(layer.extract_features(u)[0, :, 0].detach(), states, rtol=1e-9)


def test_a_stack_is_what_its_equations_say():
    stack, x = make(False, 3, 5), random(6, 2, 9, 3)
    z = stack.encoder(x)
    for core, gate in zip(stack.cores, stack.gates):
        y = torch.nn.functional.gelu(core(torch.nn.functional.layer_norm(z, (4,)))[0])
        value, openness = gate(y).chunk(2, -1)
        z = z + value * openness.sigmoid()
    torch.testing.assert_close(stack(x)[0], stack.decoder(z))


@given(seeds, st.integers(1, 4))
def test_answers_of_the_tasks(seed, B):
    x, target, weight, reset = delay_task(np.random.default_rng(seed), B, T=9, lag=2)
    assert torch.equal(target[:, 2:], x[:, :-2]) and weight[0].tolist() == [0, 0] + [1] * 7 and not reset.any()
    x, target, weight, reset = first_symbol_task(np.random.default_rng(seed), B, T=12, length=4)
    assert reset[0].nonzero().flatten().tolist() == [0, 4, 8] and weight[0].nonzero().flatten().tolist() == [3, 7, 11]
    for t in (0, 4, 8): assert torch.equal(x[:, t, :4].argmax(-1), target[:, t + 3]) and (x[:, t, 5] == 1).all()
    assert (x[:, 1:4, :4] == 0).all() and (x[:, 1:4, 5] == 0).all()
    x, target, weight, reset = selective_copy_task(np.random.default_rng(seed), B, T=10, items=3)
    for b in range(B): assert torch.equal(x[b, :10, :4].argmax(-1)[x[b, :10, :4].sum(-1) == 1], target[b, 10:])
    assert (weight.sum(1) == 3).all() and (weight[:, 10:] == 1).all() and (x[:, 10:, 5] == 1).all() and not reset.any()
    assert (x[:, :10, 4] != 0).sum() == 7 * B  # noise where no symbol is


def test_training_a_memory_repeats_and_learns():
    def train(seed=0): return train_memory(SSM(SSMConfig(1, 16, 1), 1), lambda rng, B: delay_task(rng, B, 20, 2), 60, .03, seed, B=8)
    record = train()
    assert np.array_equal(record, train()) and not np.array_equal(record, train(1))
    assert record[-10:].mean() < .5 * record[0]
    accuracy = train_memory(SSMStack(SSMStackConfig(6, 4, 8, 1, 8)), lambda rng, B: first_symbol_task(rng, B, 12, 4), 60, .01)
    assert 0 <= accuracy[0] <= .6 and accuracy[-5:].mean() > .8
