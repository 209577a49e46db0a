"""Which detector sees a shift of MetaCartPole-v0, and how soon, if all are allowed the same rate of false alarms?

python benchmarks/drift.py                all detectors; those of `river` need `pip install -e '.[bench]'`
python benchmarks/drift.py --json FILE    also write {"false_alarms", "streams", "rows": [{"detector", "shift", "power", "delay"}]}

A policy is cloned from the oracle of cart-poles that are all wired alike, without errors of sensors. A stream is 4 episodes of 200 steps of one task, seen in 20 batches of 10 steps. Source streams have validation tasks (600 describe the source,
another 600 set the threshold; the policy was trained on neither) and held-out tasks (those without a shift, for the false alarms). Each detector has one number set on the validation streams so that at most 5 % of them raise an alarm; power is the share
of 600 streams that do, delay the median number of steps until then.

"score" is the alarm of `FeatureMonitor`, with decay 0.95 and without memory; "symmetric KL", "Frechet" and "Mahalanobis" are the other distances that it reports, their logarithms standardised after each batch and given a threshold in the same way; "p-value" has the threshold
that would be right for independent samples. The detectors of river get the score without memory. They compare a stream with its own past, so each is shown 100 batches of the source first.
"""
import argparse
import json
from dataclasses import replace
from math import ceil

import numpy as np
import torch
from torch.nn import functional as F

from ssm_metarl.batch import stack_tasks
from ssm_metarl.envs import EnvConfig, sample_tasks
from ssm_metarl.monitors import FeatureMonitor, stream_batches
from ssm_metarl.policy import PolicyConfig, SSMMetaPolicy
from ssm_metarl.rollout import collect, policy_inputs

HOME = EnvConfig('MetaCartPole-v0', num_envs=4, time_limit=200, options=dict(reversible=False))
RATE, STEPS = .05, 10  # of false alarms; per batch
SHIFTS = {'none': {}, 'long pole': dict(split='long-pole'), 'strong gravity': dict(split='strong-gravity'), 'sticky track': dict(split='sticky-track'), 'sensor bias 0.1': dict(sensor_bias=.1),
          'sensor noise 0.03': dict(sensor_noise=.03), 'sensor noise 0.1': dict(sensor_noise=.1), 'reversed motor': dict(motor=-1)}


def oracle_actions(traj, tasks):
    "What someone who knows the task would do in the states of some trajectories."
    family, (M, K, T, O) = HOME.family, traj.obs.shape
    rows = family.prepare({k: np.repeat(v, K * T, 0) for k, v in stack_tasks(tasks, family).items()})
    return torch.from_numpy(family.oracle(traj.obs.reshape(-1, O).numpy(), rows)).view(M, K, T)


def cloned_policy(updates=80):
    "A policy that imitates the oracle in the states that it comes to itself (Ross, Gordon & Bagnell, AISTATS 2011)."
    env = replace(HOME, num_envs=1, time_limit=100)
    policy = SSMMetaPolicy(env.family.observation_space, env.family.action_space, PolicyConfig(16, 8))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for i in range(updates):
        tasks = sample_tasks(env, 64, step=i)
        traj = collect(policy, policy.get_params(), tasks, env, key=(i,))
        logits = policy.functional(dict(policy.named_parameters()), traj.obs, reset=traj.memory_reset)['logits']
        optimizer.zero_grad()
        F.cross_entropy(logits[traj.mask], oracle_actions(traj, tasks)[traj.mask]).backward()
        optimizer.step()
    return policy


@torch.no_grad()
def streams(policy, n, split='held_out', motor=1, **sensors):
    "Features and mask [n, T, 4 * 10, ...] of streams in a world, and the mean return there."
    env = replace(HOME, options=HOME.options | sensors)
    tasks = [task | dict(force=motor * task['force']) for task in sample_tasks(env, n, split)]
    traj = collect(policy, policy.get_params(), tasks, env, 'monitor')
    features = policy.functional(policy.get_params(), policy_inputs(policy, traj), reset=traj.memory_reset)['features']
    return stream_batches(features, STEPS), stream_batches(traj.mask, STEPS), traj.returns.mean().item()


def course(monitor, x, mask):
    "All that a monitor reports of some streams, name -> [S, T]."
    monitor.forget()
    rows = [(monitor.update(x[:, t], mask[:, t]), monitor.shift())[1] for t in range(x.shape[1])]
    return {k: torch.stack([r[k].double() for r in rows], 1) for k in rows[0]}


def first_above(values, threshold): return [next((t for t, v in enumerate(row) if v > threshold), None) for row in values.tolist()]


def conformal(values):
    "The threshold that at most the stated share of streams passes."
    return values.nan_to_num(nan=-torch.inf).amax(1).sort().values[ceil((len(values) + 1) * (1 - RATE)) - 1].item()


def own_detectors(reference, validation):
    "name -> function of (x, mask) that gives the batch of the first alarm of each stream, or None."
    found = {}
    for name, decay in (('score', .95), ('score without memory', 0.)):
        monitor = FeatureMonitor(decay)
        monitor.calibrate(*(torch.cat(pair) for pair in zip(reference, validation)), false_alarms=RATE)
        found[name] = lambda x, mask, monitor=monitor: first_above(course(monitor, x, mask)['shift_alarm'], .5)
    plain = FeatureMonitor(.95)
    plain.calibrate(*reference)
    home, usual = (course(plain, *data) for data in (reference, validation))
    for name, key in (('symmetric KL', 'symmetric_kl'), ('Frechet', 'frechet'), ('Mahalanobis', 'mahalanobis')):
        level, spread = home[key].log().mean(0), home[key].log().std(0)
        score = lambda report, key=key, level=level, spread=spread: (report[key].log() - level) / spread
        limit = conformal(score(usual))
        found[name] = lambda x, mask, score=score, limit=limit: first_above(score(course(plain, x, mask)), limit)
    found['p-value'] = lambda x, mask: first_above(-course(plain, x, mask)['shift_p'], -RATE / x.shape[1])  # Bonferroni over the batches
    return found


def river_detectors(reference, validation):
    "The same with detectors of river, each with the most sensitive setting of a grid that keeps the rate on the validation streams."
    from river import drift
    quick = FeatureMonitor(0.)
    quick.calibrate(*(torch.cat(pair) for pair in zip(reference, validation)), false_alarms=RATE)
    values = lambda x, mask: course(quick, x, mask)['shift_score'].nan_to_num(nan=0.).tolist()
    past = np.reshape(values(*reference), -1).tolist()
    def alarms(make, rows):
        found = []
        for i, row in enumerate(rows):
            detector = make()
            for v in past[100 * i % (len(past) - 100):][:100]: detector.update(v)
            found.append(first_alarm(detector, row))
        return found
    kinds = {'river PageHinkley': [lambda t=t: drift.PageHinkley(min_instances=30, delta=.5, threshold=t) for t in np.geomspace(1, 60, 16)],
             'river ADWIN': [lambda d=d: drift.ADWIN(delta=d, clock=1, grace_period=5) for d in np.geomspace(.5, 1e-6, 16)],
             'river KSWIN': [lambda a=a: drift.KSWIN(alpha=a, window_size=100, stat_size=15, seed=0) for a in np.geomspace(.05, 1e-8, 16)]}
    usual = values(*validation)
    for name, grid in kinds.items():
        make = next((m for m in grid if np.mean([a is not None for a in alarms(m, usual)]) <= RATE), grid[-1])
        yield name, lambda x, mask, make=make: alarms(make, values(x, mask))


def first_alarm(detector, row):
    "The first number of a row at which a detector of river says drift, or None."
    for t, v in enumerate(row):
        detector.update(v)
        if detector.drift_detected: return t


def rows(n=600, river=True):
    "Power and delay of each detector for each shift."
    policy = cloned_policy()
    reference, validation = zip(*(x.split(n) for x in streams(policy, 2 * n, 'validation')[:2]))
    detectors = own_detectors(reference, validation) | (dict(river_detectors(reference, validation)) if river else {})
    for shift, world in SHIFTS.items():
        x, mask, returns = streams(policy, n, **world)
        for name, detect in detectors.items():
            at = [t for t in detect(x, mask) if t is not None]
            yield dict(detector=name, shift=shift, power=round(len(at) / n, 4), delay=STEPS * (float(np.median(at)) + 1) if at else None, mean_return=round(returns, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--streams', type=int, default=600)
    parser.add_argument('--no-river', action='store_true', help='only detectors of our own')
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for row in rows(args.streams, not args.no_river):
        table.append(row)
        print(f'{row["shift"]:18} {row["detector"]:22} alarm in {row["power"]:6.1%} of streams, after {row["delay"] or float("nan"):5.0f} steps; mean return {row["mean_return"]}', flush=True)
    if args.json:
        with open(args.json, 'w') as file: json.dump(dict(false_alarms=RATE, streams=args.streams, rows=table), file, indent=1)


if __name__ == '__main__': main()
