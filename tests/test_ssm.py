"Properties of `ssm` that hold for any shape, reset, initial state and file."
import copy
import decimal
import fractions
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag, expm
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from ssm_metarl import scan as scan_module
from ssm_metarl.memory import SSMStackConfig
from ssm_metarl.files import LayerConfig, read_npz, write_npz
from ssm_metarl.linear import linear, to_real
from ssm_metarl.scan import scan
from ssm_metarl.ssm import (INITS, REAL_INITS, SSM, SSMConfig, discretise, eigenvalues, legs_eigenvalues, phi1)

torch.set_num_threads(1)
settings.register_profile('short', max_examples=25, deadline=None, derandomize=True)
settings.load_profile('short')


@pytest.fixture(params=['loop', 'blocks'], scope='module', autouse=True)
def path(request):
    "Every test runs twice: with the plain loop, and with blocks for all that is longer than two steps."
    usual, scan_module.LOOP_STEPS = scan_module.LOOP_STEPS, scan_module.LOOP_STEPS if request.param == 'loop' else 2
    yield
    scan_module.LOOP_STEPS = usual


seeds, inits, flags = st.integers(0, 2**20), st.sampled_from(INITS), st.booleans()


def random(seed, *shape, is_complex=False, dtype=torch.float64):
    x = np.random.default_rng(seed).standard_normal((2, *shape))
    x = torch.as_tensor(x[0] + 1j * x[1] if is_complex else x[0])
    return x.to(dtype.to_complex() if is_complex else dtype)


def chance(seed, p, *shape): return torch.from_numpy(np.random.default_rng([seed, 7]).random(shape) < p)


@st.composite
def problems(draw, dtype=torch.float64, max_T=12):
    "a, b, h0 and reset of any shape that `scan` takes."
    batch, T, N = draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(1, max_T)), draw(st.integers(1, 3))
    is_complex, seed = draw(flags), draw(seeds)
    a_shape = draw(st.sampled_from([(), (1,), (N,), (1, N), (T, 1), (T, N), (*batch, 1, N), (*batch, T, N)]))
    make = lambda i, *shape: random([seed, i], *shape, is_complex=is_complex, dtype=dtype)
    a = make(0, *a_shape)
    return a / a.abs().clamp(min=1), make(1, *batch, T, N), make(2, *batch, N), chance(seed, draw(st.sampled_from([0, .3, 1])), *batch, T)


def loop(a, b, h, reset):
    "The recurrence as the equation has it."
    a, states = a.expand(b.shape), []
    for t in range(b.shape[-2]):
        h = a[..., t, :] * torch.where(reset[..., t, None], 0, h) + b[..., t, :]
        states.append(h)
    return torch.stack(states, -2)


def layer(init, seed=0, dtype=torch.float32, N=6): return SSM(SSMConfig(3, N, 2, init=init), seed).to(dtype)


def parameters(module): return {k: v.detach() for k, v in module.named_parameters()}


def stack(modules): return {k: torch.stack([parameters(m)[k] for m in modules]) for k in parameters(modules[0])}


# --- scan

@given(problems())
def test_scan_is_the_loop(problem):
    a, b, h0, reset = problem
    torch.testing.assert_close(scan(a, b, h0, reset), loop(a, b, h0, reset))
    torch.testing.assert_close(scan(a, b), loop(a, b, torch.zeros_like(h0), torch.zeros_like(reset)))


@pytest.mark.parametrize('is_complex, tolerance', [(False, 2e-5), (True, 6e-5)])
@pytest.mark.parametrize('radius', [0, .5, .99, .99999])
@pytest.mark.parametrize('T, p', [(1, .5), (127, 0), (193, .05), (1024, .01), (4096, 0), (4096, .01)])
def test_scan_in_single_precision(is_complex, tolerance, radius, T, p):
    a, b, h0 = (random(i, *shape, is_complex=is_complex) for i, shape in enumerate([(4,), (3, T, 4), (3, 4)]))
    a, reset = radius * a / a.abs(), chance(0, p, 3, T)
    single = [x.to(torch.complex64 if is_complex else torch.float32) for x in (a, b, h0)]
    wide = [x.to(a.dtype) for x in single]  # the same numbers, so that only the arithmetic is judged
    true = loop(*wide, reset)
    assert (scan(*single, reset) - true).abs().max() < tolerance * true.abs().max()


@settings(max_examples=10)
@given(problems(max_T=4))
def test_scan_derivatives(problem):
    *inputs, reset = problem
    assume(inputs[1].numel())  # gradcheck refuses empty tensors
    inputs = [x.clone().requires_grad_() for x in inputs]
    f = lambda a, b, h0: scan(a, b, h0, reset)
    assert gradcheck(f, inputs) and gradgradcheck(f, inputs)


@settings(max_examples=10)
@given(problems(max_T=4))
def test_scan_derivatives_forwards(problem):
    "`jvp` against finite differences, and both mixed orders of second derivatives."
    *inputs, reset = problem
    assume(inputs[1].numel())
    inputs = [x.clone().requires_grad_() for x in inputs]
    f = lambda a, b, h0: scan(a, b, h0, reset)
    assert gradcheck(f, inputs, check_forward_ad=True) and gradgradcheck(f, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize('a_shape', [(), (2,), (1, 2), (4, 2), (3, 4, 2)])
def test_hessians_do_not_depend_on_the_way(a_shape):
    "Forwards over backwards, backwards over forwards and twice forwards give what twice backwards gives."
    inputs, reset = (random(0, *a_shape), random(1, 3, 4, 2), random(2, 3, 2)), chance(0, .3, 3, 4)
    energy = lambda *inputs: scan(*inputs, reset).pow(3).sum()
    for i in range(3):
        twice_backwards = jacrev(jacrev(energy, i), i)(*inputs)
        for way in (hessian(energy, i), jacrev(jacfwd(energy, i), i), jacfwd(jacfwd(energy, i), i)): torch.testing.assert_close(way(*inputs), twice_backwards)


@given(seeds, flags, *[st.sampled_from([None, 0])] * 3)
def test_forward_mode_under_vmap(seed, is_complex, a_dim, b_dim, h0_dim):
    "Tangents of mapped tasks are those of the tasks one by one, with the map outside and inside."
    if (a_dim, b_dim, h0_dim) == (None,) * 3: return
    M, B, T, N = 3, 2, 5, 2
    make = lambda i, *shape: random([seed, i], *shape, is_complex=is_complex)
    points, rates = ([make(10 * k, M, T, N), make(10 * k + 1, M, B, T, N), make(10 * k + 2, M, B, N)] for k in (0, 1))
    reset, dims = chance(seed, .3, B, T), (a_dim, b_dim, h0_dim)
    f = lambda *inputs: scan(*inputs, reset)
    pick = lambda values, m=0: tuple(x[0] if d is None else x[m] for x, d in zip(values, dims))
    args = lambda values: tuple(x[0] if d is None else x for x, d in zip(values, dims))
    outside = vmap(lambda x, v: jvp(f, x, v)[1], in_dims=(dims, dims))(args(points), args(rates))
    inside = jvp(vmap(f, in_dims=dims), args(points), args(rates))[1]
    for m in range(M):
        alone = jvp(f, pick(points, m), pick(rates, m))[1]
        torch.testing.assert_close(outside[m], alone), torch.testing.assert_close(inside[m], alone)


@given(problems(), st.integers(0, 11), st.sampled_from([torch.inf, -torch.inf, torch.nan]), flags)
def test_poisoned_past_forwards(problem, k, poison, poison_a):
    "Tangents after a reset, and derivatives of them, are the same whatever happened before it."
    a, b, h0, reset = problem
    a, k = a.expand(b.shape).clone(), min(k, b.shape[-2] - 1)
    reset[..., k] = True
    bad_a, bad_b = a.clone(), b.clone()
    bad_b[..., :k, :] = poison
    if poison_a: bad_a[..., :k, :] = poison
    rates = tuple(random(i, *x.shape, is_complex=x.is_complex()) for i, x in enumerate((a, b, h0)))
    late = lambda a, b, h0: to_real(scan(a, b, h0, reset)[..., k:, :].contiguous())
    rate = lambda *inputs: jvp(late, inputs, rates)[1]
    energy = lambda *inputs: late(*inputs).square().sum()
    both = (a, b, h0), (bad_a, bad_b, h0 * poison)
    clean, poisoned = (rate(*x) for x in both)
    assert torch.equal(clean, poisoned)
    for clean, poisoned in zip(*(jvp(grad(energy, (0, 1, 2)), x, rates)[1] for x in both)): assert torch.equal(clean, poisoned)
    for clean, poisoned in zip(*(grad(lambda *x: rate(*x).square().sum(), (0, 1, 2))(*x) for x in both)): assert torch.equal(clean, poisoned)


@given(problems(), st.integers(0, 12))
def test_scan_in_two_pieces(problem, k):
    a, b, h0, reset = problem
    a, k = a.expand(b.shape), min(k, b.shape[-2])
    first = scan(a[..., :k, :], b[..., :k, :], h0, reset[..., :k])
    second = scan(a[..., k:, :], b[..., k:, :], first[..., -1, :] if k else h0, reset[..., k:])
    torch.testing.assert_close(torch.cat([first, second], -2), scan(a, b, h0, reset))


@given(problems(), st.integers(0, 11), st.sampled_from([torch.inf, -torch.inf, torch.nan]), flags)
def test_poisoned_past(problem, k, poison, poison_a):
    "Whatever happened before a reset, values and gradients after it are the same, bit for bit."
    a, b, h0, reset = problem
    a, k = a.expand(b.shape).clone(), min(k, b.shape[-2] - 1)
    reset[..., k] = True
    bad_a, bad_b = a.clone(), b.clone()
    bad_b[..., :k, :] = poison
    if poison_a: bad_a[..., :k, :] = poison
    late = lambda a, b, h0: to_real(scan(a, b, h0, reset)[..., k:, :].contiguous()).square().sum()
    slope = grad(late, (0, 1, 2))
    assert torch.equal(scan(bad_a, bad_b, h0 * poison, reset)[..., k:, :], scan(a, b, h0, reset)[..., k:, :])
    for clean, poisoned in zip(slope(a, b, h0), slope(bad_a, bad_b, h0 * poison)): assert torch.equal(clean, poisoned)
    curvature = grad(lambda *x: sum(to_real(g.contiguous()).square().sum() for g in slope(*x)), (0, 1, 2))
    for clean, poisoned in zip(curvature(a, b, h0), curvature(bad_a, bad_b, h0 * poison)): assert torch.equal(clean, poisoned)


@given(seeds, flags, *[st.sampled_from([None, 0, 1])] * 2, *[st.sampled_from([None, 0])] * 2)
def test_scan_under_vmap(seed, is_complex, a_dim, b_dim, h0_dim, reset_dim):
    "Whichever arguments are mapped, and by whichever dimension: first derivatives as task by task."
    if (a_dim, b_dim, h0_dim, reset_dim) == (None,) * 4: return
    M, B, T, N = 3, 2, 5, 2
    make = lambda i, *shape: random([seed, i], *shape, is_complex=is_complex)
    tasks = make(0, M, T, N), make(1, M, B, T, N), make(2, M, B, N), chance(seed, .3, M, B, T)
    dims = a_dim, b_dim, h0_dim, reset_dim
    slope = grad(lambda a, b, h0, reset: to_real(scan(a, b, h0, reset).contiguous()).square().sum(), (0, 1, 2))
    mapped = vmap(slope, in_dims=dims)(*(x[0] if d is None else x.movedim(0, d) for x, d in zip(tasks, dims)))
    for m in range(M):
        alone = slope(*(x[0] if d is None else x[m] for x, d in zip(tasks, dims)))
        for whole, single in zip(mapped, alone): torch.testing.assert_close(whole[m], single)
    energy = lambda *inputs: to_real(vmap(scan, in_dims=dims)(*inputs, tasks[3][0] if reset_dim is None else tasks[3]).contiguous()).square().sum()
    outside = grad(energy, (0, 1, 2))(*(x[0] if d is None else x.movedim(0, d) for x, d in zip(tasks[:3], dims)))
    for whole, inside, d in zip(outside, mapped, dims): torch.testing.assert_close(whole, inside.sum(0) if d is None else inside.movedim(0, d))


def test_scan_under_two_vmaps():
    a, b = random(0, 2, 3, 4), random(1, 2, 3, 5, 4)
    torch.testing.assert_close(vmap(vmap(scan))(a, b), scan(a.unsqueeze(-2), b))


def test_stacked_layers_take_nothing_at_all():
    ssm, M = SSM(SSMConfig(3, 8, 2)), 2
    params = {k: v.detach().expand(M, *v.shape) for k, v in ssm.named_parameters()}
    assert ssm.functional(params, torch.zeros(M, 4, 0, 3))[0].shape == (M, 4, 0, 2) and ssm.functional(params, torch.zeros(M, 0, 5, 3))[0].shape == (M, 0, 5, 2)


def test_types_of_all_three_count():
    assert scan(torch.tensor(1), torch.zeros(2, 1, dtype=torch.long), torch.tensor([.5])).tolist() == [[.5], [.5]]


@pytest.mark.parametrize('varying', [False, True])
def test_memory_kept_for_backward(varying):
    a, b = random(0, *((2, 400, 4) if varying else (4,))).requires_grad_(), random(1, 2, 400, 4).requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        scan(a, b, random(2, 2, 4), chance(0, .1, 2, 400))
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) <= 2.5 * b.nbytes


def test_scan_errors_and_empty():
    b = torch.zeros(2, 5, 3)
    for wrong, words in ((dict(reset=torch.zeros(2, 5)), 'must be torch.bool'), (dict(reset=torch.zeros(5, dtype=torch.bool)), r'\[2, 5\]'),
                         (dict(h0=torch.zeros(3)), r'h0 is \[3\]; it must be \[2, 3\]')):
        with pytest.raises(ValueError, match=words): scan(torch.ones(3), b, **wrong)
    for shape in ((4,), (4, 3), (1, 2, 5, 3)):
        with pytest.raises(ValueError, match='must broadcast to b'): scan(torch.ones(shape), b)
    assert scan(torch.ones(3), b[:, :0]).shape == (2, 0, 3) and scan(torch.ones(3), b[:0]).shape == (0, 5, 3)
    assert scan(torch.ones(3), b, torch.ones(2, 3) * 1j).dtype == torch.complex64


# --- discretisation

@given(st.floats(-30, 0), st.floats(-30, 30), st.floats(-8, 0))
def test_phi1(u, v, magnitude):
    x = (u + 1j * v) * 10**magnitude
    true = expm([[x, 1], [0, 0]])[0, 1]
    assert abs(phi1(torch.tensor(x, dtype=torch.complex128)).item() - true) < 1e-11
    assert abs(phi1(torch.tensor(x, dtype=torch.complex64)).item() - true) < 1e-5
    assert abs(phi1(torch.tensor(x.real, dtype=torch.float64)).item() - expm([[x.real, 1], [0, 0]])[0, 1]) < 1e-11


def test_phi1_derivatives():
    x = torch.tensor([0, -1e-3, .00999j, -.0101, -2 + 3j], dtype=torch.complex128, requires_grad=True)
    assert gradcheck(phi1, x) and gradgradcheck(phi1, x)
    small = torch.tensor([-1e-2, -1e-4, -1e-6])
    torch.testing.assert_close(vmap(grad(phi1))(small), .5 + small / 3, atol=2e-5, rtol=0)  # in float32, where slow modes live


@given(seeds, st.floats(-4, 0))
def test_zero_order_hold(seed, log_dt):
    "exp of the block matrix [[A, B], [0, 0]] dt holds A_bar and B_bar."
    params = {k: v.double() for k, v in parameters(layer('legs', seed)).items()}
    params['log_dt'] = torch.full_like(params['log_dt'], log_dt)
    as_block = lambda z: np.array([[z.real, -z.imag], [z.imag, z.real]])
    A, B = block_diag(*map(as_block, eigenvalues(params).numpy())), torch.stack([params['B_real'], params['B_imag']], 1).flatten(0, 1).numpy()
    both, ours = expm(np.block([[A, B], [np.zeros((3, 9))]]) * np.exp(log_dt))[:6], discretise(params)
    np.testing.assert_allclose(both[:, :6], block_diag(*map(as_block, ours.A_bar.numpy())), atol=1e-11)
    np.testing.assert_allclose(both[:, 6:], ours.W_in.mT.numpy(), atol=1e-11)


@given(inits, *[st.floats(-15, 5)] * 2, st.floats(-1e3, 1e3))
def test_always_stable(init, log_decay, log_dt, frequency):
    params = parameters(layer(init)) | dict(log_decay=torch.full((6,), log_decay), log_dt=torch.full((6,), log_dt))
    if init not in REAL_INITS: params['frequency'] = torch.full((6,), frequency)
    assert (eigenvalues(params).real < 0).all()
    params = {k: v.double() for k, v in params.items() if k in ('log_decay', 'log_dt', 'frequency')}
    assert ((eigenvalues(params) * params['log_dt'].exp()).exp().abs() < 1).all()


@pytest.mark.parametrize('P', [1, 2, 16, 64])
def test_legs_eigenvalues(P):
    lam = legs_eigenvalues(P)
    assert (lam.real == -.5).all() and (lam.imag > 0).all() and (np.diff(lam.imag) > 0).all()


# --- the layer

@given(inits, seeds, st.integers(0, 3), st.integers(1, 9), flags)
def test_step_equals_sequence(init, seed, B, T, given_state):
    ssm, x, reset = layer(init, seed), random(seed, B, T, 3, dtype=torch.float32), chance(seed, .3, B, T)
    start = random([seed, 1], *ssm.initial_state(B).shape, is_complex=init not in REAL_INITS, dtype=torch.float32) if given_state else None
    y, last = ssm(x, start, reset)
    step, state, features = ssm.stepper(), ssm.initial_state(B) if start is None else start, ssm.extract_features(x, start, reset)
    assert (y.shape, features.shape, last.shape) == ((B, T, 2), (B, T, 6), (B, ssm.config.modes))
    for t in range(T):
        y_t, next_state = step(x[:, t], state, reset[:, t])
        same, same_state = ssm(x[:, t], state, reset[:, t])
        assert torch.equal(same, y_t) and torch.equal(same_state, next_state)
        state = next_state
        torch.testing.assert_close(y_t, y[:, t], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(to_real(state), features[:, t], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('init', INITS)
def test_the_equations(init):
    "h_t = A_bar h_{t-1} + B_bar u_t, y_t = 2 Re(C h_t) + D u_t, or C h_t + D u_t with real modes, from the public properties."
    ssm, u, h = layer(init, dtype=torch.float64), random(0, 1, 5, 3), 0
    for t in range(5):
        h = ssm.A_bar * h + ssm.B_bar @ u[0, t].to(ssm.B_bar.dtype)
        y = ssm.C @ h if init in REAL_INITS else 2 * (ssm.C @ h).real
        torch.testing.assert_close(ssm(u)[0][0, t], y + ssm.D @ u[0, t])


@given(inits, seeds, st.integers(0, 8))
def test_state_carries_the_past(init, seed, k):
    ssm, x = layer(init, seed), random(seed, 2, 8, 3, dtype=torch.float32)
    first, state = ssm(x[:, :k])
    second, last = ssm(x[:, k:], state)
    whole, whole_last = ssm(x)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, whole_last, atol=1e-5, rtol=1e-5)


@given(inits, seeds, st.integers(0, 7))
def test_reset_is_a_fresh_start(init, seed, k):
    ssm, x = layer(init, seed), random(seed, 2, 8, 3, dtype=torch.float32)
    start = ssm.initial_state(2) + (0 if k else torch.inf)
    y, _ = ssm(x, start, (torch.arange(8) == k).expand(2, 8))
    torch.testing.assert_close(y[:, k:], ssm(x[:, k:])[0], atol=1e-6, rtol=1e-6)
    slopes = torch.autograd.grad(y.square().sum(), ssm.parameters())
    assert all(g.isfinite().all() for g in slopes)


@settings(max_examples=10)
@given(inits, seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6))
def test_stacked_is_task_by_task(init, seed, M, K, T):
    modules, u, reset = [layer(init, seed + m, torch.float64) for m in range(M)], random(seed, M, K, T, 3), chance(seed, .3, M, K, T)
    f, stacked = modules[0].functional, stack(modules)
    loss = lambda params, u, reset: f(params, u, reset=reset)[0].square().sum()
    after_step = lambda *x: loss({k: v - .01 * grad(loss)(*x)[k] for k, v in x[0].items()}, *x[1:])
    y, state = f(stacked, u, reset=reset)
    step_y, step_state = modules[0].stepper(stacked)(u[:, :, 0], modules[0].initial_state(M, K), reset[:, :, 0])
    torch.testing.assert_close(step_y, y[:, :, 0])
    together, mapped = grad(loss)(stacked, u, reset), vmap(grad(after_step))(stacked, u, reset)
    for m, module in enumerate(modules):
        alone = parameters(module), u[m], reset[m]
        single, last = module(u[m], reset=reset[m])
        torch.testing.assert_close(y[m], single.detach())
        torch.testing.assert_close(state[m], last.detach())
        for k, v in grad(loss)(*alone).items(): torch.testing.assert_close(together[k][m], v)
        for k, v in grad(after_step)(*alone).items(): torch.testing.assert_close(mapped[k][m], v)


@pytest.mark.parametrize('D, H', [(3, 3), (1, 1), (3, 2), (1, 4)])
@pytest.mark.parametrize('shape', [(), (2,), (2, 0), (2, 3)])
def test_a_weight_for_each_task_entry_by_entry(D, H, shape):
    "Square weights as well: there a weight that is turned round has the right shape, and wrong values."
    M = 3
    x, weight, bias = random(1, M, *shape, D), random(2, M, H, D), random(3, M, H)
    if not shape: x = x.unsqueeze(1)
    flat = x.reshape(M, -1, D)
    def sums(b): return torch.tensor([[[sum(float(w * v) for w, v in zip(weight[m, h], row)) + float(b[m, h]) for h in range(H)] for row in flat[m]]
                                      for m in range(M)], dtype=torch.float64).reshape(*x.shape[:-1], H)
    torch.testing.assert_close(linear(x, weight, bias), sums(bias))
    torch.testing.assert_close(linear(x, weight), sums(torch.zeros_like(bias)))
    for m in range(M): torch.testing.assert_close(linear(x[m], weight[m], bias[m]), sums(bias)[m])


@pytest.mark.parametrize('init', INITS)
def test_layer_derivatives(init):
    ssm = layer(init, dtype=torch.float64, N=4)
    names, values = zip(*ssm.named_parameters())
    reset = torch.tensor([[False, False, True]])
    f = lambda u, state, *values: ssm.functional(dict(zip(names, values)), u, torch.view_as_complex(state) if init not in REAL_INITS else state[..., 0], reset)[0]
    inputs = [x.detach().requires_grad_() for x in (random(0, 1, 3, 3), random(1, 1, ssm.config.modes, 2), *values)]
    assert gradcheck(f, inputs) and gradgradcheck(f, inputs)


@pytest.mark.parametrize('init', INITS)
def test_a_module_like_any_other(init):
    "dtype follows the module; functional_call sees new parameters; copies and state_dict work; no global random state is touched."
    before, x = torch.random.get_rng_state(), random(0, 2, 4, 3)
    ssm, other = layer(init, 0, torch.float64), layer(init, 1, torch.float64)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ssm(x)[0].dtype == torch.float64 and ssm.initial_state(2).dtype == (torch.float64 if init in REAL_INITS else torch.complex128)
    assert torch.equal(functional_call(ssm, parameters(other), (x,))[0], other(x)[0])
    assert torch.equal(copy.deepcopy(ssm)(x)[0], ssm(x)[0]) and not torch.equal(other(x)[0], ssm(x)[0])
    other.load_state_dict(ssm.state_dict())
    assert torch.equal(other(x)[0], ssm(x)[0])
    assert ssm.A.shape == ssm.dt.shape == ssm.A_bar.shape == (ssm.config.modes,) and ssm.B_bar.shape == ssm.B.shape == (ssm.config.modes, 3)
    assert ssm.C.shape == (2, ssm.config.modes)


def test_layer_errors():
    ssm = layer('lru')
    for call in (lambda: ssm(torch.zeros(2, 4, 5)), lambda: ssm(torch.zeros(3)), lambda: ssm(torch.zeros(2, 4, 3), ssm.initial_state(3)),
                 lambda: ssm(torch.zeros(2, 4, 3), reset=torch.zeros(2, 4)), lambda: ssm(torch.zeros(2, 3), reset=torch.zeros(2, 1, dtype=torch.bool)),
                 lambda: ssm.functional(stack([ssm, ssm]), torch.zeros(3, 2, 4, 3)), lambda: ssm.functional(parameters(ssm), torch.zeros(3)),
                 lambda: linear(torch.zeros(4, 3), torch.zeros(2, 5, 3)), lambda: ssm.set_parameters(parameters(layer('real'))),
                 lambda: ssm.set_parameters(parameters(layer('lru', N=8)))):
        with pytest.raises(ValueError): call()


@pytest.mark.parametrize('wrong', [dict(init='hipo'), dict(state_dim=7), dict(state_dim=0), dict(input_dim=-1), dict(output_dim=2.), dict(dt_min=0), dict(dt_max=-1.),
                                   dict(dt_min=1., dt_max=.1), dict(dt_max=float('nan'))])
def test_config_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): SSMConfig(**dict(input_dim=3) | wrong)


VALUES = [1, 2.5, -1, 0, True, False, None, 'lru', '8', 1j, np.int64(2), np.float32(.5), np.bool_(True), np.str_('real'), np.array([2]), torch.tensor(2), torch.inf, float('nan'),
          fractions.Fraction(1, 10), decimal.Decimal('.05'), [1], (1,), {'a': 1}, b'lru', object(), 'legs']


@pytest.mark.parametrize('kind', [LayerConfig, SSMConfig, SSMStackConfig])
def test_what_a_config_accepts_can_be_saved(kind):
    "Any value in any field: refused in one line of ValueError, or equal to itself after JSON, which knows no NaN."
    accepted = 0
    for f in fields(kind):
        for value in VALUES:
            try: config = kind(**dict(input_dim=4, output_dim=4) | {f.name: value})
            except ValueError as error: assert '\n' not in str(error) and len(str(error)) < 300
            else:
                accepted += 1
                assert kind(**json.loads(json.dumps(asdict(config), allow_nan=False))) == config
                assert not (isinstance(value, bool) and f.type is int), f'{f.name}={value}'
    assert accepted > len(fields(kind))


def test_step_sizes_that_an_init_ignores_are_refused():
    with pytest.raises(ValueError, match='dt_min=0.01.*ignores them'): SSMConfig(3, dt_min=.01)
    assert SSMConfig(3, init='legs', dt_min=.01).dt_min == .01


@pytest.mark.parametrize('init', ['lru', 'real'])
def test_decays_in_float32_whatever_the_weights(init):
    "bfloat16 rounds 0.999 to 1: as dynamics, that is a memory that never fades."
    wide = SSM(SSMConfig(3, 8, 2, init=init), 1)
    for weights in (torch.bfloat16, torch.float16):
        low = SSM(wide.config, 1).to(weights)
        rounded = SSM(wide.config, 1)
        rounded.load_state_dict(low.state_dict())
        assert torch.equal(low.A_bar, rounded.A_bar) and low.A_bar.dtype == (torch.float32 if init == 'real' else torch.complex64)
        x = random(0, 2, 400, 3, dtype=weights)
        y, state = low(x)
        y_rounded, state_rounded = rounded(x.float())
        assert y.dtype == weights and state.dtype == low.initial_state(2).dtype == low.A_bar.dtype
        torch.testing.assert_close(to_real(state), to_real(state_rounded), rtol=.03, atol=.05)
        torch.testing.assert_close(y.float(), y_rounded, rtol=.05, atol=.1)
        assert all(g.isfinite().all() and g.dtype == weights for g in torch.autograd.grad(y.square().sum(), low.parameters()))


def test_bfloat16_does_not_go_to_a_file(tmp_path):
    with pytest.raises(ValueError, match='is torch.bfloat16, which NumPy does not know; call .float()'): layer('lru', dtype=torch.bfloat16).save(tmp_path / 'x.npz')
    layer('lru', dtype=torch.float16).save(tmp_path / 'x.npz')
    assert SSM.load(tmp_path / 'x.npz').D.dtype == torch.float16


# --- files

def test_arrays_of_parameters_are_copies():
    "What was taken before a step of training is what it was then, and to write into it changes no module."
    ssm = layer('lru')
    taken, same = ssm.get_parameters(), ssm.get_parameters()
    with torch.no_grad():
        for p in ssm.parameters(): p.add_(1)
    for k, v in parameters(ssm).items():
        np.testing.assert_array_equal(taken[k], same[k])
        np.testing.assert_allclose(v.numpy() - taken[k], 1, atol=1e-6)
    ssm.set_parameters(taken)
    for v in taken.values(): v[...] = np.nan
    for k, v in parameters(ssm).items(): np.testing.assert_array_equal(v.numpy(), same[k])


@settings(max_examples=15)
@given(inits, seeds, st.sampled_from([torch.float32, torch.float64]), *[st.integers(1, 4)] * 3)
def test_save_and_load(tmp_path_factory, init, seed, dtype, D, half, H):
    path = tmp_path_factory.mktemp('ssm') / 'new folder' / 'a layer'  # no suffix: saved under the name that was given
    ssm = SSM(SSMConfig(D, 2 * half, H, init=init, discretisation='bilinear'), seed).to(dtype)
    ssm.save(path)
    loaded = SSM.load(path)
    assert asdict(loaded.config) == asdict(ssm.config) and os.listdir(path.parent) == ['a layer']
    assert all(torch.equal(v, parameters(ssm)[k]) and v.dtype == dtype for k, v in parameters(loaded).items())


@settings(max_examples=60)
@given(st.data())
def test_damaged_files(tmp_path_factory, data):
    "Cut or altered anywhere: one line of ValueError, or, where it does no harm, the same layer."
    path, ssm = tmp_path_factory.mktemp('damaged') / 'ssm.npz', layer('lru')
    ssm.save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(flags): content = content[:place]
    else: content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try: loaded = SSM.load(path)
    except ValueError as error: assert str(path) in str(error) and '\n' not in str(error)
    else: assert loaded.config == ssm.config and all(torch.equal(v, parameters(ssm)[k]) for k, v in parameters(loaded).items())


def test_foreign_files(tmp_path):
    path, ssm = tmp_path / 'x.npz', layer('lru')
    header = dict(format=SSM.format, format_version=1, config=asdict(ssm.config))
    def refused(words):
        with pytest.raises(ValueError, match=words) as info: SSM.load(path)
        assert '\n' not in str(info.value)
    refused('does not exist')
    path.write_text('hello')
    refused('damaged')
    np.save(path.with_suffix('.npy'), np.zeros(3))
    path.write_bytes(path.with_suffix('.npy').read_bytes())
    refused('damaged')
    np.savez(path, header=np.array(json.dumps(header), dtype=object), **ssm.get_parameters())  # needs pickle
    refused('damaged')
    np.savez(path, x=np.zeros(3))
    refused('damaged')
    write_npz(path, header | dict(format='other'), {})
    refused("holds 'other'")
    write_npz(path, header | dict(format_version=2), {})
    refused('format_version 2')
    write_npz(path, header | dict(config=dict(size=3)), ssm.get_parameters())
    refused('does not describe a SSM')
    write_npz(path, header, {k: v for k, v in ssm.get_parameters().items() if k != 'C_real'})
    refused('does not describe a SSM')
    write_npz(path, header, ssm.get_parameters() | dict(D=np.zeros((5, 5), np.float32)))
    refused('D is ')


def test_a_failed_save_harms_nothing(tmp_path, monkeypatch):
    path, ssm = tmp_path / 'ssm.npz', layer('lru')
    ssm.save(path)
    content = path.read_bytes()
    def power_cut(*_): raise OSError('no more power')
    monkeypatch.setattr(os, 'replace', power_cut)
    with pytest.raises(OSError, match='power'): layer('lru', seed=1).save(path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ['ssm.npz']
    assert read_npz(path, SSM.format, 1)[0]['config'] == asdict(ssm.config)


def test_self_check_as_a_program():
    done = subprocess.run([sys.executable, '-m', 'ssm_metarl.ssm'], capture_output=True, text=True)
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == ['ok'] * 5, done.stderr


def test_a_notebook_that_defines_the_scan_again_leaves_the_librarys_alone():
    "A kernel that runs the cells of the notebook registers its own operation; the library's must not become that one."
    from pathlib import Path

    from torch.fx.experimental.proxy_tensor import make_fx
    b = torch.randn(2, 5, 3)
    traced = lambda f: make_fx(lambda b: f(torch.tensor(.5), b), tracing_mode='fake')(b)(b)
    cells = json.loads((Path(__file__).parent.parent / 'nbs' / '00_scan.ipynb').read_text(encoding='utf-8'))['cells']
    kernel = {'__name__': '__main__'}
    for source in (''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code'):
        if source.startswith('#| export'): exec(source, kernel)
    torch.testing.assert_close(traced(kernel['scan']), scan(torch.tensor(.5), b))
    kernel.clear()  # the kernel ends
    torch.testing.assert_close(traced(scan), scan(torch.tensor(.5), b))
