"""Settings of the strategies on digits: eight for each, judged on corruptions, images and seeds that no result uses.

python benchmarks/digits.py --json benchmarks/results/digits-tuning.json    notebook 05b: `DIGIT_GRID` is what is tried, `DIGIT_SETTINGS` what won

Each setting gets the mean error over the four tuning corruptions, two seeds, and the protocols `reset` and `continual`, without guards. One CPU thread; about four minutes.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch

from ssm_metarl.digits import DIGIT_GRID, DIGIT_SETTINGS, TUNING_CORRUPTIONS, digit_adapter, digits_data, protocol_errors, train_digits

SEEDS, PROTOCOLS = (100, 101), ('reset', 'continual')


def tuning_errors(norm):
    "Strategy -> a list of errors for each of its settings."
    errors = {name: [[] for _ in DIGIT_GRID[name]] for name in DIGIT_SETTINGS[norm]}
    for seed in SEEDS:
        data = digits_data(seed, tuning=True)
        model = train_digits(norm, *data['train'], seed)
        for name, found in errors.items():
            for setting, row in zip(DIGIT_GRID[name], found):
                adapter = digit_adapter(model, name, setting, data['train'])
                for protocol in PROTOCOLS:
                    worlds = protocol_errors(adapter, *data['stream'], protocol, seed, worlds=('clean', *TUNING_CORRUPTIONS))
                    row.append(float(np.mean([worlds[world][0] for world in TUNING_CORRUPTIONS])))
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', type=Path, help='file for the results')
    parser.add_argument('--norm', nargs='*', default=['BatchNorm', 'GroupNorm'], help='kinds of network')
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for norm in args.norm:
        results[norm] = {}
        for name, errors in tuning_errors(norm).items():
            means = [round(float(np.mean(row)), 3) for row in errors]
            best = DIGIT_GRID[name][int(np.argmin(means))]
            results[norm][name] = dict(tried=[dict(setting=s, error=e) for s, e in zip(DIGIT_GRID[name], means)], best=best)
            print(f'{norm:>10} {name:>10}: {min(means):6.2f} % with {best}; {means}', flush=True)
        if args.json: args.json.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__': main()
