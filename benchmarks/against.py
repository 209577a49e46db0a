"""Is this code slower than another version of it? Time per row of a benchmark, as a ratio to an earlier commit (below 1: this code is faster).

python benchmarks/against.py COMMIT ssm                    all rows of benchmarks/ssm.py
python benchmarks/against.py COMMIT maml --words first     only rows whose name contains one of these words
python benchmarks/against.py COMMIT envs --json FILE       also write {"commit", "rows": [{"name", "ratio", "ms"}]}

The earlier version is checked out into a temporary folder. One process holds each version, and they run each row in turns, so that a busy machine slows both alike. The ratio is the median over pairs.
"""
import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def rows_of(benchmark):
    "Pairs (name, function) of what a benchmark measures of ours."
    module = importlib.import_module(benchmark)
    if benchmark == 'maml': yield from ((name, ours) for name, ours, *_ in module.cases())
    elif benchmark == 'ssm':
        for init in ('lru', 'real'):
            for source in (module.sequences, module.steps, module.through_a_step):
                yield from ((name, ours) for name, ours, *_ in source('cpu', init))
    elif benchmark == 'rollout':
        for label, family in module.FAMILIES.items():
            for M, K, width in ((8, 10, 64), (20, 10, 32), (20, 20, 64)):
                yield f'{label}, {M} tasks x {K} trajectories, width {width}', module.rollouts(family, M, K, width, 'cpu')[0]
    else:
        for label, family, limit, N, *_ in module.cases(): yield f'{label} N={N}', environment(module, family, limit, N)


def environment(module, family, limit, N, steps=200):
    "A function that steps N environments."
    np = importlib.import_module('numpy')
    env = module.EnvBatch(module.EnvConfig(family, N, limit), autoreset_mode=module.AutoresetMode.SAME_STEP)
    env.action_space.seed(0)
    actions = np.stack([env.action_space.sample() for _ in range(steps)])
    env.reset()
    return lambda: module.play(env, actions)


def work(benchmark, words):
    "Serve a parent process: the name of each row, then one run for each line that it sends; an empty line ends the row."
    torch = importlib.import_module('torch')
    torch.set_num_threads(1)
    torch.manual_seed(0)
    importlib.import_module('ssm_metarl.compiling').keep_memory()
    say = lambda text: print(text, flush=True)
    for name, run in rows_of(benchmark):
        if words and not any(word in name for word in words): continue
        run()
        say(name)
        while sys.stdin.readline().strip():
            start = time.perf_counter()
            run()
            say(time.perf_counter() - start)


def worker(tree, benchmark, words):
    "A process that runs the code of a tree."
    paths = f'import sys; sys.path[:0] = {[str(tree), str(tree / "benchmarks"), str(ROOT / "benchmarks")]!r}; '
    code = f'{paths}import runpy; against = runpy.run_path({__file__!r}); against["work"]({benchmark!r}, {words!r})'
    return subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def compare(workers, repeats):
    "For each row: its name, the median ratio, and our median time in ms."
    def ask(process):
        process.stdin.write('run\n')
        process.stdin.flush()
        return float(process.stdout.readline())
    while names := [process.stdout.readline().strip() for process in workers]:
        if names[0] != names[1]: sys.exit(f'the versions measure different rows: {names[0]!r} here, {names[1]!r} there')
        if not names[0]: return
        pairs = [[ask(process) for process in workers] for _ in range(repeats)]
        for process in workers:
            process.stdin.write('\n')
            process.stdin.flush()
        yield names[0], statistics.median(ours / theirs for ours, theirs in pairs), 1e3 * statistics.median(ours for ours, _ in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('commit', help='to compare with')
    parser.add_argument('benchmark', choices=['ssm', 'envs', 'maml', 'rollout'])
    parser.add_argument('--words', nargs='*', default=[], help='only rows whose name contains one of them')
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(['git', 'archive', args.commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(['tar', '-x', '-C', folder], input=archive, check=True)
        for name, ratio, ms in compare([worker(tree, args.benchmark, args.words) for tree in (ROOT, Path(folder))], args.repeats):
            rows.append(dict(name=name, ratio=round(ratio, 4), ms=round(ms, 3)))
            print(f'{name:52} {ratio:6.3f} of its time at {args.commit}, {ms:9.2f} ms', flush=True)
    if args.json: Path(args.json).write_text(json.dumps(dict(commit=args.commit, rows=rows), indent=1) + '\n')


if __name__ == '__main__': main()
