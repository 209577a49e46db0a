"What all benchmarks share: two things measured in turns, so that a busy machine slows both alike, and the file of results."
import json
import statistics
import time


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
