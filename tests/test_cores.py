"Properties of the H3 layer that hold for any size, reset, state and number of tasks: a loop over single numbers is the reference."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from ssm_metarl.cores import H3
from ssm_metarl.ssm import LayerConfig, SSMConfig

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
