"""Every check that a change has to pass, the cheapest first. Run from the top of the repository: python tools/test.py [NAME ...]

Runs them all even if one fails, then says which; with names, only those.
"""
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
ENV = os.environ | {'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}', 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}


def run(*command, **env): # -> True if it went well
    return subprocess.run([str(x) for x in command], env=ENV | env).returncode == 0


def fingerprint(folder, pattern):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).glob(pattern)}


def leaves_unchanged(folder, pattern, *command):
    "Whether a command changes, adds or removes files; it names them."
    before = fingerprint(folder, pattern)
    ok, after = run(*command), fingerprint(folder, pattern)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    if changed: print(f'{command[0]} changed {", ".join(changed)} in {folder}: commit what it wrote')
    return ok and not changed


def in_a_kernel(name):
    "Execute a notebook as JupyterLab would, in small."
    with tempfile.TemporaryDirectory() as folder:
        return run('jupyter', 'nbconvert', '--execute', '--ExecutePreprocessor.timeout=600', '--to', 'notebook', '--output-dir', folder, f'nbs/{name}.ipynb',
                   IN_TEST='1', MPLBACKEND='')


CHECKS = {
    'notebooks': lambda: run(sys.executable, 'tools/check_nbs.py'),
    'clean': lambda: leaves_unchanged('nbs', '*.ipynb', 'nbdev_clean'),
    'export': lambda: leaves_unchanged('ssm_metarl', '*.py', 'nbdev_export'),
    'readme': lambda: run(sys.executable, 'tools/readme.py', '--check'),
    'feet': lambda: run(sys.executable, 'tools/foot.py', '--check') and run(sys.executable, 'tools/fold.py', '--check'),
    'nbdev_test': lambda: run('nbdev_test', '--n_workers', '2', '--timing'),
    'twice': lambda: run(sys.executable, 'tools/twice.py', '00b_cores', '02a_own_env', '04d_guards', '07_plots'),
    'pytest': lambda: run(sys.executable, '-m', 'pytest', '-q', '-n', '2', '--dist', 'worksteal', 'tests'),
    'docs': lambda: run(sys.executable, 'tools/preview.py') and run(sys.executable, 'tools/browse.py'),
    'kernel': lambda: in_a_kernel('09_train_eval_adapt'),
}


def main(names):
    if unknown := set(names) - set(CHECKS): sys.exit(f'test.py: no check is called {", ".join(sorted(unknown))}; there are {", ".join(CHECKS)}')
    failed = []
    for name in names or CHECKS:
        print(f'--- {name}', flush=True)
        begin = time.time()
        ok = CHECKS[name]()
        print(f'--- {name}: {"passed" if ok else "FAILED"} in {time.time() - begin:.0f} s', flush=True)
        if not ok: failed.append(name)
    if failed: print(f'failed: {", ".join(failed)}')
    print(f'{len(names or CHECKS) - len(failed)} passed, {len(failed)} failed')
    return bool(failed)


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
