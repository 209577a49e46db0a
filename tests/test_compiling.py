"What notebook 03d promises, without the compiler: what is traced, cut and kept."
import pytest
import torch

from ssm_metarl.compiling import Compiled, CompiledStepper, split, trace

torch.set_num_threads(1)


def operations(graph): return [str(x.target) for x in graph.graph.nodes if x.op == 'call_function']


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(W, x): return [(W @ W).tanh() @ x + W.tanh()]


def after_a_step(theta, x):
    theta = theta.detach().requires_grad_()
    slope, = torch.autograd.grad((theta * x).sin().sum(), theta, create_graph=True)
    return torch.autograd.grad((theta - .3 * slope).square().sum(), theta)[0]


def test_a_traced_gradient_through_a_step_is_of_second_order():
    traced, theta, x = Compiled(after_a_step, 'eager'), normal(4), normal(4, seed=1)
    for scale in (1, 2): torch.testing.assert_close(traced(scale * theta, x), after_a_step(scale * theta, x))
    first = 2 * (theta - .3 * x * (theta * x).cos())
    assert (traced(theta, x) - first).norm() > .01 * first.norm()
    assert not traced(theta, x).requires_grad and len(traced.graphs) == 1
    traced(theta[:2], x[:2])
    assert len(traced.graphs) == 2
    with pytest.raises(ValueError, match='arguments: 1.0 is not a tensor'): traced(theta, 1.)


def test_what_stays_is_early_and_both_parts_give_the_whole():
    W, x = normal(4, 4), normal(4, 4, seed=1)
    early, late = split(trace(example, W, x), 1)
    assert [len(operations(part)) for part in (early, late)] == [3, 2]
    for v in (x, x.flip(0)): torch.testing.assert_close(late(*early(W), v), example(W, v))
    torch.testing.assert_close(split(trace(lambda W, x: [W * 2, x], W, x), 1)[1](W * 2, x), [W * 2, x])


@pytest.mark.parametrize('f, words', [(lambda W, x: [W.clone().add_(x)], 'aten.add_.Tensor changes a tensor in place'),
                                      (lambda W, x: [x + torch.randn(4, 4)], 'draws random numbers')])
def test_what_cannot_be_cut(f, words):
    with pytest.raises(ValueError, match=words): split(trace(f, normal(4, 4), normal(4, 4)), 1)


def test_steps_under_parameters_in_any_order_of_any_type_and_as_they_were():
    toy = CompiledStepper(lambda p: lambda x, y=None: {'out': p['a'] * x + p['b']}, 'eager')
    one, two = torch.ones(2), 2 * torch.ones(2)
    for params in ({'a': 5 * one, 'b': two}, {'b': two, 'a': 5 * one}):
        for x in (two, two.double(), two.int()): torch.testing.assert_close(toy(params)(x)['out'].float(), 12 * one)
    before = toy(params)
    params['a'].add_(1)
    torch.testing.assert_close(before(one)['out'], 7 * one)
    with pytest.raises(ValueError, match='arguments of a step: None is not a tensor'): before(None, one)
    with pytest.raises(ValueError, match='results of a step: 1 is not a tensor'): CompiledStepper(lambda p: lambda x: [x, 1], 'eager')(params)(one)
