"""Speed of the SSM core, as ratios to PyTorch's GRU measured in the same run (below 1: the SSM is faster).

python benchmarks/ssm.py                         all rows
python benchmarks/ssm.py forward step            only rows whose name contains one of these words
python benchmarks/ssm.py --json FILE             also write {"rows": [{"name", "ratio", "peer", "ms"}]}
python benchmarks/ssm.py --device cuda           on a GPU

Layer: 64 features in and out, 64 real numbers of state, resets in 2 % of all steps; one CPU thread. Single steps also with a diagonal D, as S4 and S5 have it. The peers s5-pytorch and mambapy are measured where they
are installed (pip install -e '.[bench]'): they have no resets, so ours runs without resets against them, and against mambapy only with real modes.
"""
import argparse
import importlib.util

import torch
from paired import paired, write_rows
from torch import nn
from torch.func import functional_call

from ssm_metarl.scan import scan
from ssm_metarl.ssm import SSM, SSMConfig

D = N = 64


def derivative(model, *inputs): return torch.autograd.grad(model(*inputs)[0].square().mean(), list(model.parameters()))


def second_derivative(model, *inputs):
    first = torch.autograd.grad(model(*inputs)[0].square().mean(), list(model.parameters()), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), list(model.parameters()))


@torch.no_grad()
def forward(model, *inputs): return model(*inputs)


def sequences(device, init):
    "Rows (name, ours, peer's name, peer) for whole sequences."
    ssm, gru = SSM(SSMConfig(D, N, D, init=init)).to(device), nn.GRU(D, N, batch_first=True).to(device)
    for B, T in ((64, 128), (16, 1024), (8, 4096)):
        x, reset = torch.randn(B, T, D, device=device), torch.rand(B, T, device=device) < .02
        for name, f in (('forward', forward), ('forward + backward', derivative), ('forward + double backward', second_derivative)):
            if name.endswith('double backward') and (T > 1024 or device != 'cpu'): continue  # cuDNN has no second derivative
            yield f'{name} {B}x{T} ({init})', lambda f=f, x=x, r=reset: f(ssm, x, None, r), 'nn.GRU', lambda f=f, x=x: f(gru, x)


def steps(device, init, n=50):
    "Rows for single steps, as in a rollout: n in a row."
    for B, feedthrough in ((B, feedthrough) for B in (1, 64, 256) for feedthrough in ('full', 'diagonal')):
        ssm, cell = SSM(SSMConfig(D, N, D, init=init, feedthrough=feedthrough)).to(device), nn.GRUCell(D, N).to(device)
        step = ssm.stepper()
        u, h, state, reset = torch.randn(B, D, device=device), torch.zeros(B, N, device=device), ssm.initial_state(B), torch.rand(B, device=device) < .02
        @torch.no_grad()
        def ours(step=step, u=u, state=state, reset=reset):
            for _ in range(n): y, state = step(u, state, reset)
        @torch.no_grad()
        def peer(cell=cell, u=u, h=h):
            for _ in range(n): h = cell(u, h)
        yield f'{n} steps B={B} ({init}, D {feedthrough})', ours, 'nn.GRUCell', peer


def through_a_step(device, init, M=8, B=8, T=128):
    "Row for the gradient through an inner gradient step, M tasks stacked against a loop over tasks."
    if device != 'cpu': return
    ssm, gru, x = SSM(SSMConfig(D, N, D, init=init)), nn.GRU(D, N, batch_first=True), torch.randn(M, B, T, D)
    theta = {k: v.detach().expand(M, *v.shape).clone().requires_grad_() for k, v in ssm.named_parameters()}
    start = {k: v.detach().clone().requires_grad_() for k, v in gru.named_parameters()}
    def meta_gradient(params, loss):
        slopes = torch.autograd.grad(loss(params).sum(), list(params.values()), create_graph=True)
        return torch.autograd.grad(loss({k: v - .1 * g for (k, v), g in zip(params.items(), slopes)}).sum(), list(params.values()))
    ours = lambda: meta_gradient(theta, lambda p: ssm.functional(p, x)[0].square().mean((1, 2, 3)))
    peer = lambda: [meta_gradient(start, lambda p, m=m: functional_call(gru, p, (x[m],))[0].square().mean()) for m in range(M)]
    yield f'gradient through a gradient step, {M} tasks ({init})', ours, 'nn.GRU, task by task', peer


def other_libraries(device):
    "Rows against scans of other libraries, without resets, forward and backward."
    for B, T in ((64, 128), (16, 1024)):
        if importlib.util.find_spec('s5'):
            from s5 import S5
            ssm, s5, x = SSM(SSMConfig(D, N, D)).to(device), S5(D, N).to(device), torch.randn(B, T, D, device=device)
            def layer(x, s5=s5): return s5(x), None
            layer.parameters = lambda s5=s5: [p for p in s5.parameters() if p.requires_grad]
            yield f'layer, forward + backward {B}x{T}', lambda x=x, m=ssm: derivative(m, x), 's5-pytorch', lambda x=x: derivative(layer, x)
        if importlib.util.find_spec('mambapy'):
            from mambapy.pscan import pscan
            a, b = torch.rand(B, T, N, 1, device=device).requires_grad_(), torch.randn(B, T, N, 1, device=device).requires_grad_()
            gradient = lambda f: torch.autograd.grad(f(a, b).square().sum(), [a, b])
            yield f'real scan, forward + backward {B}x{T}', lambda a=a, b=b: gradient(lambda *_: scan(a[..., 0], b[..., 0])), 'mambapy', lambda a=a, b=b: gradient(pscan)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', help='only rows whose name contains one of them')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    wait = torch.cuda.synchronize if args.device.startswith('cuda') else lambda: None
    rows = []
    sources = [f(args.device, init) for init in ('lru', 'real') for f in (sequences, steps, through_a_step)] + [other_libraries(args.device)]
    for name, ours, peer_name, peer in (row for source in sources for row in source):
        if args.words and not any(word in name for word in args.words): continue
        ratio, ms = paired(ours, peer, args.repeats, wait)
        rows.append(dict(name=name, ratio=round(ratio, 4), peer=peer_name, ms=round(ms, 3)))
        print(f'{name:58} {ratio:6.3f} of {peer_name:22} {ms:9.2f} ms', flush=True)
    write_rows(rows, args.json)


if __name__ == '__main__': main()
