"What all benchmarks share: two things measured in turns, so that a busy machine slows both alike, and the file of results."
import argparse
import json
import statistics
import time

import torch

from ssm_metarl.compiling import keep_memory


def paired(ours, peer, repeats, wait=lambda: None):
    "Median of the ratios of interleaved pairs (below 1: ours is faster), and our median time in ms. `wait` lets a GPU finish."
    ours(), peer()
    times = []
    for _ in range(repeats):
        pair = []
        for f in (ours, peer):
            wait()
            start = time.perf_counter()
            f(), wait()
            pair.append(time.perf_counter() - start)
        times.append(pair)
    return statistics.median(a / b for a, b in times), 1e3 * statistics.median(a for a, _ in times)


def write_rows(rows, path):
    "{'rows': [{'name', 'ratio', 'peer', 'ms'}]}, unless path is None."
    if path:
        with open(path, 'w') as file: json.dump(dict(rows=rows), file, indent=1)


def main(doc, cases, repeats):
    "A command line over rows (name, ours, peer's name, peer), on one thread that keeps freed memory."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', help='only rows whose name contains one of them')
    parser.add_argument('--repeats', type=int, default=repeats)
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    rows = []
    for name, ours, peer_name, peer in cases():
        if args.words and not any(word in name for word in args.words): continue
        ratio, ms = paired(ours, peer, args.repeats)
        rows.append(dict(name=name, ratio=round(ratio, 4), peer=peer_name, ms=round(ms, 3)))
        print(f'{name:46} {ratio:7.4f} of {peer_name:42} {1 / ratio:6.1f} times as fast, {ms:8.2f} ms', flush=True)
    write_rows(rows, args.json)
