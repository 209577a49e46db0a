"""How much faster are two processes than one? Time of an outer step that two ranks share, as a ratio to the same step in one process (below 1: two are faster; 0.5 would be perfect).

python benchmarks/ranks.py                     all rows
python benchmarks/ranks.py rl2                 only rows whose name contains one of these words
python benchmarks/ranks.py --json FILE         also write {"ranks", "load", "cores", "rows": [{"name", "ratio", "peer", "ms", "speed_up", "cpu_ratio"}]}

Three processes with one thread each hold the same learners: one works alone, and two are the ranks of one group. They run the same outer step in turns, so that a busy machine slows both sides alike, and the ratio is the median over pairs. Two ranks need
two cores that nobody else uses: "load" is the mean number of running processes in the last minute (`os.getloadavg`) before the measurement, and on an idle machine it is near 0. "cpu_ratio" compares the processor's time instead, which other programs disturb less: that of the busier rank to that of one process. It leaves out the waiting for
each other, so 1 / cpu_ratio is what quiet cores could reach at best.
MAML has the size of nav2d, 20 tasks x 20 trajectories x 100 steps; "5 tasks" does not divide by two, so that one rank has three of them and nothing can be faster than 0.6. RL2 has the sizes of the configs `bandit-10-5`, 256 bandits x 4 trials x 10 pulls, and `mdp-10`, 128 MDPs x 1 trial x 100 steps.
"""
import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent


def learners():
    "Rows (name, learner, tasks)."
    from ssm_metarl.checkpoints import make_learner
    from ssm_metarl.config import CONFIGS
    from ssm_metarl.envs import sample_tasks
    def row(name, config, M, **meta):
        config = CONFIGS[config]
        config = replace(config, meta=replace(config.meta, tasks_per_batch=M, **meta))
        return name, make_learner(config), sample_tasks(config.env, M)
    yield row('maml, 20 tasks', 'nav2d', 20, outer_epochs=1)
    yield row('maml, 20 tasks, three epochs', 'nav2d', 20, outer_epochs=3)
    yield row('maml, 40 tasks, three epochs', 'nav2d', 40, outer_epochs=3)
    yield row('maml, 5 tasks', 'nav2d', 5, outer_epochs=1)
    yield row('rl2, 256 bandits', 'bandit-10-5', 256)
    yield row('rl2, 128 MDPs', 'mdp-10', 128)


def work(words):
    "Serve the parent process: the name of each row, then one outer step for each line that it sends; an empty line ends the row."
    import torch

    from ssm_metarl.compiling import keep_memory
    from ssm_metarl.ranks import joined
    torch.set_num_threads(1)
    keep_memory()
    say = lambda text: print(text, flush=True)
    with joined():
        for name, learner, tasks in learners():
            if words and not any(word in name for word in words): continue
            learner.outer_step(tasks)
            say(name)
            while sys.stdin.readline().strip():
                begin = time.perf_counter(), time.process_time()
                learner.outer_step(tasks)
                say(f'{time.perf_counter() - begin[0]} {time.process_time() - begin[1]}')


def start(words, **environment):
    "A process that serves."
    environment = os.environ | dict(PYTHONPATH=str(HERE.parent), OMP_NUM_THREADS='1') | environment
    return subprocess.Popen([sys.executable, __file__, 'work', *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def group(words, n):
    "n processes that work together."
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    address = dict(WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    return [start(words, RANK=str(i), **address) for i in range(n)]


def tell(processes, line):
    "The same line to all of them."
    for process in processes:
        process.stdin.write(line + '\n')
        process.stdin.flush()


def hear(processes):
    "A line of each of them."
    return [process.stdout.readline().strip() for process in processes]


def step(processes):
    "Seconds of an outer step, and of the processor: those of the slowest of them."
    tell(processes, 'run')
    return [max(column) for column in zip(*(map(float, line.split()) for line in hear(processes)))]


def compare(one, ranks, repeats):
    "For each row: its name, median ratios of the time and of the processor's, and the median time of the ranks in ms."
    while names := hear(one + ranks):
        if len(set(names)) > 1: sys.exit(f'the processes measure different rows: {names}')
        if not names[0]: return
        pairs = [(step(ranks), step(one)) for _ in range(repeats)]
        tell(one + ranks, '')
        ratios = [statistics.median(ranks[i] / alone[i] for ranks, alone in pairs) for i in range(2)]
        yield names[0], *ratios, 1e3 * statistics.median(ranks[0] for ranks, _ in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', help='only rows whose name contains one of them')
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--ranks', type=int, default=2)
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    rows, load = [], os.getloadavg()[0]
    print(f'load of the machine before: {load:.1f} of {os.cpu_count()} cores', flush=True)
    for name, ratio, cpu_ratio, ms in compare([start(args.words)], group(args.words, args.ranks), args.repeats):
        rows.append(dict(name=name, ratio=round(ratio, 4), peer='one process', ms=round(ms, 3), speed_up=round(1 / ratio, 2), cpu_ratio=round(cpu_ratio, 4)))
        print(f'{name:32} {ratio:7.4f} of one process, {1 / ratio:5.2f} times as fast, {ms:9.2f} ms; processor: {1 / cpu_ratio:5.2f}', flush=True)
    if args.json: Path(args.json).write_text(json.dumps(dict(ranks=args.ranks, load=round(load, 2), cores=os.cpu_count(), rows=rows), indent=1) + '\n')


if __name__ == '__main__': work(sys.argv[2:]) if sys.argv[1:2] == ['work'] else main()
