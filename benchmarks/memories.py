"""Which memory for which task: every candidate is tuned alike, then trained with five seeds that the tuning did not use.

python benchmarks/memories.py inits  --json benchmarks/results/memory-inits.json    notebook 00a: eigenvalues at the start
python benchmarks/memories.py tasks  --json benchmarks/results/memory-tasks.json    notebook 00a: stack, selective stack and GRU
python benchmarks/memories.py recall --json benchmarks/results/memory-recall.json   notebook 00b: means under keys
python benchmarks/memories.py tasks copy                                            only rows whose name contains one of these words

Tuning: two runs of each setting, with seeds 100 and 101. Results: seeds 0 to 4 with the best setting of each candidate. One CPU thread; about 40 minutes in all.
"""
import argparse
import json
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ssm_metarl.cores import GRU, H3, CoreNetwork, TwoLayers, keyed_mean_task
from ssm_metarl.memory import SSMStack, SSMStackConfig, delay_task, first_symbol_task, selective_copy_task, train_memory
from ssm_metarl.ssm import INITS, SSM, SSMConfig

SEEDS, TUNING_SEEDS, LAST = range(5), (100, 101), 20


def end(record):
    "Error or accuracy at the end of training, on batches that were fresh when they came."
    return float(np.mean(record[-LAST:]))


def thinned(record):
    "Means of 20 steps in a row."
    return np.reshape(record[:len(record) // LAST * LAST], (-1, LAST)).mean(1).round(5).tolist()


def count(model): return sum(p.numel() for p in model.parameters())


def tuned(make, task, steps, settings, better=min):
    "One candidate: make(setting, seed) twice for each setting, then the best setting with the seeds that count."
    def run(setting, seed): return train_memory(make(setting, seed), task, steps, setting['lr'], seed)
    tried = [setting | dict(end=float(np.mean([end(run(setting, seed)) for seed in TUNING_SEEDS]))) for setting in settings]
    best = settings[tried.index(better(tried, key=lambda row: row['end']))]
    records = [run(best, seed) for seed in SEEDS]
    return dict(parameters=count(make(best, 0)), steps=steps, tried=tried, best=best,
                end=[end(record) for record in records], curves=[thinned(record) for record in records])


def step_times(cases, rounds=10, steps=4):
    "Milliseconds of one training step, measured in turns, so that a busy machine slows all alike: name -> median over rounds."
    times = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (make, task, _, settings, *_) in cases.items():
            model, start = make(settings[0], 0), time.process_time()
            train_memory(model, task, steps)
            times[name].append(1e3 * (time.process_time() - start) / steps)
    return {name: round(float(np.median(ms)), 2) for name, ms in times.items()}


def layer(setting, seed, init):
    "One SSM layer; dt None: the range of the papers, .001 to .1."
    dt = {} if setting['dt'] is None else dict(dt_min=setting['dt'], dt_max=setting['dt'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that fast modes get a shorter dt
        return SSM(SSMConfig(1, 64, 1, init, **dt), seed)


def inits():
    "One layer has to give back its input of `lag` steps ago."
    lrs, dts = (.003, .01, .03, .1), (None, .003, .01, .03, .1, .3)
    for lag in (32, 10):
        for init in INITS:
            steps = (None,) if init in ('lru', 'real') else dts  # these two count in steps and have no dt
            settings = [dict(dt=dt, lr=lr) for dt in steps for lr in lrs]
            yield f'lag {lag}: {init}', partial(layer, init=init), partial(delay_task, T=128, lag=lag), 250, settings, min


class TorchGRU(nn.Module):
    "Two layers of PyTorch's own, which takes no reset."

    def __init__(self, input_dim, output_dim, width, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.cell = nn.GRU(input_dim, width, num_layers=2, batch_first=True)
            self.out = nn.Linear(width, output_dim)

    def forward(self, x, reset=None): return self.out(self.cell(x)[0]), None


def stack(setting, seed, D, H, selective): return SSMStack(SSMStackConfig(D, H, 32, 2, 32, selective=selective), seed)


def torch_gru(setting, seed, D, H): return TorchGRU(D, H, 33, seed)  # 33: about as many parameters as the stack


def tasks():
    "Three tasks, three memories of two layers each."
    settings = [dict(lr=lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2)]
    for name, task, sizes, steps, better in (('selective copy', selective_copy_task, (6, 4), 1500, max),
                                             ('first symbol', first_symbol_task, (6, 4), 400, max), ('delay', delay_task, (1, 1), 600, min)):
        D, H = sizes
        yield f'{name}: stack', partial(stack, D=D, H=H, selective=False), task, steps, settings, better
        yield f'{name}: selective stack', partial(stack, D=D, H=H, selective=True), task, steps, settings, better
        yield f'{name}: GRU', partial(torch_gru, D=D, H=H), task, steps, settings, better


def network(setting, seed, core, N): return CoreNetwork(core(SSMConfig(32, N, 32), seed), 9, seed=seed)


def recall():
    "Means under eight keys: the same network around each memory."
    for name, core, N in (('one SSM layer', SSM, 64), ('two SSM layers', TwoLayers, 64), ('GRU', GRU, 64), ('H3', H3, 8)):
        yield name, partial(network, core=core, N=N), keyed_mean_task, 1000, [dict(lr=lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2)], min


def stored(path): return json.loads(path.read_text())['rows'] if path and path.exists() else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['inits', 'tasks', 'recall'])
    parser.add_argument('words', nargs='*', help='only rows whose name contains one of them')
    parser.add_argument('--json', metavar='FILE', type=Path, help='rows that it has already are kept, unless measured again')
    parser.add_argument('--times', action='store_true', help='only measure the times of rows that FILE has')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, cases = stored(args.json), {name: case for name, *case in dict(inits=inits, tasks=tasks, recall=recall)[args.what]()}
    for name, case in cases.items():
        if args.times or args.words and not any(word in name for word in args.words): continue
        rows[name] = row = tuned(*case)
        print(f'{name:32} {row["parameters"]:6} parameters, best {row["best"]}: ' + '  '.join(f'{e:.4f}' for e in row['end']), flush=True)
        write(args, rows)
    for name, ms in step_times({name: case for name, case in cases.items() if name in rows}).items():
        rows[name]['ms'] = ms
        print(f'{name:32} {ms:6.2f} ms a step')
    write(args, rows)


def write(args, rows):
    if args.json: args.json.write_text(json.dumps(dict(command=f'python benchmarks/memories.py {args.what}', torch=torch.__version__, rows=rows), indent=1))


if __name__ == '__main__': main()
