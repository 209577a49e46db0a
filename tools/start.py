"""Set up a virtual environment and run the main job or the tests, from a fresh clone with Python 3.11 or newer.

python3 tools/start.py demo    train, evaluate and adapt a policy; ends in the gain from adaptation and a picture of it
python3 tools/start.py test    run every check that a change has to pass
python3 tools/start.py test --lowest pytest    one of them, with the oldest packages that settings.ini permits
"""
import argparse
import hashlib
import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = 'torch>=2.6,<2.14'  # what was tested; settings.ini has no upper bound


def run(*command):
    "Show a command and run it; stop with its status if it fails."
    print('$', Path(command[0]).name, *command[1:], flush=True)
    result = subprocess.run([str(x) for x in command], cwd=ROOT)
    if result.returncode: sys.exit(f'start.py: this command ended with status {result.returncode}; its message stands above')


def lowest():
    "The lower bounds of settings.ini, each as name==version."
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    return [requirement.replace('>=', '==') for requirement in settings['DEFAULT']['requirements'].split()]


def environment(folder, extra, torch, torch_index, constraints=()):
    "Python of a virtual environment with this library in it, made if it is not there or out of date."
    python = folder / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    wanted = hashlib.sha256(b''.join((ROOT / x).read_bytes() for x in ('settings.ini', 'setup.py')) + f'{extra} {torch} {constraints}'.encode()).hexdigest()
    stamp = folder / f'installed-{extra or "library"}'
    if stamp.exists() and stamp.read_text() == wanted: return python
    works = lambda: python.exists() and subprocess.run([python, '-m', 'pip', '--version'], capture_output=True).returncode == 0
    if not works():
        run(sys.executable, '-m', 'venv', '--clear', folder)
        if not works(): sys.exit('start.py: the virtual environment has no pip; install the package python3-venv (Debian, Ubuntu), or another Python')
    pip = [python, '-m', 'pip', '--disable-pip-version-check', 'install', '--quiet']
    run(*pip, torch, *(['--index-url', torch_index] if torch_index else []))  # first and alone, so that a CPU build is taken where there is one
    (folder / 'constraints.txt').write_text('\n'.join(constraints))
    run(*pip, '--constraint', folder / 'constraints.txt', torch, '--editable', f'.[{extra}]' if extra else '.')  # again, so that no extra replaces it
    stamp.write_text(wanted)
    return python


def demo(python):
    "The main job: meta-train, evaluate without adaptation, evaluate with it."
    folder = Path('checkpoints/demo')
    run(python, 'main.py', 'demo', '--out', folder)
    print(f'Picture: {ROOT / folder / "adaptation.png"}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('job', choices=['demo', 'test'])
    parser.add_argument('--venv', type=Path, help='folder of the virtual environment (default: .venv, with --lowest .venv-lowest, with --newest .venv-newest)')
    parser.add_argument('--lowest', action='store_true', help='with the lower bounds of settings.ini, and without the extra `interop`')
    parser.add_argument('--newest', action='store_true', help='with the newest torch too, tested or not')
    parser.add_argument('--torch', metavar='REQUIREMENT', help='another torch, such as torch==2.13.0 where there is no CPU build of the lowest')
    parser.add_argument('--torch-index', metavar='URL', help="package index to take torch from, such as PyTorch's own for its CPU build on Linux")
    args, rest = parser.parse_known_args()
    if rest and args.job == 'demo': parser.error(f'demo takes no {" ".join(rest)}')
    if sys.version_info < (3, 11): sys.exit(f'start.py: this is Python {sys.version.split()[0]}; ssm_metarl needs 3.11 or newer')
    if args.lowest and args.newest: parser.error('--lowest and --newest: choose one')
    kind = 'lowest' if args.lowest else 'newest' if args.newest else ''
    bounds = lowest() if args.lowest else []
    torch = args.torch or next((x for x in bounds if x.startswith('torch==')), 'torch' if args.newest else TORCH)
    extra = '' if args.job == 'demo' else 'dev' if args.lowest else 'dev,interop'
    venv = args.venv or ROOT / f'.venv{"-" * bool(kind)}{kind}'
    python = environment(venv.resolve(), extra, torch, args.torch_index, [x for x in bounds if not x.startswith('torch==')])
    if args.job == 'demo': demo(python)
    else: run(python, 'tools/test.py', *rest)


if __name__ == '__main__': main()
